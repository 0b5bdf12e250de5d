"""Which scores are high enough: a fixed bar, or S4MC's dynamic partition adjustment (a falling quantile)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def alpha(step: int, total: int, start: float = 0.4, end: float = 0.0) -> float:
    """Share of raw scores below the bar: `start` at step 0, linearly to `end` at `total` (paper, DPA)."""
    done = min(max(step / max(1, total), 0.0), 1.0)
    return start + (end - start) * done


@torch.no_grad()
def quantile(score: Tensor, valid: Tensor, share: float) -> Tensor:
    """The bar that exactly floor(share * n) of the n valid, finite scores do not exceed (scores distinct).

    Args:
        score, valid: same shape; invalid and non-finite scores do not count.
        share: in [0, 1].
    Returns:
        A scalar tensor; -inf when floor(share * n) is 0, so that a strict comparison keeps everything.
    The index is taken on the device: no transfer to the host.
    """
    valid = valid & score.isfinite()
    ordered = torch.where(valid, score, torch.inf).flatten().sort().values
    below = (valid.sum(dtype=torch.float64) * share + 1e-9).floor().long()
    picked = ordered.gather(0, (below - 1).clamp_min(0)[None]) if ordered.numel() else ordered.new_zeros(1)
    return torch.where(below > 0, picked[0], -torch.inf)


@torch.no_grad()
def histogram(score: Tensor, valid: Tensor, bins: int = 2048, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Counts of valid scores in equal bins of [low, high]; scores outside are clamped. Ranks sum these counts."""
    usable = valid & score.isfinite()
    inside = torch.where(usable, score.clamp(low, high), torch.full_like(score, low - 1))
    return torch.histc(inside.float(), bins, low, high)


@torch.no_grad()
def histogram_quantile(counts: Tensor, share: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """`quantile` from counts, at most one bin from the exact one; -inf when nothing lies below."""
    total = counts.double().cumsum(0)
    below = (total[-1] * share + 1e-9).floor()
    index = torch.searchsorted(total, below.reshape(1)).clamp_max(counts.numel() - 1)
    edge = low + (index.to(counts) + 0.5) * ((high - low) / counts.numel())
    return torch.where(below > 0, edge[0], -torch.inf)


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
