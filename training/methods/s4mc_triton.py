"""S4MC's selection quantities from teacher logits in one kernel: softmax, neighbour maximum, union, top-two margins.

Same quantities as `refine.scores` on masked probabilities (paper preset and its kin), written as three planes. The tensor
form moves every class plane through memory over 50 times; here logits are read once (plus a thin halo) and no tensor with
a class axis is written. Triton is optional, imported on first use; without it, or off CUDA, the tensor form runs.
"""

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from training.methods import s4mc as refine
from training.methods.s4mc import Refinement

tl: Any = None  # triton.language once imported; Triton looks the kernel's names up among this module's globals

ROWS = 16  # rows a program finishes; it reads two more
MAX_CLASSES = 256  # a program holds all classes of its pixels in registers
_broken = False  # a launch failed in this process (say, no C compiler): do not try again


@functools.cache
def _kernel() -> Any:
    """The kernel, or None where Triton is absent."""
    global tl
    try:
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    except ImportError:
        return None

    # Strides are not specialised: Triton would spread the classes of channels_last logits over a warp's lanes, and every
    # reduction over classes would become five shuffles. A thread keeps its pixel's classes; the L1 cache serves them.
    @triton.jit(do_not_specialize=["H", "W", "s_b", "s_k", "s_y", "s_x", "v_b", "v_y", "v_x"])  # type: ignore[untyped-decorator]
    def s4mc(  # type: ignore[no-untyped-def]  # Triton's own language: its arguments have no types of Python's
        logits, valid, raw, refined, label, H, W, beta, s_b, s_k, s_y, s_x, v_b, v_y, v_x,
        K: tl.constexpr, DIAGONAL: tl.constexpr, KP: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        # A program walks down a strip P pixels wide with three rows in flight: `above` (row y - 2, as neighbours),
        # `centre` and `sides` (row y - 1, the one being finished) and row y, just read. Blocks are (KP classes, P pixels);
        # classes K to KP have probability 0, and so has everything outside the image.
        # GPU maxima skip NaN, so `*_nan` (0 or NaN per pixel) carries it to where the tensor form would.
        b = tl.program_id(2).to(tl.int64)
        k = tl.arange(0, KP)[:, None]
        x = tl.program_id(0) * P + tl.arange(0, P)
        y0 = tl.program_id(1) * ROWS
        logits_K = logits + b * s_b + k.to(tl.int64) * s_k
        centre = tl.zeros([KP, P], tl.float32)
        sides = tl.zeros([KP, P], tl.float32)
        above = tl.zeros([KP, P], tl.float32)
        centre_nan = tl.zeros([P], tl.float32)
        sides_nan = tl.zeros([P], tl.float32)
        above_nan = tl.zeros([P], tl.float32)
        for step in range(ROWS + 2):
            y = tl.full([P], step - 1, tl.int32) + y0
            new_sides = tl.zeros([KP, P], tl.float32)
            new_sides_nan = tl.zeros([P], tl.float32)
            for dx in tl.static_range(-1, 2):
                column = x + dx
                inside = (column >= 0) & (column < W) & (y >= 0) & (y < H)
                row_64, column_64 = y.to(tl.int64), column.to(tl.int64)
                at = (row_64 * s_y + column_64 * s_x)[None, :]
                logit = tl.load(logits_K + at, mask=inside[None, :] & (k < K), other=-float("inf")).to(tl.float32)
                seen = tl.load(valid + b * v_b + row_64 * v_y + column_64 * v_x, mask=inside, other=0).to(tl.float32)
                e = tl.exp(logit - tl.where(inside, tl.max(logit, 0), 0.0)[None, :])
                scale = seen / tl.where(inside, tl.sum(e, 0), 1.0)
                if dx == 0:
                    new_centre = e * scale[None, :]
                    new_centre_nan = 0.0 * scale
                else:
                    new_sides = tl.maximum(new_sides, e * scale[None, :])
                    new_sides_nan += 0.0 * scale
            if DIAGONAL:
                below = tl.maximum(new_centre, new_sides)
                below_nan = new_centre_nan + new_sides_nan
            else:
                below = new_centre
                below_nan = new_centre_nan
            n = tl.maximum(tl.maximum(above, sides), below)
            union = centre + beta * (n - centre * n)
            # Top two with ties: the lowest class that attains the maximum is set aside, the maximum of the rest is second.
            first = tl.max(centre, 0)
            best = tl.min(tl.where(centre == first[None, :], k, KP), 0)
            second = tl.max(tl.where(k == best[None, :], 0.0, centre), 0)
            first_u = tl.max(union, 0)
            best_u = tl.min(tl.where(union == first_u[None, :], k, KP), 0)
            second_u = tl.max(tl.where(k == best_u[None, :], 0.0, union), 0)
            # y - 1 is finished now; the strip's first two rows only fill the registers.
            done = (x < W) & (y > y0) & (y <= H)
            out = (b * H + (y - 1)) * W + x
            tl.store(raw + out, first - second + centre_nan, mask=done)
            tl.store(refined + out, first_u - second_u + centre_nan + sides_nan + above_nan + below_nan, mask=done)
            tl.store(label + out, tl.where(centre_nan == 0.0, best, 0).to(tl.int64), mask=done)
            if DIAGONAL:
                above = tl.maximum(centre, sides)
                above_nan = centre_nan + sides_nan
            else:
                above = centre
                above_nan = centre_nan
            centre = new_centre
            sides = new_sides
            centre_nan = new_centre_nan
            sides_nan = new_sides_nan

    return s4mc


def available(logits_BKHW: Tensor) -> bool:
    """Whether the kernel can run on this tensor's device: CUDA (or ROCm), Triton importable, no launch failed before."""
    return logits_BKHW.is_cuda and not _broken and _kernel() is not None


def supported(logits_BKHW: Tensor, valid_BHW: Tensor, how: Refinement) -> bool:
    """Whether the kernel computes what `how` asks for, on inputs of these shapes, types and devices."""
    return (
        (how.quantity, how.joint, how.score, how.label_from, how.k) == ("classes", "independent", "margin", "raw", 1)
        and how.neighbourhood in (4, 8)
        and how.beta != "decay"
        and logits_BKHW.numel() > 0
        and logits_BKHW.shape[1] <= MAX_CLASSES
        and logits_BKHW.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and valid_BHW.dtype == torch.bool
        and valid_BHW.device == logits_BKHW.device
        and valid_BHW.shape == logits_BKHW[:, 0].shape
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@torch.no_grad()
def launch(logits_BKHW: Tensor, valid_BHW: Tensor, how: Refinement) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel itself; arguments and results as `scores`, for inputs that are `supported`. Queued, never waited for."""
    n_images, classes, height, width = logits_BKHW.shape
    raw_BHW, refined_BHW = (
        torch.empty(valid_BHW.shape, dtype=torch.float32, device=logits_BKHW.device) for _ in range(2)
    )
    label_BHW = torch.empty(valid_BHW.shape, dtype=torch.int64, device=logits_BKHW.device)
    padded = _power_of_two(max(2, classes))
    if padded <= 32:  # a thread holds all classes of one pixel: reductions over classes stay inside it
        strip = min(128, max(32, _power_of_two(width)))
        warps = strip // 32
    else:  # 16 classes per thread; more spill registers
        strip = max(16, 2048 // padded)
        warps = padded * strip // 512
    grid = (-(-width // strip), -(-height // ROWS), n_images)
    with torch.cuda.device_of(logits_BKHW):
        _kernel()[grid](
            logits_BKHW, valid_BHW.view(torch.uint8), raw_BHW, refined_BHW, label_BHW,
            height, width, float(how.beta), *logits_BKHW.stride(), *valid_BHW.stride(),
            K=classes, DIAGONAL=how.neighbourhood == 8, KP=padded, P=strip, ROWS=ROWS, num_warps=warps,
        )  # fmt: skip
    return raw_BHW, refined_BHW, label_BHW


@torch.no_grad()
def scores(
    logits_BKHW: Tensor, valid_BHW: Tensor, how: Refinement, table_K: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw score, refined score and pseudo-label of teacher logits; pixels that are not valid support nothing.

    The same as `refine.scores(logits.float().softmax(1) * valid, how, table_K)`, by the kernel where it can be. The two
    differ by rounding (1e-6); labels only where the two largest probabilities do not differ by more than that.
    NaN at a pixel makes its score, and its neighbours' refined score, NaN, and its label 0, in either form.

    Args:
        logits_BKHW: any floating type and strides; not modified.
        valid_BHW: bool, False outside the photograph.
        table_K: class table for `how.joint == "table"` (always the tensor form).
    Returns:
        raw_BHW and refined_BHW float32 in [0, 1], label_BHW int64 (lowest class among equals).
    """
    global _broken
    if supported(logits_BKHW, valid_BHW, how) and available(logits_BKHW):
        try:
            return launch(logits_BKHW, valid_BHW, how)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton builds on the user's machine: no C compiler, no headers, an unknown card...
            _broken = True
            warnings.warn(f"the fused S4MC kernel cannot run, its slower equal does: {error!r}", stacklevel=2)
    prob = logits_BKHW.float().softmax(1) * valid_BHW[:, None]
    return refine.scores(prob, how, table_K)
