"""Polygons, boxes and discs -> pixels, by one exact rule: a pixel belongs to a shape when its centre lies inside.

Coordinates are pixels from the image's upper left corner, x right, y down: the pixel in row r and column c covers
[c, c + 1) x [r, r + 1), its centre is (c + 0.5, r + 0.5). "Inside" is the even-odd rule for a ring that crosses itself.
A centre on the border belongs to the shape on its right (or below), so shapes that share a border neither overlap nor
leave a gap. The tools' own fills differ from this by pixels on the outline: Pillow's and labelme's also take every
pixel that the outline touches, pycocotools rounds the outline to a fifth of a pixel first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging import decode

Mask_HW = NDArray[np.bool_]
MAX_POINTS = 1_000_000
MAX_CROSSINGS = 1 << 22  # of one ring with the rows' centre lines: 2 a row for a plain shape, and 64 bytes each
FAR = 1e7  # pixels: no image is this large, and beyond it float64 arithmetic on crossings loses sense


def ring(points: Any) -> NDArray[np.float64]:
    """[[x, y], ...] or [x0, y0, x1, y1, ...] -> N x 2 float64, at least 3 points.

    Raises:
        images.Refused("bad-polygon"): fewer than 3 points, an odd count, NaN, infinity, beyond `FAR`, or no numbers.
    """
    try:
        flat = [points] if points and not isinstance(points[0], list | tuple) else points
        values = np.array(flat, dtype=np.float64).reshape(-1) if len(points) <= 2 * MAX_POINTS else None
    except (TypeError, ValueError, OverflowError, KeyError, IndexError) as error:
        raise decode.Refused("bad-polygon", "a polygon is a list of x and y numbers; draw it again") from error
    if values is None or len(values) > 2 * MAX_POINTS:
        raise decode.Refused("bad-polygon", f"a polygon of more than {MAX_POINTS} points; simplify it")
    if len(values) % 2 or len(values) < 6:
        raise decode.Refused("bad-polygon", f"a polygon of {len(values) / 2:g} points; it needs 3 or more")
    if not np.isfinite(values).all() or np.abs(values).max() > FAR:
        raise decode.Refused("bad-polygon", "a polygon has a coordinate that is NaN, infinite or far outside")
    return values.reshape(-1, 2)


def fill(rings: Sequence[NDArray[np.float64]], height: int, width: int, origin: tuple[int, int] = (0, 0)) -> Mask_HW:
    """Rings (N x 2 float64 of x, y; closed by themselves) -> H x W, True where a centre is inside by even-odd.

    All rings count together, so a ring inside another is a hole. Parts outside the image are cut off.

    Args:
        origin: row and column of the image that the first pixel is, to fill a part of it with the same bits.

    Raises:
        images.Refused("bad-polygon"): a ring crosses the rows more than `MAX_CROSSINGS` times, which no drawn one does.
    """
    filled_HW = np.zeros((height, width), np.bool_)
    flat = filled_HW.reshape(-1)
    places = [
        rows * width + columns for rows, columns in (_crossings(points, height, width, origin) for points in rings)
    ]
    # Each ring crosses a row an even number of times, so in order the crossings are begins and ends of what is inside.
    for begin, end in np.sort(np.concatenate([*places, np.empty(0, np.intp)])).reshape(-1, 2).tolist():
        flat[begin:end] = True
    return filled_HW


def _crossings(
    points: NDArray[np.float64], height: int, width: int, origin: tuple[int, int]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where the ring crosses the rows' centre lines: (row, first column whose centre is at or right of it) each.

    Shifted coordinates would round otherwise than the image's, so the arithmetic is in those.
    """
    top, left = origin
    a, b = points, np.roll(points, -1, axis=0)
    upper, lower = np.where(a[:, 1:] <= b[:, 1:], a, b), np.where(a[:, 1:] <= b[:, 1:], b, a)
    first = np.clip(np.ceil(upper[:, 1] - 0.5), top, top + height).astype(np.intp)  # rows with y0 <= r + 0.5 < y1
    counts = np.clip(np.ceil(lower[:, 1] - 0.5), top, top + height).astype(np.intp) - first
    if counts.sum() > MAX_CROSSINGS:
        raise decode.Refused("bad-polygon", f"a polygon whose outline crosses rows {counts.sum()} times; simplify it")
    edge = np.repeat(np.arange(len(points)), counts)
    rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    (x0, y0), (x1, y1) = upper[edge].T, lower[edge].T
    at = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
    return rows - top, np.clip(np.ceil(at - 0.5) - left, 0, width).astype(np.intp)


def box(x0: float, y0: float, x1: float, y1: float, height: int, width: int) -> Mask_HW:
    """Axis-parallel rectangle between two opposite corners."""
    return fill([np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], np.float64)], height, width)


def disc(x: float, y: float, radius: float, height: int, width: int) -> Mask_HW:
    """Pixels whose centre is at most `radius` from (x, y)."""
    dy, dx = np.arange(height) + 0.5 - y, np.arange(width) + 0.5 - x
    inside_HW: Mask_HW = dy[:, None] ** 2 + dx[None] ** 2 <= radius**2
    return inside_HW
