"""Douglas-Peucker for very many lines at once: all lines' next splits are found together, so it needs no recursion.

Neighbours stay neighbours: a line is simplified the same from either end (ties go by the point, not by the order), so
two pieces that share a border, each with its own direction, get the same border back and leave no gap.
What Douglas-Peucker does not promise: borders that are nearer to each other than twice the tolerance may come to touch
or cross. `simplified_rings` simplifies the polygons where they do
less, or not at all.
"""

import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger("marginalia")

ROUNDS = 100  # of splitting; what is then left unsplit keeps its points, so a hostile shape costs time in proportion
FINEST = 0.5  # pixels; with less, all points of a staircase stay


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


@dataclass(frozen=True)
class ClosedLines:
    """Rings as closed lines, one after another: points (x, y), which of them stay, and where each ring begins."""

    point_N2: NDArray[np.int64]
    fixed: NDArray[np.bool_]
    start: NDArray[np.int64]


def twice_areas(point_N2: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.int64]:
    """Twice the signed area of each closed ring (shoelace): positive for outlines, negative for holes."""
    x, y = point_N2.T
    part = np.append(x[:-1] * y[1:] - x[1:] * y[:-1], 0)
    part[start[1:] - 1] = 0  # from one ring's end to the next one's beginning
    areas: NDArray[np.int64] = np.add.reduceat(part, start)
    return areas


def simplified_rings(
    lines: ClosedLines, outline: NDArray[np.bool_], piece: NDArray[np.int64], tolerance: float
) -> list[NDArray[np.int64] | None]:
    """Each ring's points; None for a ring that has no area left, or is turned inside out.

    Args:
        outline: which rings are outlines; the others are holes.
        piece: for each ring the outline of its polygon, for an outline itself.
        tolerance: pixels; with 0, or without shapely, every ring stays as it is.
    """
    shapely = shapely_or_none() if tolerance > 0 else None
    if shapely is None:
        return list(np.split(lines.point_N2, lines.start[1:]))

    corner = lines.point_N2[:, 0] << 32 | lines.point_N2[:, 1]
    ring = np.repeat(np.arange(len(lines.start)), np.diff(lines.start, append=len(corner)))
    keep = simplify(lines.point_N2, lines.fixed, tolerance)
    while True:
        kept = np.add.reduceat(keep.astype(np.int64), lines.start)
        point_N2, start = lines.point_N2[keep], np.cumsum(kept) - kept
        area = twice_areas(point_N2, start)
        sound = ((area > 0) == outline) & (area != 0)
        crossing = _crossing(shapely, point_N2, np.repeat(np.arange(len(start)), kept), sound & sound[piece], piece)
        if not crossing.size:
            shapes = np.split(point_N2, start[1:])
            return [shape if good else None for shape, good in zip(shapes, sound.tolist(), strict=True)]

        # Half the tolerance for those, and for their neighbours along the same borders, so that they still share them;
        # in the end their exact rings, which do not cross.
        tolerance = tolerance / 2 if tolerance > FINEST else 0.0
        finer = simplify(lines.point_N2, lines.fixed, tolerance) if tolerance else np.ones_like(keep)
        keep |= finer & np.isin(corner, corner[np.isin(piece[ring], crossing)])


def _crossing(
    shapely: ModuleType,
    point_N2: NDArray[np.int64],
    ring_N: NDArray[np.int64],
    used: NDArray[np.bool_],
    piece: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The outlines of those polygons that are not valid, of the rings that are `used`."""
    within = used[ring_N]
    number = np.cumsum(used) - 1
    linear = shapely.linearrings(point_N2[within].astype(np.float64), indices=number[ring_N[within]])

    rings = np.flatnonzero(used)
    order = np.lexsort((rings != piece[rings], piece[rings]))  # by polygon, its outline first
    pieces, polygon = np.unique(piece[rings][order], return_inverse=True)
    polygons = shapely.polygons(linear[order], indices=polygon)
    invalid: NDArray[np.int64] = pieces[~shapely.is_valid(polygons)]
    return invalid


@cache
def shapely_or_none() -> ModuleType | None:
    """The library, or None and one line in the log where it is not installed."""
    try:
        import shapely
    except ImportError:
        _log.warning("polygons keep their exact borders: simplifying needs shapely; pip install 'marginalia-seg[geo]'")
        return None
    module: ModuleType = shapely
    return module
