"""Loss terms as sums and counts, so that micro-batches and ranks add both before one division makes the mean."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from training.engine.distributed import Reduce, alone
from training.methods import threshold

Normaliser = Literal["valid", "kept", "ratio"]


@dataclass(frozen=True)
class Loss:
    """A term: sum over this rank's pixels, the count over all ranks that divides it, and its weight in the step's loss.

    The functions below count what they are given, unless `count` says what the other micro-batches and ranks have too.
    """

    total: Tensor
    count: Tensor
    weight: float = 1.0

    def mean(self) -> Tensor:
        """sum / count; exactly 0, still connected to the graph, when nothing counts."""
        return self.total / torch.where(self.count > 0, self.count, 1)


def supervised(
    logits_BKHW: Tensor,
    label_BHW: Tensor,
    ignore: int,
    weight: float = 1.0,
    *,
    count: Tensor | None = None,
    weight_BHW: Tensor | None = None,
) -> Loss:
    """Cross entropy over pixels that are not `ignore`, each times its `weight_BHW` (None: 1), divided by their number."""
    if weight_BHW is None:
        total = F.cross_entropy(logits_BKHW.float(), label_BHW, ignore_index=ignore, reduction="sum")
    else:
        each = F.cross_entropy(logits_BKHW.float(), label_BHW, ignore_index=ignore, reduction="none")
        total = (each * weight_BHW).sum()
    return Loss(total, (label_BHW != ignore).sum() if count is None else count, weight)


def hard(
    logits_BKHW: Tensor,
    label_BHW: Tensor,
    ignore: int,
    weight: float = 1.0,
    *,
    sure: float = 0.7,
    least: int = 100_000,
    add: Reduce = alone,
    weight_BHW: Tensor | None = None,
) -> Loss:
    """Online hard example mining: cross entropy over pixels whose true class has probability <= max(sure, the
    `least`-th smallest such probability), the rule of the published Cityscapes recipes.

    The bar is found by histograms (`threshold.order_statistic`): no sort, no transfer to the host. Which pixels count is
    known only then, hence `add`, which sums a tensor over ranks. weight_BHW: as in `supervised`; it chooses nothing.
    """
    known = label_BHW != ignore
    each = F.cross_entropy(logits_BKHW.float(), label_BHW, ignore_index=ignore, reduction="none")
    probability = (-each.detach()).exp()
    rank = torch.full((), least, dtype=torch.int64, device=probability.device)
    bar = threshold.order_statistic(probability, known, rank, add).clamp_min(sure)
    used = known & (probability <= bar)
    return Loss(_kept(each, used, weight_BHW).sum(), add(used.sum()), weight)


def masked(
    logits_BKHW: Tensor,
    label_BHW: Tensor,
    keep_BHW: Tensor,
    valid_BHW: Tensor,
    normaliser: Normaliser,
    weight: float = 1.0,
    *,
    count: Tensor | None = None,
    weight_BHW: Tensor | None = None,
) -> Loss:
    """Cross entropy over kept pixels, each times its `weight_BHW` (None: 1).

    Divided by the valid pixels (FixMatch), by the kept ones, or by kept^2 / valid (`ratio`: the mean over kept pixels
    times valid / kept, as one public code base has it). With zero kept pixels the loss and its gradient are exactly 0.
    """
    each = F.cross_entropy(logits_BKHW.float(), label_BHW, reduction="none")
    if count is None:
        count = divisor(keep_BHW.sum(), valid_BHW.sum(), normaliser)
    return Loss(_kept(each, keep_BHW, weight_BHW).sum(), count, weight)


def _kept(each_BHW: Tensor, keep_BHW: Tensor, weight_BHW: Tensor | None) -> Tensor:
    # where before the product: a non-finite loss at a dropped pixel must not turn into 0 * inf.
    kept = torch.where(keep_BHW, each_BHW, 0.0)
    return kept if weight_BHW is None else kept * torch.where(keep_BHW, weight_BHW, 0.0)


def divisor(kept: Tensor, valid: Tensor, normaliser: Normaliser) -> Tensor:
    """What divides a masked sum, from counts that are complete: kept^2 / valid of parts does not add up."""
    if normaliser == "ratio":
        return kept.float().square() / valid.clamp_min(1)
    return kept if normaliser == "kept" else valid


def divergence(
    logits_BKHW: Tensor,
    target_BKHW: Tensor,
    keep_BHW: Tensor,
    valid_BHW: Tensor,
    weight: float = 1.0,
    *,
    count: Tensor | None = None,
    weight_BHW: Tensor | None = None,
) -> Loss:
    """KL(target || softmax(logits)) summed over kept pixels, each times its `weight_BHW` (None: 1), divided by the valid
    ones (CorrMatch's soft loss).

    target_BKHW: probabilities, detached here; pixels with exactly equal distributions contribute 0.
    """
    target = target_BKHW.detach().float()
    each = F.kl_div(logits_BKHW.float().log_softmax(1), target, reduction="none").sum(1)
    kept = _kept(each, keep_BHW, weight_BHW)
    return Loss(kept.sum(), valid_BHW.sum() if count is None else count, weight)
