"""CorrMatch: correlation maps between the positions of a feature map, and what they propagate.

Source: Sun et al., "CorrMatch: Label Propagation via Correlation Matching for Semi-Supervised Semantic Segmentation",
CVPR 2024 (arXiv 2306.04300). S_ij = one_i . two_j / sqrt(K) relates position i to position j of the same image; P is its
softmax. P carries logits from position to position (`propagate`), its rows are soft region masks
(training.methods.corrmatch_regions), and it tells which positions resemble each other (`nearest`, `nonlocal_union`).

Axes: K classes (also the width of the two embeddings), N = h w grid positions in row-major order, M sampled rows.
Nothing here waits for the device: all decisions stay in tensors.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Embeddings(NamedTuple):
    """The head's two embeddings of one view, on the feature grid (h, w) with h w = N."""

    one_BKN: Tensor
    two_BKN: Tensor
    grid: tuple[int, int]


class Head(nn.Module):
    """The two embeddings of every position (paper, correlation module).

    Args:
        channels: channels of the deepest feature map.
        n_classes: K, the width of the embeddings.
        width: channels in between; dropout: share of those channels zeroed in training, the same ones for both embeddings.
    """

    def __init__(self, channels: int, n_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, width, 3, padding=1)
        self.proj = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout2d(dropout))
        self.conv1 = nn.Conv2d(width, n_classes, 1)
        self.conv2 = nn.Conv2d(width, n_classes, 1)

    def forward(self, feature_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (one_BKN, two_BKN)."""
        hidden = self.proj(feature_BChw)
        return self.conv1(hidden).flatten(2), self.conv2(hidden).flatten(2)


def wide(value: Tensor) -> Tensor:
    """float64 as it is, anything else as float32."""
    return value if value.dtype == torch.float64 else value.float()


def full_precision(value: Tensor) -> torch.autocast:
    """No autocast within: it would run products in half precision, whose sums are neither exact counts nor fine logits."""
    return torch.autocast(value.device.type, enabled=False)


def blocks(n: int, block: int) -> Iterator[slice]:
    """range(n) in slices of `block`; the last one may reach beyond n, as slices may."""
    return (slice(start, start + block) for start in range(0, n, block))


def _scores(query_BKn: Tensor, key_BKN: Tensor) -> Tensor:
    """S_BnN = query . key / sqrt(K)."""
    return (query_BKn / math.sqrt(query_BKn.shape[1])).mT @ key_BKN


class _Streamed(torch.autograd.Function):
    """`propagate` without the N x N map: `block` whole softmax rows at a time, made again in the backward pass.

    Both directions are one algorithm: the side that the softmax keeps fixed is the query. Its values are spread over the keys
    ("source"), or it collects the keys' values ("target"). Kept for the backward pass: the inputs only.
    """

    @staticmethod
    def forward(ctx: Any, query_BKN: Tensor, key_BKN: Tensor, value_BCN: Tensor, source: bool, block: int) -> Tensor:
        ctx.save_for_backward(query_BKN, key_BKN, value_BCN)
        ctx.source, ctx.block = source, block
        out_BCN = torch.zeros_like(value_BCN)
        with full_precision(value_BCN):
            for part in blocks(value_BCN.shape[-1], block):
                P_BnN = _scores(query_BKN[..., part], key_BKN).softmax(-1)
                if source:
                    out_BCN.baddbmm_(value_BCN[..., part], P_BnN)
                else:
                    out_BCN[..., part] = value_BCN @ P_BnN.mT
        return out_BCN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCN: Tensor) -> tuple[Tensor | None, ...]:
        query_BKN, key_BKN, value_BCN = ctx.saved_tensors
        # dL/dP = at_query . at_key, with the value on the side it came from and the gradient on the side it went to.
        at_query, at_key = (value_BCN, grad_BCN) if ctx.source else (grad_BCN, value_BCN)
        query_grad, key_grad = torch.empty_like(query_BKN), torch.zeros_like(key_BKN)
        scale = 1 / math.sqrt(query_BKN.shape[1])
        with full_precision(value_BCN):  # backward may be called from inside an autocast region
            for part in blocks(value_BCN.shape[-1], ctx.block):
                query = query_BKN[..., part]
                P_BnN = _scores(query, key_BKN).softmax(-1)
                slope = at_query[..., part].mT @ at_key
                slope.sub_((P_BnN * slope).sum(-1, keepdim=True)).mul_(P_BnN)  # the softmax's own derivative: dL/dS
                query_grad[..., part] = scale * (key_BKN @ slope.mT)
                key_grad.baddbmm_(query, slope, alpha=scale)
        return query_grad, key_grad, None, None, None


def propagate(
    one_BKN: Tensor,
    two_BKN: Tensor,
    value_BKN: Tensor,
    *,
    normalise: Literal["source", "target"] = "source",
    block: int = 256,
    dense: bool = False,
) -> Tensor:
    """Z_j = sum_i value_i P_ij: what every position receives along the correlations (paper, pixel propagation).

    "source" is the published form: each position i hands out its whole value (sum_j P_ij = 1), so sum_j Z_j = sum_i value_i
    but the weights reaching one j can sum to anything. "target" is attention as usual: the weights reaching each j sum to 1.
    Gradients reach `one_BKN` and `two_BKN` only; the value is a constant. Memory is O(N (K + block)) unless `dense`.

    Args:
        one_BKN, two_BKN: embeddings from `Head`, of any floating type.
        value_BKN: what is propagated, logits in the paper; not modified.
        normalise: over which side the softmax runs.
        block: rows of the map that exist at a time.
        dense: keep the whole N x N map instead: faster for small N, and differentiable twice.
    Returns:
        Z_BKN in logits of no fixed scale; float32 (also under autocast), or float64 for float64 embeddings.
    Raises:
        ValueError: unknown `normalise`.
    """
    if normalise not in ("source", "target"):
        raise ValueError(f'normalise must be "source" or "target", got {normalise!r}')
    with full_precision(one_BKN):
        one, two = wide(one_BKN), wide(two_BKN)
        value = value_BKN.detach().to(one.dtype)
        if dense:
            return value @ _scores(one, two).softmax(2 if normalise == "source" else 1)
        query, key = (one, two) if normalise == "source" else (two, one)
        out_BKN: Tensor = _Streamed.apply(query, key, value, normalise == "source", block)  # type: ignore[no-untyped-call]
        return out_BKN


def sample(n: int, count: int, generator: torch.Generator, *, reference: bool = False) -> Tensor:
    """`count` positions drawn with replacement, uniform on [0, n - 1]; index_M int64 on the generator's device.

    With `reference` the last position is never drawn (unless it is the only one), as in the published runs.
    """
    return torch.randint(max(1, n - reference), (count,), generator=generator, device=generator.device)


@torch.no_grad()
def rows(one_BKN: Tensor, two_BKN: Tensor, index_M: Tensor) -> Tensor:
    """P_i for the given positions i, the same ones for every image: rows_BMN, each a distribution over positions."""
    with full_precision(one_BKN):
        one, two = wide(one_BKN), wide(two_BKN)
        return _scores(one.index_select(2, index_M.to(one.device, non_blocking=True)), two).softmax(-1)


def upsample(grid_XMhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned, to size (H, W): two products with the axes' weights, in full precision.

    A third of the time of F.interpolate on a CPU for many small maps, forward and backward.
    """
    with full_precision(grid_XMhw):
        down_Hh, across_Ww = (_weights(n, s, grid_XMhw) for n, s in zip(grid_XMhw.shape[-2:], size, strict=True))
        return down_Hh @ grid_XMhw @ across_Ww.mT


def _weights(n: int, size: int, like: Tensor) -> Tensor:
    """[size, n]: how much of each of n positions every one of `size` positions takes."""
    identity = torch.eye(n, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size, mode="linear", align_corners=True)[0].mT


@torch.no_grad()
def nearest(one_BKN: Tensor, two_BKN: Tensor, k: int, block: int = 256) -> Tensor:
    """For every position j the k other positions i with the largest P_ij (rows of P sum to 1), largest first.

    Args:
        k: 1 to N - 1. block: rows of the map that exist at a time.
    Returns:
        index_BkN int64; which of several equal positions comes first is not defined.
    Raises:
        ValueError: k out of range.
    """
    n = one_BKN.shape[-1]
    if not 1 <= k < n:
        raise ValueError(f"k must be 1 to {n - 1} (the other positions), got {k}")
    with full_precision(one_BKN):
        one, two = wide(one_BKN), wide(two_BKN)
        lse_BN = torch.cat([_scores(one[..., part], two).logsumexp(-1) for part in blocks(n, block)], 1)
        found = []
        for part in blocks(n, block):
            # Row j of the block, column i; logarithms, because far positions' P would underflow and be equal.
            log_P_BnN = _scores(two[..., part], one) - lse_BN[:, None]
            log_P_BnN.diagonal(part.start, 1, 2).fill_(-torch.inf)
            found.append(log_P_BnN.topk(k, -1).indices)
    return torch.cat(found, 1).mT


@torch.no_grad()
def nonlocal_union(prob_BKHW: Tensor, one_BKN: Tensor, two_BKN: Tensor, grid: tuple[int, int], k: int = 4) -> Tensor:
    """S4MC's event union with neighbours by correlation, not by place: p + n - p n, n_c = max of p_c over `nearest`.

    Ours (a combination nobody has published). Neighbours are looked up on the grid; n is upsampled, p is not resampled.

    Args:
        prob_BKHW: class probabilities in [0, 1]; not modified.
        one_BKN, two_BKN: embeddings of the same view. grid: (h, w) with h w = N. k: neighbours per position.
    Returns:
        p~_BKHW in [p, 1], not renormalised; float32, or float64 for float64 input.
    """
    prob = wide(prob_BKHW)
    coarse_BKN = F.interpolate(prob, grid, mode="bilinear", align_corners=True).flatten(2)
    n_BKN = torch.zeros_like(coarse_BKN)
    for index_BN in nearest(one_BKN, two_BKN, k).unbind(1):
        n_BKN = torch.maximum(n_BKN, coarse_BKN.gather(2, index_BN[:, None].expand_as(coarse_BKN)))
    n = F.interpolate(n_BKN.unflatten(-1, grid), prob.shape[-2:], mode="bilinear", align_corners=True)
    return (prob + n * (1 - prob)).clamp_(0, 1)
