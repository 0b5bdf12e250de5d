"""S4MC: contextual refinement of class probabilities, scores, and the dynamic partition threshold.

Source: Kimhi et al., "Semi-Supervised Semantic Segmentation via Marginal Contextual Information", TMLR 2024 (arXiv 2308.13900).
Everything here is without gradient, in float32 or wider, and independent from image to image.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURHOODS: dict[int, list[tuple[int, int]]] = {
    4: [(-1, 0), (0, -1), (0, 1), (1, 0)],
    8: [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)],
    24: [(y, x) for y in range(-2, 3) for x in range(-2, 3) if (y, x) != (0, 0)],
}


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


@torch.no_grad()
def refine(
    prob_BKHW: Tensor,
    *,
    neighbourhood: int = 8,
    k: int = 1,
    beta: float | Literal["decay"] = 1.0,
    table_K: Tensor | None = None,
) -> Tensor:
    """Probability that a pixel *or* its most supportive neighbours belong to each class (paper, event union).

    For each class apart, the `k` neighbours with the highest probability are taken in turn:
    p~ <- p~ + beta (n - joint(p~, n)), with joint = p~ n (independence). With `table_K` (preset `ref_a`) the joint is
    max(p~ n, p~ E_c), E_c the share of class-c pixels' neighbours that are class c; then p~ can fall below p.
    Outside the image n = 0. Neighbours are found among the *unrefined* probabilities.

    Args:
        prob_BKHW: class probabilities in [0, 1]; not modified.
        neighbourhood: 4, 8 or 24 neighbours (cross, 3x3, 5x5; centre excluded).
        k: how many neighbours, 1 to `neighbourhood`.
        beta: weight of a neighbour in [0, 1], or "decay" for exp(-d/2) at L1 distance d.
        table_K: E_c per class in [0, 1], measured on the labelled split only (`neighbour_table`).
    Returns:
        p~_BKHW in [0, 1], not renormalised (classes may sum to more than 1); float32, or float64 for float64 input.
    Raises:
        ValueError: unknown neighbourhood, or k out of range.
    """
    if neighbourhood not in NEIGHBOURHOODS:
        raise ValueError(f"neighbourhood must be one of {sorted(NEIGHBOURHOODS)}, got {neighbourhood}")
    if not 1 <= k <= neighbourhood:
        raise ValueError(f"k must be 1 to {neighbourhood} (the neighbourhood), got {k}")
    prob = _wide(prob_BKHW)
    neighbours: list[tuple[Tensor, Tensor | float]]
    if beta == "decay" and neighbourhood != 4:  # of a cross all distances are 1
        neighbours = [*_strongest_with_weights(prob, neighbourhood, k)]
    else:
        same = math.exp(-1 / 2) if beta == "decay" else float(beta)
        neighbours = [(n, same) for n in _strongest(prob, neighbourhood, k)]

    refined = prob
    for n, weight in neighbours:
        joint = refined * n
        if table_K is not None:
            joint = torch.maximum(joint, refined * table_K.to(prob).view(1, -1, 1, 1))
        refined = refined + weight * (n - joint)
    return refined


def _shifted(prob_BKHW: Tensor, neighbourhood: int) -> Iterator[tuple[Tensor, int]]:
    """(neighbour's probability, its L1 distance) for every offset, 0 outside the image. Nearer offsets come first, so ties
    go to the nearer neighbour."""
    height, width = prob_BKHW.shape[-2:]
    radius = 2 if neighbourhood == 24 else 1
    padded = F.pad(prob_BKHW, (radius,) * 4)
    for dy, dx in sorted(NEIGHBOURHOODS[neighbourhood], key=lambda offset: abs(offset[0]) + abs(offset[1])):
        top, left = radius + dy, radius + dx
        yield padded[..., top : top + height, left : left + width], abs(dy) + abs(dx)


def _strongest(prob_BKHW: Tensor, neighbourhood: int, k: int) -> list[Tensor]:
    """The k largest neighbours of each class and pixel, largest first: k running maxima, not a stack of shifted copies."""
    best: list[Tensor] = []
    for n, _ in _shifted(prob_BKHW, neighbourhood):
        for rank, held in enumerate(best):
            best[rank] = torch.maximum(held, n)
            if k > 1:
                n = torch.minimum(held, n)  # goes on to the next rank
        if len(best) < k:
            best.append(n)
    return best


def _strongest_with_weights(prob_BKHW: Tensor, neighbourhood: int, k: int) -> list[tuple[Tensor, Tensor]]:
    """As `_strongest`, each with its weight exp(-d/2) at L1 distance d, which travels with it."""
    best: list[tuple[Tensor, Tensor]] = []
    for n, distance in _shifted(prob_BKHW, neighbourhood):
        w = torch.as_tensor(math.exp(-distance / 2), dtype=prob_BKHW.dtype, device=prob_BKHW.device)
        for rank, (held, held_w) in enumerate(best):
            larger = n > held
            best[rank] = (torch.where(larger, n, held), torch.where(larger, w, held_w))
            n, w = torch.where(larger, held, n), torch.where(larger, held_w, w)
        if len(best) < k:
            best.append((n, w))
    return best


@torch.no_grad()
def neighbour_table(labels_HW: Iterable[Tensor], n_classes: int, *, ignore: int = 255, prior: float = 8.0) -> Tensor:
    """E_c: share of the 4-neighbours of class-c pixels that are class c, pooled over labelled masks of any sizes.

    Classes that never occur get the mean over the others; `prior` pseudo-counts at that mean smooth rare classes.
    Returns: E_K float64 in [0, 1].
    """
    same, total = torch.zeros(2, n_classes, dtype=torch.float64)
    for label in labels_HW:
        for a, b in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            both = (a != ignore) & (b != ignore)
            for one, other in ((a, b), (b, a)):
                total += torch.bincount(one[both].long(), minlength=n_classes)[:n_classes]
                same += torch.bincount(one[both & (one == other)].long(), minlength=n_classes)[:n_classes]
    mean = same.sum() / total.sum() if total.sum() > 0 else torch.tensor(1.0, dtype=torch.float64)
    table_K: Tensor = (same + prior * mean) / (total + prior)
    return table_K


def top_two(prob_BKHW: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and second largest over classes, each BHW; one pass of running maxima (0 is the second of one class)."""
    first, second = prob_BKHW[:, 0], torch.zeros_like(prob_BKHW[:, 0])
    for channel in prob_BKHW.unbind(1)[1:]:
        second = torch.maximum(second, torch.minimum(first, channel))
        first = torch.maximum(first, channel)
    return first, second


def margin(prob_BKHW: Tensor) -> Tensor:
    """Confidence kappa = largest minus second largest class score (paper, eq. of the margin); BHW in [0, 1]."""
    first, second = top_two(_wide(prob_BKHW))
    return first - second


def max_probability(prob_BKHW: Tensor) -> Tensor:
    """Largest class score; BHW in [0, 1]."""
    return _wide(prob_BKHW).amax(1)


def neg_entropy(prob_BKHW: Tensor) -> Tensor:
    """Negative entropy over log K, plus one, of the scores renormalised to sum 1: BHW in [0, 1], larger is surer."""
    share = _wide(prob_BKHW)
    share = share / share.sum(1, keepdim=True).clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(1)
    return 1 - entropy / math.log(max(2, prob_BKHW.shape[1]))


SCORES = {"margin": margin, "max": max_probability, "neg_entropy": neg_entropy}


@dataclass(frozen=True)
class Refinement:
    """What is refined and how pixels are chosen; the named presets differ only in these values.

    weight: what a kept pixel counts in the loss: as much as any other, or its refined score.
    """

    neighbourhood: int = 8
    k: int = 1
    beta: float | Literal["decay"] = 1.0
    joint: Literal["independent", "table"] = "independent"
    quantity: Literal["classes", "confidence"] = "classes"
    score: Literal["margin", "max", "neg_entropy"] = "margin"
    label_from: Literal["raw", "refined"] = "raw"
    quantile_from: Literal["raw", "refined"] = "raw"
    strict: bool = True
    alpha_every: Literal["step", "epoch"] = "step"
    normaliser: Literal["kept", "valid", "ratio"] = "kept"
    weight: Literal["equal", "score"] = "equal"


# `paper` is the method as published; `ref_a` and `ref_b` are the semantics of the two public code bases, without their
# defects. `weighted` is ours: a doubtful pixel teaches less instead of being cut or counted in full (weights by confidence
# as in SoftMatch, Chen et al., ICLR 2023, here linear in the refined margin).
PRESETS = {
    "paper": Refinement(),
    "ref_a": Refinement(neighbourhood=4, beta="decay", joint="table", alpha_every="epoch", normaliser="ratio"),
    "ref_b": Refinement(
        neighbourhood=4, beta="decay", quantity="confidence", score="max", quantile_from="refined",
        strict=False, alpha_every="epoch", normaliser="valid",
    ),
    "weighted": Refinement(label_from="refined", weight="score", normaliser="valid"),
}  # fmt: skip
# Share left out at first and at the end; `paper` and `weighted` take train.s4mc.alpha and train.s4mc.alpha_end.
ALPHA = {"ref_a": (0.4, 0.0), "ref_b": (0.25, 0.15)}


@torch.no_grad()
def scores(
    prob_BKHW: Tensor,
    how: Refinement,
    table_K: Tensor | None = None,
    refined_BKHW: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw score, refined score (both BHW) and pseudo-label (BHW int64) of a probability map.

    refined_BKHW: probabilities that another refinement made, in place of `refine`'s.
    """
    prob = _wide(prob_BKHW)
    raw, label = SCORES[how.score](prob), prob.max(1).indices  # argmax over a strided axis is 6 times slower on a CPU
    refine_as_asked = partial(refine, neighbourhood=how.neighbourhood, k=how.k, beta=how.beta)
    if how.quantity == "confidence":  # class-agnostic: a neighbour sure of another class raises confidence too
        return raw, refine_as_asked(raw[:, None])[:, 0], label
    refined = refined_BKHW
    if refined is None:
        refined = refine_as_asked(prob, table_K=table_K if how.joint == "table" else None)
    if how.label_from == "refined":
        label = refined.max(1).indices
    return raw, SCORES[how.score](refined), label
