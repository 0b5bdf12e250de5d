"""CorrMatch: correlation maps between the positions of a feature map, and what they propagate.

Source: Sun et al., "CorrMatch: Label Propagation via Correlation Matching for Semi-Supervised Semantic Segmentation",
CVPR 2024 (arXiv 2306.04300). S_ij = one_i . two_j / sqrt(K) relates position i to position j of the same image; P is its
softmax. P carries logits from position to position (`propagate`), its rows are soft region masks (`masks`, `regions`), and
it tells which positions resemble each other (`nearest`, `nonlocal_union`).

Axes: K classes (also the width of the two embeddings), N = h w grid positions in row-major order, M sampled rows.
Nothing here waits for the device: all decisions stay in tensors.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Bound = float | Tensor  # a number, or a 0-dim tensor that never leaves its device
CHUNK = 16  # full-resolution masks handled at a time: bounds the float copies


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


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _full_precision(value: Tensor) -> torch.autocast:
    """No autocast within: it would run products in half precision, whose sums are neither exact counts nor fine logits."""
    return torch.autocast(value.device.type, enabled=False)


def _blocks(n: int, block: int) -> Iterator[slice]:
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
        with _full_precision(value_BCN):
            for part in _blocks(value_BCN.shape[-1], block):
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
        with _full_precision(value_BCN):  # backward may be called from inside an autocast region
            for part in _blocks(value_BCN.shape[-1], ctx.block):
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
    with _full_precision(one_BKN):
        one, two = _wide(one_BKN), _wide(two_BKN)
        value = value_BKN.detach().to(one.dtype)
        if dense:
            return value @ _scores(one, two).softmax(2 if normalise == "source" else 1)
        query, key = (one, two) if normalise == "source" else (two, one)
        return _Streamed.apply(query, key, value, normalise == "source", block)


def sample(n: int, count: int, generator: torch.Generator, *, reference: bool = False) -> Tensor:
    """`count` positions drawn with replacement, uniform on [0, n - 1]; index_M int64 on the generator's device.

    With `reference` the last position is never drawn (unless it is the only one), as in the published runs.
    """
    return torch.randint(max(1, n - reference), (count,), generator=generator, device=generator.device)


@torch.no_grad()
def rows(one_BKN: Tensor, two_BKN: Tensor, index_M: Tensor) -> Tensor:
    """P_i for the given positions i, the same ones for every image: rows_BMN, each a distribution over positions."""
    with _full_precision(one_BKN):
        one, two = _wide(one_BKN), _wide(two_BKN)
        return _scores(one.index_select(2, index_M.to(one.device, non_blocking=True)), two).softmax(-1)


def upsample(grid_XMhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned, to size (H, W): two products with the axes' weights, in full precision.

    A third of the time of F.interpolate on a CPU for many small maps, forward and backward.
    """
    with _full_precision(grid_XMhw):
        down_Hh, across_Ww = (_weights(n, s, grid_XMhw) for n, s in zip(grid_XMhw.shape[-2:], size, strict=True))
        return down_Hh @ grid_XMhw @ across_Ww.mT


def _weights(n: int, size: int, like: Tensor) -> Tensor:
    """[size, n]: how much of each of n positions every one of `size` positions takes."""
    identity = torch.eye(n, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size, mode="linear", align_corners=True)[0].mT


@torch.no_grad()
def masks(rows_BMN: Tensor, grid: tuple[int, int], size: tuple[int, int], chunk: int = CHUNK) -> Tensor:
    """Where an upsampled row exceeds the middle between its least and largest upsampled value (paper, region masks).

    Args:
        rows_BMN: non-negative weights over positions; any positive scale and offset give the same mask.
        grid: (h, w) with h w = N. size: (H, W) of the masks.
        chunk: rows upsampled at a time; no float tensor is larger than B chunk H W.
    Returns:
        mask_BMHW bool. A constant row has no region: its mask is empty.
    """
    rows_BMN = _wide(rows_BMN)
    # Less its minimum, a constant row is exactly 0 and stays 0; upsampled as it is, rounding would draw a mask of noise.
    rows_BMN = rows_BMN - rows_BMN.amin(-1, keepdim=True)
    out_BMHW = torch.empty(*rows_BMN.shape[:2], *size, dtype=torch.bool, device=rows_BMN.device)
    for part in _blocks(rows_BMN.shape[1], chunk):
        field = upsample(rows_BMN[:, part].unflatten(-1, grid), size)
        # The bounds are those of the upsampled row: it need not hit the grid's own extremes.
        middle = (field.amin((-2, -1), keepdim=True) + field.amax((-2, -1), keepdim=True)) / 2
        torch.gt(field, middle, out=out_BMHW[:, part])
    return out_BMHW


def _verdict(count_K: Tensor, seg: Tensor, area: Tensor, bar: Bound, purity: Bound) -> tuple[Tensor, Tensor, Tensor]:
    """Top class (the lowest of equals), its share of `seg`, and whether the mask is accepted; leading axes are free.

    Float64, so that shares of different counts differ and equal fractions do not (17/20 meets a bar of 0.85).
    """
    top, winner = count_K.max(-1)
    share = top.double() / seg.clamp_min(1)  # 0 without confident pixels, which is above no purity bound
    return winner, share, (seg.double() / area.clamp_min(1) >= bar) & (share > purity)


