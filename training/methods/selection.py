"""Which pixels become labels: teacher logits -> refine -> threshold -> pseudo-labels, and what a strong view is trained on."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Generator, Tensor

from training.engine.distributed import ALONE, Ranks
from training.methods import augment, corrmatch, corrmatch_regions, s4mc, s4mc_triton
from training.methods.corrmatch import Embeddings
from training.methods.registry import Method


@dataclass(frozen=True)
class Selection:
    """Pseudo-labels of a weak view: label_BHW int64, keep_BHW bool, the bar that chose them (scalar), and the scores.

    weight_BHW: what each kept pixel counts, in [0, 1]; None: 1.
    """

    label_BHW: Tensor
    keep_BHW: Tensor
    bar: Tensor
    score_BHW: Tensor
    weight_BHW: Tensor | None = None

    def labels(self, valid_BHW: Tensor) -> "Labels":
        """As labels of the view that they were chosen for."""
        return Labels(self.label_BHW, self.keep_BHW, valid_BHW, self.weight_BHW)


@dataclass(frozen=True)
class Scores:
    """Scores of one view before and after refinement, and the class that each pixel would be given; all BHW."""

    raw_BHW: Tensor
    refined_BHW: Tensor
    label_BHW: Tensor


@torch.no_grad()
def select(
    method: Method,
    logits_BKHW: Tensor,
    valid_BHW: Tensor,
    at: int,
    *,
    ranks: Ranks = ALONE,
    embeddings: Embeddings | None = None,
    observed_BHW: Tensor | None = None,
) -> Selection:
    """Teacher logits -> pseudo-labels and which of them count. Invalid pixels influence neither the bar nor the loss.

    Args:
        at: semi-supervised step, from 0; drives the threshold's schedule.
        embeddings: CorrMatch's, for the non-local union.
        observed_BHW: pixels that the bar is computed from; the valid ones if None.
    """
    assert method.threshold is not None
    scores = _scores(method, logits_BKHW, valid_BHW, embeddings)

    if observed_BHW is None:
        from_refined = method.refinement is not None and method.refinement.quantile_from == "refined"
        reference = scores.refined_BHW if from_refined else scores.raw_BHW
        bar = method.threshold.value(reference, scores.label_BHW, valid_BHW, at, ranks)
    else:  # as published: other pixels than the valid ones are looked at, with the probabilities they were given
        bar = method.threshold.value(*logits_BKHW.float().softmax(1).max(1), observed_BHW, at, ranks)

    return _above(method, scores, valid_BHW, bar)


@torch.no_grad()
def select_above(method: Method, logits_BKHW: Tensor, valid_BHW: Tensor, bar: Tensor) -> Selection:
    """As `select`, by a bar found already: a threshold that remembers what it sees must not see a step twice."""
    return _above(method, _scores(method, logits_BKHW, valid_BHW, None), valid_BHW, bar)


def _scores(method: Method, logits_BKHW: Tensor, valid_BHW: Tensor, embeddings: Embeddings | None) -> Scores:
    how, correlation = method.refinement, method.correlation
    if how is None:
        raw, label = _probability(logits_BKHW, valid_BHW).max(1)
        return Scores(raw, raw, label)
    if correlation is None or not correlation.neighbours or embeddings is None:
        return Scores(*s4mc_triton.scores(logits_BKHW, valid_BHW, how, method.table_K))

    prob = _probability(logits_BKHW, valid_BHW)
    others = embeddings.one_BKN.shape[-1] - 1
    wide = corrmatch.nonlocal_union(prob, *embeddings, k=min(correlation.neighbours, others)) if others else prob
    return Scores(*s4mc.scores(prob, how, refined_BKHW=wide))


def _above(method: Method, scores: Scores, valid_BHW: Tensor, bar: Tensor) -> Selection:
    refined = scores.refined_BHW
    keep = (refined > bar) if method.strict else (refined >= bar)
    weight = refined if method.refinement is not None and method.refinement.weight == "score" else None
    return Selection(scores.label_BHW, keep & valid_BHW & refined.isfinite(), bar, refined, weight)


def _probability(logits_BKHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """prob_BKHW, 0 outside the photograph: there nothing supports anything."""
    return logits_BKHW.float().softmax(1) * valid_BHW[:, None]


@dataclass(frozen=True)
class Labels:
    """A view's labels (BHW int64), which of them teach and which pixels lie in the photograph (BHW bool).

    weight_BHW: what each pixel that teaches counts, in [0, 1]; None: 1.
    """

    label_BHW: Tensor
    keep_BHW: Tensor
    valid_BHW: Tensor
    weight_BHW: Tensor | None


@dataclass(frozen=True)
class Target(Labels):
    """What one strong view is trained on, all after CutMix by `box_BHW`. sure_BHW: kept before regions were added."""

    sure_BHW: Tensor
    box_BHW: Tensor

    def chunk(self, chunks: int) -> list["Target"]:
        """The target of each micro-batch."""
        planes = (getattr(self, field.name) for field in fields(self))
        cut = ([None] * chunks if plane is None else plane.chunk(chunks) for plane in planes)
        return [Target(*part) for part in zip(*cut, strict=True)]


@dataclass(frozen=True)
class Targets:
    """The targets of each strong view and, where the student sees it, of the weak view itself."""

    strong: list[Target]
    weak: Labels | None = None


def mixed(own: Labels, box_BHW: Tensor, pasted: Labels | None) -> Target:
    """CutMix of the labels, as the images were mixed: inside its box each sample has the labels of what was pasted there,
    its neighbour's in the batch where `pasted` is None."""

    def cut(name: str) -> Tensor:
        return augment.mix(getattr(own, name), box_BHW, None if pasted is None else getattr(pasted, name))

    keep = cut("keep_BHW")
    weight = None if own.weight_BHW is None else cut("weight_BHW")
    return Target(cut("label_BHW"), keep, cut("valid_BHW"), weight, keep, box_BHW)


@torch.no_grad()
def grow_regions(
    method: Method, target: Target, bar: Tensor, embeddings: Embeddings | None, generator: Generator
) -> Target:
    """CorrMatch's region propagation on the mixed labels, outside the box (the masks belong to the unmixed image)."""
    how = method.correlation
    if how is None or how.regions == "off" or embeddings is None:
        return target
    one, two, grid = embeddings
    index = augment.send(corrmatch.sample(one.shape[-1], how.masks, generator, reference=not how.last), one.device)

    height, width = target.label_BHW.shape[1:]
    mask = corrmatch_regions.masks(corrmatch.rows(one, two, index), grid, (height, width))
    mask &= (target.valid_BHW & ~target.box_BHW)[:, None]

    accept = bar if how.bar is None else how.bar
    label, keep = corrmatch_regions.propagate(
        target.label_BHW, target.keep_BHW, mask, accept, accept, mode=how.regions, n_classes=one.shape[1]
    )
    return replace(target, label_BHW=label, keep_BHW=keep)
