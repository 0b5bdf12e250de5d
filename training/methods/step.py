"""One training step, the same for every method: views -> teacher -> refine -> threshold -> select -> mix -> student ->
propagate -> losses -> backward. Nothing here moves a value from the device to the host."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from training.engine.distributed import ALONE, Ranks, Reduce
from training.methods import augment, corrmatch, corrmatch_regions, losses
from training.methods.augment import View
from training.methods.losses import Loss
from training.methods.registry import Method
from training.methods.selection import Selection, select
from training.methods.student import Outputs, Rows, spared

LABELLED_TERMS = ("supervised", "supervised_corr")


@dataclass(frozen=True)
class Step:
    """What one step gives the engine: loss terms by name (detached, over all ranks), this rank's share of their
    weighted sum, and the weak views' selection."""

    losses: dict[str, Loss]
    loss: Tensor
    selection: Selection | None


@dataclass(frozen=True)
class Target:
    """What one strong view is trained on. sure_BHW: kept before regions were added. All after CutMix by `box_BHW`."""

    label_BHW: Tensor
    keep_BHW: Tensor
    sure_BHW: Tensor
    valid_BHW: Tensor
    box_BHW: Tensor


def step(
    method: Method,
    student: Callable[..., Outputs],
    teacher: nn.Module,
    labelled: View,
    unlabelled: View | None,
    *,
    ignore: int,
    at: int,
    unsup_weight: float,
    cutmix: float,
    generator: Generator,
    partner: View | None = None,
    uncut_BCHW: Tensor | None = None,
    chunks: int = 1,
    ranks: Ranks = ALONE,
    backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
    hold: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Step:
    """Losses and gradients of one step.

    Args:
        student: `student.Student`, perhaps wrapped. teacher: used by methods with an EMA teacher, in eval mode.
        labelled, unlabelled: weak views; `unlabelled` None (or a method without threshold) trains on labels alone.
        at: semi-supervised step, from 0; drives the threshold's schedule.
        unsup_weight: factor of the unlabelled terms at this step (ramped by the engine).
        cutmix: probability of a box per image.
        partner: other crops of the same unlabelled images, for methods that mix with those.
        uncut_BCHW: the EMA teacher's logits for the whole unlabelled images; its answer to a view is then cut from them.
        chunks: micro-batches of equal size; sums and counts are taken over all of them and over all ranks before the
            division, so gradients are those of the whole batch.
        hold: context for the backward passes of all chunks but the last (ranks then wait for one another only once).
    """
    if method.threshold is None or unlabelled is None:
        return _in_chunks(method, student, labelled, [], [], None, None, ignore, 0.0, chunks, ranks, backward, hold)
    weak, valid = unlabelled.image_BCHW, unlabelled.valid_BHW
    n, size = len(weak), valid.shape[1:]
    boxes = [augment.send(augment.boxes(n, size, cutmix, generator), weak.device) for _ in range(method.streams)]
    # bf16 has 8 bits of mantissa: too few for pixels.
    with torch.autocast(weak.device.type, enabled=False):
        others = [None if partner is None else augment.strong(partner.image_BCHW, generator) for _ in boxes]
        strong = [
            augment.mix(augment.strong(weak, generator), box, other) for box, other in zip(boxes, others, strict=True)
        ]
    whole = None
    if method.feature_dropout == "complementary":
        whole = augment.send(spared(n, generator), weak.device)
    theirs = None
    if method.teacher == "ema":
        with torch.no_grad():
            logits = _answer(teacher, unlabelled, uncut_BCHW)
            theirs = _answer(teacher, partner, uncut_BCHW) if partner is not None else None
    elif partner is not None:
        theirs = _eval_pass(student, partner.image_BCHW)

    def other(bar: Tensor) -> tuple[Selection, Tensor] | None:
        if partner is None or theirs is None:
            return None
        # Judged by the same bar: a slow bar must not move twice in a step.
        return select(method, theirs, partner.valid_BHW, at, bar=bar), partner.valid_BHW

    if not method.weak:
        chosen = select(method, logits, valid, at, ranks=ranks)
        targets = [_mixed(chosen, valid, box, other(chosen.bar)) for box in boxes]
        return _in_chunks(
            method, student, labelled, strong, targets, chosen, whole, ignore, unsup_weight, chunks, ranks, backward,
            hold,
        )  # fmt: skip
    if chunks > 1:
        raise ValueError("micro-batches need pseudo-labels from the EMA teacher alone: set train.accumulate to 1")
    rows = Rows(len(labelled.label_BHW), n, n, method.streams)
    out = student(torch.cat([labelled.image_BCHW, weak, *strong]), rows, method.feature_dropout, whole)
    observed = None
    if method.correlation is not None and method.correlation.mixed_valid:
        observed = augment.mix(valid, boxes[0], None if partner is None else partner.valid_BHW)
    affinity = (out.one, out.two, out.grid) if out.one is not None and out.two is not None and out.grid else None
    answer = logits if method.teacher == "ema" else out.weak.detach()
    chosen = select(method, answer, valid, at, ranks=ranks, affinity=affinity, observed_BHW=observed)
    targets = [_mixed(chosen, valid, box, other(chosen.bar)) for box in boxes]
    targets = [_regions(method, target, chosen, out, generator) for target in targets]
    own = Target(chosen.label_BHW, chosen.keep_BHW, chosen.keep_BHW, valid, valid)
    counts = _counts(method, labelled.label_BHW, targets, own, ignore, ranks.add)
    terms = _terms(method, out, labelled.label_BHW, targets, own, ignore, unsup_weight, counts, ranks.add)
    loss = _sum(terms, ranks)
    backward(loss)
    return Step(_over_ranks(terms, ranks), loss.detach(), chosen)


def _answer(teacher: nn.Module, view: View, uncut_BCHW: Tensor | None) -> Tensor:
    """logits_BCHW of the view: the teacher's for its pixels, or cut from those for the whole images."""
    if uncut_BCHW is None:
        logits_BCHW: Tensor = teacher(view.image_BCHW)
        return logits_BCHW
    assert view.window is not None
    return augment.cut(uncut_BCHW, view.window)


@torch.no_grad()
def _eval_pass(student: Callable[..., Outputs], image_BCHW: Tensor) -> Tensor:
    """The student's own answer with running statistics, as the published self-teaching code labels its mix partner."""
    assert isinstance(student, nn.Module)
    was = student.training
    student.eval()
    out = student(image_BCHW, Rows(len(image_BCHW))).labelled
    student.train(was)
    return out


def _mixed(chosen: Selection, valid_BHW: Tensor, box: Tensor, other: tuple[Selection, Tensor] | None) -> Target:
    theirs = (None, None, None) if other is None else (other[0].label_BHW, other[0].keep_BHW, other[1])
    mine = (chosen.label_BHW, chosen.keep_BHW, valid_BHW)
    label, keep, valid = (augment.mix(m, box, t) for m, t in zip(mine, theirs, strict=True))
    return Target(label, keep, keep, valid, box)


@torch.no_grad()
def _regions(method: Method, target: Target, chosen: Selection, out: Outputs, generator: Generator) -> Target:
    """CorrMatch's region propagation on the mixed labels, outside the box (the masks belong to the unmixed image)."""
    how = method.correlation
    if how is None or how.regions == "off" or out.one is None or out.two is None or out.grid is None:
        return target
    index = corrmatch.sample(out.one.shape[-1], how.masks, generator, reference=not how.last)
    index = augment.send(index, out.one.device)
    mask = corrmatch_regions.masks(corrmatch.rows(out.one, out.two, index), out.grid, target.label_BHW.shape[1:])
    mask &= (target.valid_BHW & ~target.box_BHW)[:, None]
    bar = chosen.bar if how.bar is None else how.bar
    n_classes = out.weak.shape[1]
    label, keep = corrmatch_regions.propagate(
        target.label_BHW, target.keep_BHW, mask, bar, bar, mode=how.regions, n_classes=n_classes
    )
    return replace(target, label_BHW=label, keep_BHW=keep)


def _stream(i: int) -> str:
    """The name of the i-th strong view's term."""
    return "unsupervised" if i == 0 else f"unsupervised_{i + 1}"


def _counts(
    method: Method, label_BHW: Tensor, targets: Sequence[Target], weak: Target | None, ignore: int, add: Reduce
) -> dict[str, Tensor]:
    """What divides each term, over all micro-batches and, by one sum, over all ranks."""
    views = {_stream(i): target for i, target in enumerate(targets)}
    if weak is not None:
        views |= {"corr_strong": targets[0], "divergence": targets[0], "perturbed": weak, "corr_weak": weak}
    views = {name: view for name, view in views.items() if method.weights.get(name)}
    masks = [label_BHW != ignore, *(mask for view in views.values() for mask in (view.keep_BHW, view.valid_BHW))]
    known, *pairs = add(torch.stack([mask.sum() for mask in masks])).unbind()
    counts = dict.fromkeys(LABELLED_TERMS, known)
    for name, kept, valid in zip(views, pairs[::2], pairs[1::2], strict=True):
        counts[name] = valid if name == "divergence" else losses.divisor(kept, valid, method.normaliser)
    return counts


def _terms(
    method: Method,
    out: Outputs,
    label_BHW: Tensor,
    targets: Sequence[Target],
    weak: Target | None,
    ignore: int,
    unsup_weight: float,
    counts: dict[str, Tensor],
    add: Reduce,
) -> dict[str, Loss]:
    """The loss terms that have a weight, each named as in `Method.weights`. weak: the target of the weak view itself."""
    w = {k: v * (1.0 if k in LABELLED_TERMS else unsup_weight) for k, v in method.weights.items() if v}
    terms: dict[str, Loss] = {}

    def supervised(name: str, logits: Tensor) -> None:
        if name in w and method.hard:
            terms[name] = losses.hard(logits, label_BHW, ignore, w[name], sure=method.sure, least=method.hard, add=add)
        elif name in w:
            terms[name] = losses.supervised(logits, label_BHW, ignore, w[name], count=counts[name])

    def masked(name: str, logits: Tensor, target: Target) -> None:
        if name in w:
            terms[name] = losses.masked(
                logits, target.label_BHW, target.keep_BHW, target.valid_BHW, method.normaliser, w[name],
                count=counts[name],
            )  # fmt: skip

    supervised("supervised", out.labelled)
    if out.corr is not None:
        supervised("supervised_corr", out.corr[0])
    for i, target in enumerate(targets):
        masked(_stream(i), out.strong[i], target)
    if weak is None:
        return terms
    if out.perturbed is not None:
        masked("perturbed", out.perturbed, weak)
    if out.corr is not None and method.correlation is not None:
        first = targets[0]
        masked("corr_strong", out.corr[2][0], first)
        masked("corr_weak", out.corr[1], weak)
        if "divergence" in w:
            soft = out.weak.detach().float().softmax(1)
            if method.correlation.mixed_target:
                soft = augment.mix(soft, first.box_BHW)
            terms["divergence"] = losses.divergence(
                out.strong[0], soft, first.sure_BHW, first.valid_BHW, w["divergence"], count=counts["divergence"]
            )
    return terms


def _sum(terms: dict[str, Loss], ranks: Ranks) -> Tensor:
    """The step's loss. Counts are over all ranks and gradients are averaged over them, hence the factor."""
    return ranks.world * torch.stack([term.weight * term.mean() for term in terms.values()]).sum()


def _over_ranks(terms: dict[str, Loss], ranks: Ranks) -> dict[str, Loss]:
    totals = ranks.add(torch.stack([term.total.detach() for term in terms.values()]))
    return {name: replace(terms[name], total=total) for name, total in zip(terms, totals, strict=True)}


def _in_chunks(
    method: Method,
    student: Callable[..., Outputs],
    labelled: View,
    strong: Sequence[Tensor],
    targets: Sequence[Target],
    chosen: Selection | None,
    spared_B: Tensor | None,
    ignore: int,
    unsup_weight: float,
    chunks: int,
    ranks: Ranks,
    backward: Callable[[Tensor], None],
    hold: Callable[[], AbstractContextManager[object]],
) -> Step:
    """Micro-batches whose gradients add up to the whole batch's: every count is known before the first forward."""
    if chunks > 1 and method.hard:
        raise ValueError("train.supervised_loss ohem picks its pixels over a whole batch: set train.accumulate to 1")
    counts = _counts(method, labelled.label_BHW, targets, None, ignore, ranks.add)
    seen: dict[str, Loss] = {}
    total = torch.zeros((), device=labelled.label_BHW.device)
    images, labels = labelled.image_BCHW.chunk(chunks), labelled.label_BHW.chunk(chunks)
    for c in range(chunks):
        views = [s.chunk(chunks)[c] for s in strong]
        rows = Rows(len(images[c]), 0, len(views[0]) if views else 0, len(views))
        part = [
            Target(*(v.chunk(chunks)[c] for v in (t.label_BHW, t.keep_BHW, t.sure_BHW, t.valid_BHW, t.box_BHW)))
            for t in targets
        ]
        with hold() if c + 1 < chunks else nullcontext():
            dropout = method.feature_dropout if views else "none"
            whole = None if spared_B is None else spared_B.chunk(chunks)[c]
            out = student(torch.cat([images[c], *views]), rows, dropout, whole)
            terms = _terms(method, out, labels[c], part, None, ignore, unsup_weight, counts, ranks.add)
            loss = _sum(terms, ranks)
            backward(loss)
        total = total + loss.detach()
        for name, term in terms.items():
            seen[name] = replace(term, total=term.total.detach() + (seen[name].total if name in seen else 0))
    return Step(_over_ranks(seen, ranks), total, chosen)
