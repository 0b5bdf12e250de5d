"""Which scores are high enough: a fixed bar, or S4MC's dynamic partition adjustment (a falling quantile)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def alpha(step: int, total: int, start: float = 0.4, end: float = 0.0) -> float:
    """Share of raw scores below the bar: `start` at step 0, linearly to `end` at `total` (paper, DPA)."""
    done = min(max(step / max(1, total), 0.0), 1.0)
    return start + (end - start) * done


DIGIT = 11  # bits a histogram resolves: 2048 bins


@torch.no_grad()
def quantile(score: Tensor, valid: Tensor, share: float, reduce: Callable[[Tensor], Tensor] = lambda n: n) -> Tensor:
    """The bar that exactly floor(share * n) of the n valid, finite scores do not exceed (scores distinct).

    Radix selection: a histogram of the scores' leading bits tells which bin holds the wanted rank, a histogram inside
    that bin the next bits, and so on (3 histograms for float32). Exact, no sort, nothing leaves the device, and ranks
    need to add up nothing but the counts.

    Args:
        score, valid: same shape, float32 or float64; invalid and non-finite scores do not count.
        share: in [0, 1].
        reduce: adds an int64 tensor up over ranks; every rank calls it the same number of times.
    Returns:
        A scalar tensor; -inf when floor(share * n) is 0, so that a strict comparison keeps everything.
    """
    integer, bits = (torch.int64, 64) if score.dtype == torch.float64 else (torch.int32, 32)
    score = score.to(torch.float64 if bits == 64 else torch.float32).flatten()
    open_ = valid.flatten() & score.isfinite()
    below = (reduce(open_.sum()).double() * share + 1e-9).floor().long()
    raw = (score + 0.0).view(integer)  # + 0.0: minus zero is zero
    # Bit patterns of floats sort like integers once the magnitude of negative ones is flipped.
    key = raw ^ ((raw >> (bits - 1)) & torch.iinfo(integer).max)
    rank, found = below.clamp_min(1), torch.zeros((), dtype=integer, device=score.device)
    for top in range(bits, 0, -DIGIT):
        shift, width = max(0, top - DIGIT), min(DIGIT, top)
        digit = (key >> shift) & ((1 << width) - 1)
        if top == bits:
            digit = digit ^ (1 << (width - 1))  # the sign bit: negative first
        counts = torch.zeros(1 << width, dtype=torch.int64, device=score.device)
        upto = reduce(counts.scatter_add_(0, digit.long(), open_.long())).cumsum(0)
        bin_ = torch.searchsorted(upto, rank[None])[0].clamp_max(len(upto) - 1)
        rank = rank - torch.where(bin_ > 0, upto[(bin_ - 1).clamp_min(0)], 0)
        open_ = open_ & (digit == bin_)
        chosen = bin_ ^ (1 << (width - 1)) if top == bits else bin_
        found = found | (chosen.to(integer) << shift)
    back = found ^ ((found >> (bits - 1)) & torch.iinfo(integer).max)
    return torch.where(below > 0, back.view(score.dtype), -torch.inf)


@dataclass(frozen=True)
class Fixed:
    """The same bar at every step (FixMatch's 0.95)."""

    bar: float

    def value(self, score: Tensor, valid: Tensor, step: int) -> Tensor:
        return torch.tensor(self.bar, dtype=score.dtype, device=score.device)


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

    def value(self, score: Tensor, valid: Tensor, step: int) -> Tensor:
        return quantile(score, valid, self.alpha(step))
