"""Which scores are high enough: a fixed bar, S4MC's falling quantile (DPA), or CorrMatch's slow average of class maxima."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.distributed import ALONE, Ranks, Reduce, alone


def alpha(step: int, total: int, start: float = 0.4, end: float = 0.0) -> float:
    """Share of raw scores below the bar: `start` at step 0, linearly to `end` at `total` (paper, DPA)."""
    done = min(max(step / max(1, total), 0.0), 1.0)
    return start + (end - start) * done


DIGIT = 11  # bits a histogram resolves: 2048 bins


@torch.no_grad()
def order_statistic(score: Tensor, valid: Tensor, rank: Tensor, add: Reduce = alone) -> Tensor:
    """The `rank`-th smallest (from 1, clamped to what there is) of the valid, finite scores; a scalar tensor.

    Radix selection: a histogram of the scores' leading bits tells which bin holds the wanted rank, a histogram inside
    that bin the next bits, and so on (3 histograms for float32). Exact, no sort, nothing leaves the device, and ranks
    need to add up nothing but counts.

    Args:
        score, valid: same shape, float32 or float64.
        rank: scalar int64 tensor, the same on every rank.
        add: sums an int64 tensor over ranks; every rank calls it the same number of times.
    """
    integer, bits = (torch.int64, 64) if score.dtype == torch.float64 else (torch.int32, 32)
    score = score.to(torch.float64 if bits == 64 else torch.float32).flatten()
    open_ = valid.flatten() & score.isfinite()
    raw = (score + 0.0).view(integer)  # + 0.0: minus zero is zero
    # Bit patterns of floats sort like integers once the magnitude of negative ones is flipped.
    key = raw ^ ((raw >> (bits - 1)) & torch.iinfo(integer).max)
    rank, found = rank.clamp_min(1), torch.zeros((), dtype=integer, device=score.device)
    for top in range(bits, 0, -DIGIT):
        shift, width = max(0, top - DIGIT), min(DIGIT, top)
        digit = (key >> shift) & ((1 << width) - 1)
        if top == bits:
            digit = digit ^ (1 << (width - 1))  # the sign bit: negative first
        counts = torch.zeros(1 << width, dtype=torch.int64, device=score.device)
        upto = add(counts.scatter_add_(0, digit.long(), open_.long())).cumsum(0)
        rank = rank.minimum(upto[-1])
        bin_ = torch.searchsorted(upto, rank[None])[0]
        rank = rank - torch.where(bin_ > 0, upto.take((bin_ - 1).clamp_min(0)), 0)
        open_ = open_ & (digit == bin_)
        chosen = bin_ ^ (1 << (width - 1)) if top == bits else bin_
        found = found | (chosen.to(integer) << shift)
    back = found ^ ((found >> (bits - 1)) & torch.iinfo(integer).max)
    return back.view(score.dtype)


@torch.no_grad()
def quantile(score: Tensor, valid: Tensor, share: float, add: Reduce = alone) -> Tensor:
    """The bar that exactly floor(share * n) of the n valid, finite scores do not exceed (scores distinct).

    Args:
        score, valid: same shape; invalid and non-finite scores do not count.
        share: in [0, 1]. add: see `order_statistic`.
    Returns:
        A scalar tensor; -inf when floor(share * n) is 0, so that a strict comparison keeps everything.
    """
    below = (add((valid & score.isfinite()).sum()).double() * share + 1e-9).floor().long()
    return torch.where(below > 0, order_statistic(score, valid, below, add), -torch.inf)


@torch.no_grad()
def class_maxima(score: Tensor, label: Tensor, valid: Tensor, n_classes: int) -> Tensor:
    """max_K: the highest valid, finite score among the pixels of each class; -inf for a class that has none.

    Ranks combine by elementwise maximum, so K numbers travel instead of a batch of logits.
    """
    usable = valid & score.isfinite()
    lowest = torch.full((n_classes,), -torch.inf, dtype=score.dtype, device=score.device)
    return lowest.scatter_reduce(0, label.flatten(), torch.where(usable, score, -torch.inf).flatten(), "amax")


class ClassMax:
    """CorrMatch's bar: a slow average of the mean, over the classes present, of each class's highest confidence.

    tau <- m tau + (1 - m) mean_k max_k, updated before it is used; classes without a valid pixel do not count, and
    without any valid pixel tau stays. One scalar for all classes.
    """

    def __init__(self, n_classes: int, start: float = 0.85, momentum: float = 0.999) -> None:
        self.n, self.momentum = n_classes, momentum
        self.tau = torch.tensor(start, dtype=torch.float64)  # 0.85 must be met by 17 of 20

    def state_dict(self) -> dict[str, Tensor]:
        return {"tau": self.tau}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tau = state["tau"]

    @torch.no_grad()
    def value(self, score: Tensor, label: Tensor, valid: Tensor, step: int, ranks: Ranks = ALONE) -> Tensor:
        """Take one batch (each B x H x W) in and return the new bar."""
        best = ranks.highest(class_maxima(score, label, valid, self.n))
        seen = best > -torch.inf
        mean = torch.where(seen, best, 0.0).double().sum() / seen.sum().clamp_min(1)
        self.tau = self.tau.to(mean.device)
        self.tau = torch.where(seen.any(), self.tau.lerp(mean, 1 - self.momentum), self.tau)
        return self.tau


@dataclass(frozen=True)
class Fixed:
    """The same bar at every step (FixMatch's 0.95)."""

    bar: float

    def value(self, score: Tensor, label: Tensor, valid: Tensor, step: int, ranks: Ranks = ALONE) -> Tensor:
        return torch.full((), self.bar, dtype=score.dtype, device=score.device)


@dataclass(frozen=True)
class Partition:
    """Dynamic partition adjustment: the bar is the alpha-quantile of this batch's scores; alpha falls with the step.

    `every` is 1 to change alpha each step, or the steps of an epoch to change it once per epoch.
    The state is a pure function of the step, so a resumed run needs nothing but the step.
    """

    start: float
    end: float
    total: int
    every: int = 1

    def alpha(self, step: int) -> float:
        return alpha(math.floor(step / self.every) * self.every, self.total, self.start, self.end)

    def value(self, score: Tensor, label: Tensor, valid: Tensor, step: int, ranks: Ranks = ALONE) -> Tensor:
        return quantile(score, valid, self.alpha(step), ranks.add)
