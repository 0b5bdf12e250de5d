"""The input policy: how an image of any size reaches the network and how the answer comes back.

Training's data set, evaluation, parity and serving all call these functions: there is no second resize rule to drift.
Forth: scale down (never up) to the longer side, keep the aspect, pad right and bottom to the network's stride.
Back: crop, nearest.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Ids = TypeVar("Ids", np.uint8, np.uint16)


@dataclass(frozen=True)
class Fit:
    """Sizes in pixels: as given, after scaling down, after padding to the stride."""

    height: int
    width: int
    scaled_height: int
    scaled_width: int
    padded_height: int
    padded_width: int


def plan(height: int, width: int, *, long_side: int, stride: int) -> Fit:
    """Sizes for an image of `height` x `width` (each >= 1).

    The longer side becomes at most `long_side`, the other keeps the aspect (rounded half up, at least 1);
    integer arithmetic, so every machine agrees.
    """
    if min(height, width, long_side, stride) < 1:
        raise ValueError(f"sizes must be positive: {height=} {width=} {long_side=} {stride=}")
    longer = max(height, width)
    if longer > long_side:
        scaled = [max(1, (2 * side * long_side + longer) // (2 * longer)) for side in (height, width)]
    else:
        scaled = [height, width]
    padded = [-(-side // stride) * stride for side in scaled]
    return Fit(height, width, scaled[0], scaled[1], padded[0], padded[1])


def apply(image_HWC: NDArray[np.uint8], fit: Fit) -> NDArray[np.uint8]:
    """uint8 H x W x 3 -> uint8 padded_height x padded_width x 3: antialiased bilinear, edges repeated as padding."""
    _check(image_HWC.shape[:2], (fit.height, fit.width), "image")
    if (fit.scaled_height, fit.scaled_width) != (fit.height, fit.width):
        resized = Image.fromarray(image_HWC).resize((fit.scaled_width, fit.scaled_height), Image.Resampling.BILINEAR)
        image_HWC = np.asarray(resized)
    bottom, right = fit.padded_height - fit.scaled_height, fit.padded_width - fit.scaled_width
    if bottom or right:
        return np.pad(image_HWC, ((0, bottom), (0, right), (0, 0)), mode="edge")
    return np.ascontiguousarray(image_HWC)


def apply_mask(mask_HW: NDArray[Ids], fit: Fit, ignore: int = 255) -> NDArray[Ids]:
    """Class ids H x W -> padded_height x padded_width: nearest, padding filled with `ignore`."""
    _check(mask_HW.shape, (fit.height, fit.width), "mask")
    scaled = nearest(mask_HW, fit.scaled_height, fit.scaled_width)
    padded = np.full((fit.padded_height, fit.padded_width), ignore, dtype=mask_HW.dtype)
    padded[: fit.scaled_height, : fit.scaled_width] = scaled
    return padded


def restore(answer_hw: NDArray[Ids], fit: Fit) -> NDArray[Ids]:
    """padded_height x padded_width (labels or confidence) -> H x W of the image as it came: crop, then nearest."""
    _check(answer_hw.shape, (fit.padded_height, fit.padded_width), "answer")
    return nearest(answer_hw[: fit.scaled_height, : fit.scaled_width], fit.height, fit.width)


def nearest(values_hw: NDArray[Ids], height: int, width: int) -> NDArray[Ids]:
    """h x w -> height x width: the value at the centre of each target pixel."""
    if values_hw.shape == (height, width):
        return np.ascontiguousarray(values_hw)
    rows, columns = places(values_hw.shape[0], height), places(values_hw.shape[1], width)
    return np.ascontiguousarray(values_hw[:, columns][rows])


def places(source: int, target: int) -> NDArray[np.int64]:
    """Where `nearest` looks on an axis: source index = floor((2 i + 1) * source / (2 * target)) for i < target."""
    return (2 * np.arange(target) + 1) * source // (2 * target)


def _check(got: tuple[int, ...], want: tuple[int, int], what: str) -> None:
    if got != want:
        raise ValueError(
            f"{what} is {got[0]} x {got[1]} but the plan is for {want[0]} x {want[1]}: plan it with its own size"
        )
