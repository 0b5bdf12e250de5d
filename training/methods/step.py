"""One training step, the same for every method: views -> teacher -> refine -> threshold -> select -> mix -> student ->
propagate -> losses -> backward. Nothing here moves a value from the device to the host."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from training.engine.distributed import SINGLE, Group
from training.methods import augment
from training.methods.augment import View
from training.methods.losses import Loss
from training.methods.registry import Method
from training.methods.selection import (
    Labels,
    Selection,
    Target,
    Targets,
    grow_regions,
    mixed,
    select,
    select_above,
)
from training.methods.student import Rows, spared
from training.methods.terms import StepLoss


@dataclass(frozen=True)
class Views:
    """What one step sees.

    labelled, unlabelled: weak views; without `unlabelled` the step trains on labels alone.
    partner: other crops of the same unlabelled images, for methods that mix with those.
    uncut_BCHW: the EMA teacher's logits for the whole unlabelled images; its answer to a view is then cut from them.
    """

    labelled: View
    unlabelled: View | None = None
    partner: View | None = None
    uncut_BCHW: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """Loss terms by name (detached, over all ranks), this rank's share of their weighted sum, and the weak views'
    selection."""

    losses: dict[str, Loss]
    loss: Tensor
    selection: Selection | None


@dataclass(frozen=True)
class StrongViews:
    """Strong views after CutMix, a tensor image_BCHW each, and their boxes; spared_B: see `student.complementary`."""

    images: list[Tensor]
    boxes: list[Tensor]
    spared_B: Tensor | None


@dataclass(frozen=True)
class SemiSupervisedStep:
    """Losses and gradients of one step of `method`; the caller clears gradients and runs the optimiser.

    student: `student.Student`, perhaps wrapped by `group`. teacher: used by methods with an EMA teacher, in eval mode.
    ignore: class id of pixels without a label. cutmix: probability of a box per image.
    chunks: micro-batches of equal size; sums and counts are taken over all of them and over all ranks before the division,
        so gradients are those of the whole batch.
    """

    method: Method
    student: nn.Module
    teacher: nn.Module
    ignore: int
    cutmix: float
    chunks: int = 1
    group: Group = SINGLE

    def __call__(self, views: Views, at: int, unsup_weight: float, generator: Generator) -> StepResult:
        """Gradients are added to the student's.

        Args:
            at: semi-supervised step, from 0; drives the threshold's schedule.
            unsup_weight: factor of the unlabelled terms at this step.
            generator: of everything random but dropout, on the CPU.
        Raises:
            ValueError: micro-batches that cannot be exact under this method.
        """
        loss = StepLoss(self.method, self.ignore, unsup_weight, self.group.ranks)
        if self.method.threshold is None or views.unlabelled is None:
            return self._micro_batches(loss, views.labelled, StrongViews([], [], None), None, Targets([]))

        strong = self._strong_views(views.unlabelled, views.partner, generator)
        if self.method.weak:
            return self._whole_batch(loss, views, views.unlabelled, strong, at, generator)

        # Pseudo-labels come from the teacher alone: they are known before the student's first forward pass.
        theirs = self._partner_logits(views)
        logits_BKHW = self._teacher_logits(views.unlabelled, views.uncut_BCHW)
        chosen = select(self.method, logits_BKHW, views.unlabelled.valid_BHW, at, ranks=self.group.ranks)
        targets = self._targets(chosen, views.unlabelled, strong.boxes, self._pasted(views.partner, theirs, chosen.bar))
        return self._micro_batches(loss, views.labelled, strong, chosen, Targets(targets))

    def _strong_views(self, weak: View, partner: View | None, generator: Generator) -> StrongViews:
        images_BCHW, size = weak.image_BCHW, weak.valid_BHW.shape[1:]
        n, device = len(images_BCHW), images_BCHW.device
        boxes = [
            augment.send(augment.boxes(n, (size[0], size[1]), self.cutmix, generator), device)
            for _ in range(self.method.streams)
        ]

        # bf16 has 8 bits of mantissa: too few for pixels.
        with torch.autocast(device.type, enabled=False):
            pasted = [None if partner is None else augment.strong(partner.image_BCHW, generator) for _ in boxes]
            images = [
                augment.mix(augment.strong(images_BCHW, generator), box, other)
                for box, other in zip(boxes, pasted, strict=True)
            ]

        spared_B = None
        if self.method.feature_dropout == "complementary":
            spared_B = augment.send(spared(n, generator), device)
        return StrongViews(images, boxes, spared_B)

    @torch.no_grad()
    def _teacher_logits(self, view: View, uncut_BCHW: Tensor | None) -> Tensor:
        return teacher_logits(self.teacher, view, uncut_BCHW)

    def _partner_logits(self, views: Views) -> Tensor | None:
        """What the teacher, or the student in eval mode where it is its own teacher, says of the partner."""
        if views.partner is None:
            return None
        if self.method.teacher == "ema":
            return self._teacher_logits(views.partner, views.uncut_BCHW)
        return _eval_logits(self.student, views.partner.image_BCHW)

    def _pasted(self, partner: View | None, logits_BKHW: Tensor | None, bar: Tensor) -> Labels | None:
        """The labels of what CutMix pastes. Judged by the same bar: a slow bar must not move twice in a step."""
        if partner is None or logits_BKHW is None:
            return None
        chosen = select_above(self.method, logits_BKHW, partner.valid_BHW, bar)
        return chosen.labels(partner.valid_BHW)

    def _targets(self, chosen: Selection, weak: View, boxes: list[Tensor], pasted: Labels | None) -> list[Target]:
        own = chosen.labels(weak.valid_BHW)
        return [mixed(own, box, pasted) for box in boxes]

    def _whole_batch(
        self, loss: StepLoss, views: Views, weak: View, strong: StrongViews, at: int, generator: Generator
    ) -> StepResult:
        """Methods whose student sees the weak view in the same forward pass, and may take its pseudo-labels from it."""
        if self.chunks > 1:
            raise ValueError("micro-batches need pseudo-labels from the EMA teacher alone: set train.accumulate to 1")
        method, partner = self.method, views.partner
        theirs = self._partner_logits(views)

        n = len(weak.image_BCHW)
        rows = Rows(len(views.labelled.label_BHW), n, n, method.streams)
        image_NCHW = torch.cat([views.labelled.image_BCHW, weak.image_BCHW, *strong.images])
        logits_BKHW = self._teacher_logits(weak, views.uncut_BCHW) if method.teacher == "ema" else None
        out = self.student(image_NCHW, rows, method.feature_dropout, strong.spared_B)
        if logits_BKHW is None:
            logits_BKHW = out.weak.detach()

        observed_BHW = None
        if method.correlation is not None and method.correlation.mixed_valid:
            observed_BHW = augment.mix(weak.valid_BHW, strong.boxes[0], None if partner is None else partner.valid_BHW)
        chosen = select(
            method, logits_BKHW, weak.valid_BHW, at, ranks=self.group.ranks, embeddings=out.embeddings,
            observed_BHW=observed_BHW,
        )  # fmt: skip

        mixed_targets = self._targets(chosen, weak, strong.boxes, self._pasted(partner, theirs, chosen.bar))
        targets = Targets(
            [grow_regions(method, target, chosen.bar, out.embeddings, generator) for target in mixed_targets],
            chosen.labels(weak.valid_BHW),
        )

        counts = loss.counts(views.labelled.label_BHW, targets)
        terms = loss.terms(out, views.labelled.label_BHW, targets, counts, views.labelled.weight_BHW)
        total = loss.total(terms)
        _backward(total)
        return StepResult(loss.over_ranks(terms), total.detach(), chosen)

    def _micro_batches(
        self, loss: StepLoss, labelled: View, strong: StrongViews, chosen: Selection | None, targets: Targets
    ) -> StepResult:
        """Micro-batches whose gradients add up to the whole batch's: every count is known before the first forward."""
        chunks, method = self.chunks, self.method
        if chunks > 1 and method.hard:
            raise ValueError(
                "train.supervised_loss ohem picks its pixels over a whole batch: set train.accumulate to 1"
            )
        counts = loss.counts(labelled.label_BHW, targets)
        images, labels = labelled.image_BCHW.chunk(chunks), labelled.label_BHW.chunk(chunks)
        weights = [None] * chunks if labelled.weight_BHW is None else labelled.weight_BHW.chunk(chunks)
        strong_parts = [image.chunk(chunks) for image in strong.images]
        target_parts = [target.chunk(chunks) for target in targets.strong]
        spared_parts = [None] * chunks if strong.spared_B is None else strong.spared_B.chunk(chunks)

        seen: dict[str, Loss] = {}
        total = torch.zeros((), device=labelled.label_BHW.device)
        for c in range(chunks):
            views = [part[c] for part in strong_parts]
            rows = Rows(len(images[c]), 0, len(views[0]) if views else 0, len(views))
            dropout = method.feature_dropout if views else "none"
            last = c + 1 == chunks
            with nullcontext() if last else self.group.hold(self.student):  # ranks wait for one another only once
                out = self.student(torch.cat([images[c], *views]), rows, dropout, spared_parts[c])
                terms = loss.terms(out, labels[c], Targets([part[c] for part in target_parts]), counts, weights[c])
                part_total = loss.total(terms)
                _backward(part_total)

            total = total + part_total.detach()
            for name, term in terms.items():
                seen[name] = replace(term, total=term.total.detach() + (seen[name].total if name in seen else 0))
        return StepResult(loss.over_ranks(seen), total, chosen)


def _backward(loss: Tensor) -> None:
    with torch.autocast(loss.device.type, enabled=False):  # operators go back in the precision they came in
        loss.backward()


def teacher_logits(teacher: nn.Module, view: View, uncut_BCHW: Tensor | None) -> Tensor:
    """logits_BCHW of the view: the teacher's for its pixels, or cut from those for the whole images."""
    if uncut_BCHW is None:
        logits_BCHW: Tensor = teacher(view.image_BCHW)
        return logits_BCHW
    assert view.window is not None
    return augment.cut(uncut_BCHW, view.window)


@torch.no_grad()
def _eval_logits(student: nn.Module, image_BCHW: Tensor) -> Tensor:
    """The student's own answer with running statistics, as the published self-teaching code labels its mix partner."""
    was_training = student.training
    student.eval()
    logits_BCHW: Tensor = student(image_BCHW, Rows(len(image_BCHW))).labelled
    student.train(was_training)
    return logits_BCHW
