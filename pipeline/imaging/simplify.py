"""Douglas-Peucker for very many lines at once: all lines' next splits are found together, so it needs no recursion.

Neighbours stay neighbours: a line is simplified the same from either end (ties go by the point, not by the order), so
two pieces that share a border, each with its own direction, get the same border back and leave no gap.
What is not promised, as with every Douglas-Peucker: borders that are nearer to each other than twice the tolerance may
come to touch or cross.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 100  # of splitting; what is then left unsplit keeps its points, so a hostile shape costs time in proportion


def simplify(point_N2: NDArray[np.int64], fixed: NDArray[np.bool_], tolerance: float) -> NDArray[np.bool_]:
    """Which points to keep, so that none that is left out is further than `tolerance` from the line that replaces it.

    Args:
        point_N2: integer points (x, y), 0..2^31; lines one after another, each from one fixed point to the next.
        fixed: points that stay; the first and the last one must. Two fixed points in a row are no line.
        tolerance: pixels, >= 0; with 0 only points on a straight line between others are left out.
    """
    keep = fixed.copy()
    ends = np.flatnonzero(fixed)
    low, high = ends[:-1], ends[1:]
    for _ in range(ROUNDS):
        inner = high - low > 1
        low, high = low[inner], high[inner]
        if not len(low):
            return keep
        split, distance2 = _furthest(point_N2, low, high)
        far = distance2 > tolerance * tolerance
        low, high, split = low[far], high[far], split[far]
        keep[split] = True
        low, high = np.concatenate([low, split]), np.concatenate([split, high])
    for first, last in zip(low.tolist(), high.tolist(), strict=True):
        keep[first:last] = True
    return keep


def _furthest(
    point_N2: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of each line low..high the inner point furthest from the segment between its ends, and the squared distance."""
    count = high - low - 1
    start = np.cumsum(count) - count
    line = np.repeat(np.arange(len(count)), count)
    inner = np.arange(len(line)) + (low + 1 - start)[line]
    span = point_N2[high] - point_N2[low]
    length2 = (span * span).sum(axis=1)
    away = point_N2[inner] - point_N2[low][line]
    span_x, span_y = span[line, 0], span[line, 1]
    along = away[:, 0] * span_x + away[:, 1] * span_y
    # Exact integers up to here, so that equal distances compare as equal from either end.
    beside = np.abs(away[:, 0] * span_y - away[:, 1] * span_x).astype(np.float64)
    distance2 = beside * beside / np.maximum(length2, 1)[line]
    beyond = along >= length2[line]
    distance2[beyond] = ((away - span[line])[beyond] ** 2).sum(axis=1)
    before = along <= 0
    distance2[before] = (away[before] ** 2).sum(axis=1)
    most = np.maximum.reduceat(distance2, start)
    # Many points of a staircase are equally far: the first would split off one step at a time. A fixed shuffle of the
    # points (Knuth's multiplicative hash) splits it somewhere inside, and at the same point from either end.
    key = ((point_N2[inner, 0] + point_N2[inner, 1] * 65_599) * 2_654_435_761) % (1 << 32) + 1
    key[distance2 < most[line]] = 0
    chosen = np.flatnonzero(key == np.maximum.reduceat(key, start)[line])
    first = np.searchsorted(chosen, start)
    return inner[chosen[first]], most
