"""An image at its native resolution through a network of bounded size: overlapping windows, blended row by row of windows.

A network answers with a class and a confidence, not with probabilities, so there is no averaging of classes. Where windows
overlap, each votes for its class with confidence * nearness: the product, over both axes, of a ramp that rises from the
window's edge to the end of the overlap. The largest vote wins, the earlier window on a tie, and the pixel keeps that
window's confidence. An edge that is also the image's has no ramp: no other window sees more there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image_HWC = NDArray[np.uint8]
Labels = NDArray[np.uint8]
# uint8 h x w x 3 -> class ids and confidence, each uint8 h x w
Run = Callable[[Image_HWC], tuple[Labels, Labels]]


@dataclass(frozen=True)
class Grid:
    """Where windows lie: tops and lefts in pixels, ascending; the windows' height and width, at most the image's."""

    height: int
    width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    window_height: int
    window_width: int


def starts(length: int, window: int, overlap: int) -> tuple[int, ...]:
    """Starts of the fewest windows of `window` pixels that cover `length` and overlap by at least `overlap`, spread evenly;
    the first is 0, the last ends at `length`. One start where the window is as long as the axis or longer."""
    if not 0 <= overlap < window:
        raise ValueError(f"an overlap of {overlap} does not fit a window of {window}")
    if length <= window:
        return (0,)
    count = -(-(length - window) // (window - overlap)) + 1
    return tuple(i * (length - window) // (count - 1) for i in range(count))


def grid(height: int, width: int, *, window: int, overlap: int) -> Grid:
    """Square windows of `window` pixels, cut to the image's size, for an image of `height` x `width` (each >= 1)."""
    if min(height, width) < 1:
        raise ValueError(f"sizes must be positive: {height=} {width=}")
    tops, lefts = starts(height, window, overlap), starts(width, window, overlap)
    return Grid(height, width, tops, lefts, min(window, height), min(window, width))


def ramp(begin: int, end: int, length: int, overlap: int) -> NDArray[np.float32]:
    """Nearness of the pixels of a window begin..end on an axis of `length`: 1 / (overlap + 1) at an edge inside the image,
    rising by as much each pixel to 1."""
    at = np.arange(begin, end)
    low = np.full(at.shape, overlap + 1) if begin == 0 else at - begin + 1
    high = np.full(at.shape, overlap + 1) if end == length else end - at
    return (np.minimum(np.minimum(low, high), overlap + 1) / (overlap + 1)).astype(np.float32)


def regrouped(bands: Iterable[Image_HWC], tops: tuple[int, ...], height: int) -> Iterator[Image_HWC]:
    """Bands of any heights, from the top -> for each of `tops` the rows top .. top + height, until the next is asked for.

    Holds those rows and a band.

    Raises:
        ValueError: the bands end before the last window does.
    """
    source = iter(bands)
    band = window = np.empty((0, 1, 3), np.uint8)
    come = filled = at = 0  # rows that came before `band`; rows in the window; the row of its first
    for top in tops:
        kept = max(0, at + filled - top)
        if kept:
            window[:kept] = window[filled - kept : filled].copy()
        at, filled = top, kept
        while filled < height:
            first, last = at + filled - come, at + height - come  # rows of the band that are wanted
            if first >= len(band):
                come += len(band)
                fresh = next(source, None)
                if fresh is None:
                    raise ValueError(f"the bands end at row {come}, before row {top + height}")
                band = fresh
                continue
            if len(window) == 0:
                window = np.empty((height, *band.shape[1:]), np.uint8)
            part = band[first:last]
            window[filled : filled + len(part)] = part
            filled += len(part)
        yield window


def blend(bands: Iterable[Image_HWC], plan: Grid, run: Run, *, overlap: int) -> Iterator[tuple[Labels, Labels]]:
    """Bands of the image from the top -> bands of (class ids, confidence), n x width, from the top.

    Memory: a row of windows (its pixels, votes, classes and confidences), whatever the height.
    """
    rows, width = plan.window_height, plan.width
    vote_HW = np.empty((rows, width), np.float32)
    label_HW = np.empty((rows, width), np.uint8)
    confidence_HW = np.empty((rows, width), np.uint8)
    kept = 0  # rows at the top that the windows above have voted on already
    for number, (top, pixels_HWC) in enumerate(zip(plan.tops, regrouped(bands, plan.tops, rows), strict=True)):
        vote_HW[kept:], label_HW[kept:], confidence_HW[kept:] = -1, 0, 0
        down = ramp(top, top + rows, plan.height, overlap)[:, None]
        for left in plan.lefts:
            part = np.s_[:, left : left + plan.window_width]
            labels, confidences = run(np.ascontiguousarray(pixels_HWC[part]))
            across = ramp(left, left + plan.window_width, width, overlap)
            votes = down * across * confidences
            better = votes > vote_HW[part]
            vote_HW[part][better] = votes[better]
            label_HW[part][better] = labels[better]
            confidence_HW[part][better] = confidences[better]
        final = plan.tops[number + 1] - top if number + 1 < len(plan.tops) else rows
        yield label_HW[:final].copy(), confidence_HW[:final].copy()
        kept = rows - final
        for array in (vote_HW, label_HW, confidence_HW):
            array[:kept] = array[final:].copy()
