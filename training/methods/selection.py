"""Which pixels of a weak view become labels: teacher logits -> refine -> threshold -> pseudo-labels and those to keep."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.distributed import ALONE, Ranks
from training.methods import corrmatch, s4mc, s4mc_triton
from training.methods.registry import Method


@dataclass(frozen=True)
class Selection:
    """Pseudo-labels of a weak view: label_BHW int64, keep_BHW bool, the bar that chose them (scalar), and the scores."""

    label_BHW: Tensor
    keep_BHW: Tensor
    bar: Tensor
    score_BHW: Tensor


@torch.no_grad()
def select(
    method: Method,
    logits_BKHW: Tensor,
    valid_BHW: Tensor,
    at: int,
    *,
    ranks: Ranks = ALONE,
    affinity: tuple[Tensor, Tensor, tuple[int, int]] | None = None,
    observed_BHW: Tensor | None = None,
    bar: Tensor | None = None,
) -> Selection:
    """Teacher logits -> pseudo-labels and which of them count. Invalid pixels influence neither the bar nor the loss.

    Args:
        at: semi-supervised step, from 0; drives the threshold's schedule.
        affinity: CorrMatch's embeddings and their grid, for the non-local union.
        observed_BHW: pixels that the bar is computed from; the valid ones if None.
        bar: one that was found already; the method's threshold, which may remember what it sees, is then not asked.
    """
    how, correlation = method.refinement, method.correlation
    if how is None:
        raw, label = _probability(logits_BKHW, valid_BHW).max(1)
        refined = raw
    elif correlation is not None and correlation.neighbours and affinity is not None:
        prob = _probability(logits_BKHW, valid_BHW)
        others = affinity[0].shape[-1] - 1
        wide = corrmatch.nonlocal_union(prob, *affinity, k=min(correlation.neighbours, others)) if others else prob
        raw, refined, label = s4mc.scores(prob, how, refined_BKHW=wide)
    else:
        raw, refined, label = s4mc_triton.scores(logits_BKHW, valid_BHW, how, method.table_K)
    if bar is None:
        assert method.threshold is not None
        if observed_BHW is None:
            reference = refined if how is not None and how.quantile_from == "refined" else raw
            bar = method.threshold.value(reference, label, valid_BHW, at, ranks)
        else:  # as published: other pixels than the valid ones are looked at, with the probabilities they were given
            bar = method.threshold.value(*logits_BKHW.float().softmax(1).max(1), observed_BHW, at, ranks)
    keep = (refined > bar) if method.strict else (refined >= bar)
    return Selection(label, keep & valid_BHW & refined.isfinite(), bar, refined)


def _probability(logits_BKHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """prob_BKHW, 0 outside the photograph: there nothing supports anything."""
    return logits_BKHW.float().softmax(1) * valid_BHW[:, None]
