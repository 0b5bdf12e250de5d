"""CorrMatch: rows of the correlation map as region masks, and pseudo-labels that spread over whole regions.

Source: Sun et al., CVPR 2024 (arXiv 2306.04300), region masks and region propagation; the map itself is in `correlate`.
Axes: N = h w grid positions, M masks an image, P = H W pixels. Nothing here waits for the device.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from training.methods import corrmatch

Bound = float | Tensor  # a number, or a 0-dim tensor that never leaves its device
CHUNK = 16  # full-resolution masks handled at a time: bounds the float copies


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
    rows_BMN = corrmatch.wide(rows_BMN)
    # Less its minimum, a constant row is exactly 0 and stays 0; upsampled as it is, rounding would draw a mask of noise.
    rows_BMN = rows_BMN - rows_BMN.amin(-1, keepdim=True)
    out_BMHW = torch.empty(*rows_BMN.shape[:2], *size, dtype=torch.bool, device=rows_BMN.device)
    for part in corrmatch.blocks(rows_BMN.shape[1], chunk):
        field = corrmatch.upsample(rows_BMN[:, part].unflatten(-1, grid), size)
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
    with corrmatch.full_precision(column_BKP):  # float32 sums of zeros and ones are exact up to 2^24 pixels
        for part in corrmatch.blocks(n_masks, CHUNK):
            count_BMK[:, part] = mask_BMP[:, part].float() @ column_BKP.mT
    seg_BM, area_BM = count_BMK[..., n_classes:].unbind(-1)
    winner_BM, share_BM, accept_BM = _verdict(count_BMK[..., :n_classes], seg_BM, area_BM, bar, purity)
    # Rank 0 wins a contested pixel: larger share first, and the stable sort leaves equal shares in index order.
    order_BM = share_BM.argsort(dim=1, descending=True, stable=True)
    rank_BM = order_BM.argsort(1).short().masked_fill(~accept_BM, n_masks)
    best_BP = torch.full_like(label_BP, n_masks, dtype=torch.int16)
    for part in corrmatch.blocks(n_masks, CHUNK):
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
def propagate(
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