def _parallel(
    label_BP: Tensor, confident_BP: Tensor, mask_BMP: Tensor, bar: Bound, purity: Bound, n_classes: int
) -> tuple[Tensor, Tensor]:
    batch, n_masks, _ = mask_BMP.shape
    classes = torch.arange(n_classes, device=label_BP.device)
    hit_BKP = (label_BP[:, None] == classes[:, None]) & confident_BP[:, None]
    column_BKP = torch.cat([hit_BKP, confident_BP[:, None], torch.ones_like(confident_BP)[:, None]], 1).float()
    count_BMK = column_BKP.new_empty(batch, n_masks, n_classes + 2)
    with _full_precision(column_BKP):  # float32 sums of zeros and ones are exact up to 2^24 pixels
        for part in _blocks(n_masks, CHUNK):
            count_BMK[:, part] = mask_BMP[:, part].float() @ column_BKP.mT
    seg_BM, area_BM = count_BMK[..., n_classes:].unbind(-1)
    winner_BM, share_BM, accept_BM = _verdict(count_BMK[..., :n_classes], seg_BM, area_BM, bar, purity)
    # Rank 0 wins a contested pixel: larger share first, and the stable sort leaves equal shares in index order.
    order_BM = share_BM.argsort(dim=1, descending=True, stable=True)
    rank_BM = order_BM.argsort(1).short().masked_fill(~accept_BM, n_masks)
    best_BP = torch.full_like(label_BP, n_masks, dtype=torch.int16)
    for part in _blocks(n_masks, CHUNK):
        rank_BmP = torch.where(mask_BMP[:, part], rank_BM[:, part, None], n_masks)
        best_BP = torch.minimum(best_BP, rank_BmP.amin(1))
    by_rank = F.pad(winner_BM.gather(1, order_BM), (0, 1))  # rank n_masks, "no mask", has a place too
    return by_rank.gather(1, best_BP.long()), best_BP < n_masks


def _sequential(
    label_BP: Tensor, confident_BP: Tensor, mask_BMP: Tensor, bar: Bound, purity: Bound, n_classes: int
) -> tuple[Tensor, Tensor]:
    now_BP, taken_BP = label_BP.long().clamp_max(n_classes), torch.zeros_like(confident_BP)  # bin n_classes: no class
    for mask_BP in mask_BMP.unbind(1):
        seg_BP = mask_BP & confident_BP
        count_BK = now_BP.new_zeros(len(now_BP), n_classes + 1).scatter_add_(1, now_BP, seg_BP.long())[:, :n_classes]
        winner_B, _, accept_B = _verdict(count_BK, seg_BP.sum(1), mask_BP.sum(1), bar, purity)
        written_BP = mask_BP & accept_B[:, None]
        now_BP = torch.where(written_BP, winner_B[:, None], now_BP)
        taken_BP = taken_BP | written_BP
    return now_BP, taken_BP


@torch.no_grad()
def regions(
    label_BHW: Tensor,
    confident_BHW: Tensor,
    mask_BMHW: Tensor,
    bar: Bound,
    purity: Bound,
    *,
    mode: Literal["parallel", "sequential"] = "parallel",
    n_classes: int,
) -> tuple[Tensor, Tensor]:
    """Masks that are mostly confident and mostly one class are given to that class whole (paper, region propagation).

    A mask is accepted if some of its pixels are confident, at least `bar` of them are, and the top class among the confident
    ones has more than `purity` of those. "sequential" is the published form: masks in order, each judged on the labels that
    earlier ones left, the last writer wins. "parallel" judges every mask on the labels given; a pixel of several accepted
    masks takes the class of the one with the largest top share, then the lowest index. Images are independent.

    Args:
        label_BHW: class per pixel, int; a value of n_classes or more (ignore) is no class and is only ever overwritten.
        confident_BHW: bool; not recomputed as labels change.
        mask_BMHW: bool; pixels that must not be touched (invalid, mixed in) are already cleared.
        bar, purity: shares in [0, 1], numbers or 0-dim tensors.
    Returns:
        (label_BHW, keep_BHW): new labels, and confident or in an accepted mask. The inputs are not modified.
    Raises:
        ValueError: unknown `mode`.
    """
    if mode not in ("parallel", "sequential"):
        raise ValueError(f'mode must be "parallel" or "sequential", got {mode!r}')
    label_BP, confident_BP = label_BHW.flatten(1), confident_BHW.flatten(1)
    judge = _parallel if mode == "parallel" else _sequential
    new_BP, taken_BP = judge(label_BP, confident_BP, mask_BMHW.flatten(2), bar, purity, n_classes)
    label = torch.where(taken_BP, new_BP.to(label_BP.dtype), label_BP)
    return label.view(label_BHW.shape), (taken_BP | confident_BP).view(label_BHW.shape)


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
    with _full_precision(one_BKN):
        one, two = _wide(one_BKN), _wide(two_BKN)
        lse_BN = torch.cat([_scores(one[..., part], two).logsumexp(-1) for part in _blocks(n, block)], 1)
        found = []
        for part in _blocks(n, block):
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
    prob = _wide(prob_BKHW)
    coarse_BKN = F.interpolate(prob, grid, mode="bilinear", align_corners=True).flatten(2)
    n_BKN = torch.zeros_like(coarse_BKN)
    for index_BN in nearest(one_BKN, two_BKN, k).unbind(1):
        n_BKN = torch.maximum(n_BKN, coarse_BKN.gather(2, index_BN[:, None].expand_as(coarse_BKN)))
    n = F.interpolate(n_BKN.unflatten(-1, grid), prob.shape[-2:], mode="bilinear", align_corners=True)
    return (prob + n * (1 - prob)).clamp_(0, 1)
