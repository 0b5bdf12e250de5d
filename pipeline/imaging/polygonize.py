"""Label maps as polygons with holes, traced exactly along the pixels' borders, then simplified to a tolerance.

A point (x, y) is a corner of pixels: (0, 0) is the image's top left corner, and the pixel in row i and column j covers
j <= x <= j + 1, i <= y <= i + 1. Unsimplified, the pixels inside a class's polygons are that class's pixels, all of them
and no others. A polygon is one 4-connected piece: pieces that meet only at a corner are two polygons, and a ring
never passes one point twice (it is cut there into an outline and a hole that touch).

Simplified, pieces that meet still share one border, without gap or overlap: points where three meet stay, and between
them a border becomes the same line seen from either side. A piece whose rings would cross themselves or each other is
simplified less, so that every polygon is valid (OGC Simple Features); that check needs shapely, of the extra `geo`, and
without it nothing is simplified. A piece thinner than the tolerance may turn inside out: it is dropped, and a sliver
of its size is nobody's, or two pieces'.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.decode import Refused
from pipeline.imaging.simplify import ClosedLines, simplified_rings, twice_areas

IGNORE = 255
MAX_POINTS = 1_000_000  # before simplification: 512 x 512 pixels of pure noise have about that many
_BAND = 1024  # rows looked at together, for memory

Array = NDArray[np.int64]
Flags = NDArray[np.bool_]

# Around a point lie four pixels, clockwise: up-left a, up-right b, down-right c, down-left d. A ring has its piece on
# the right, so outlines go clockwise on the screen. Directions: 0 right, 1 down, 2 left, 3 up. (comes, goes) by kind:
_CONVEX = [(1, 2), (2, 3), (3, 0), (0, 1)]  # the piece holds a (b, c, d) and neither pixel beside it
_REFLEX = [(0, 3), (1, 0), (2, 1), (3, 2)]  # it holds all but a (b, c, d)
_PASSING = [(2, 2), (3, 3), (0, 0), (1, 1)]  # it holds ab (bc, cd, da) and two other pieces meet there: no corner of it
_COMES, _GOES = np.array(_CONVEX + _REFLEX + _PASSING, dtype=np.int64).T


@dataclass(frozen=True)
class Polygon:
    """One piece of one class.

    `rings`: n x 2 points (x, y), the first and last the same, n >= 4; the outline first, then its holes. By the
    shoelace formula on (x, y) an outline's area is positive and a hole's negative.
    `pixels` is the exact area before simplification, `confidence` the mean over those pixels, 0..1 (None: not asked).
    """

    label: int
    rings: tuple[Array, ...]
    pixels: int
    confidence: float | None


def trace(
    label_HW: NDArray[np.uint8],
    *,
    tolerance: float = 0.0,
    confidence_HW: NDArray[np.uint8] | None = None,
    ignore: int = IGNORE,
    max_points: int = MAX_POINTS,
) -> list[Polygon]:
    """Every 4-connected piece of every id but `ignore`, by id, then from top to bottom.

    `tolerance` in pixels, 0 for the exact borders: see `pipeline.imaging.simplify`. A ring that collapses is dropped, with its
    holes where it is an outline. `confidence_HW`: uint8, 0..255 = 0..1.

    Raises:
        Refused: "too-detailed", when the borders have more than `max_points` points before simplification.
        ValueError: no uint8 map of two axes with at least one pixel, or a confidence of another size.
    """
    if label_HW.ndim != 2 or 0 in label_HW.shape or label_HW.dtype != np.uint8:
        raise ValueError(f"a label map is uint8 H x W with at least one pixel, got {label_HW.dtype} {label_HW.shape}")
    if confidence_HW is not None and confidence_HW.shape != label_HW.shape:
        raise ValueError(f"the label map is {label_HW.shape} but the confidence is {confidence_HW.shape}")
    corners = _find(label_HW, ignore, max_points)
    if not len(corners.x):
        return []

    # Each run of pixels belongs to the ring on its left, and that ring to a piece.
    rings = _rings(corners)
    start, length = _runs(label_HW)
    counted = np.flatnonzero(label_HW.ravel()[start] != ignore)
    beside = _left_of(corners, rings, *np.divmod(start[counted], label_HW.shape[1]))
    lines = _closed(corners, rings)
    outline = twice_areas(lines.point_N2, lines.start) > 0
    pixel = np.maximum(corners.y[rings.top] - 1, 0) * label_HW.shape[1] + corners.x[rings.top]
    piece = _pieces(outline, beside[np.searchsorted(start[counted], pixel, "right") - 1])

    owner, most = piece[beside], len(piece)
    pixels = np.bincount(owner, weights=length[counted], minlength=most)
    means = None
    if confidence_HW is not None:
        sums = np.add.reduceat(confidence_HW.ravel(), start, dtype=np.int64)[counted]
        means = np.bincount(owner, weights=sums, minlength=most) / np.maximum(pixels, 1) / 255

    shapes = simplified_rings(lines, outline, piece, tolerance)
    holes: dict[int, list[Array]] = {}
    for ring in np.flatnonzero(~outline).tolist():
        if (shape := shapes[ring]) is not None:
            holes.setdefault(int(piece[ring]), []).append(shape)

    label = corners.label[rings.top]
    found = []
    for ring in np.lexsort((rings.top, label)).tolist():
        if outline[ring] and (shape := shapes[ring]) is not None:
            mean = None if means is None else float(means[ring])
            found.append(Polygon(int(label[ring]), (shape, *holes.get(ring, ())), int(pixels[ring]), mean))
    return found


@dataclass(frozen=True)
class _Corners:
    """Where rings turn, or pass a point where three pieces meet: one entry for each piece, points in raster order.

    `vertex` numbers the points, `meeting` says that three or more pieces meet there (or two crosswise).
    """

    x: Array
    y: Array
    vertex: Array
    label: NDArray[np.uint8]
    kind: Array
    meeting: Flags


def _find(label_HW: NDArray[np.uint8], ignore: int, max_points: int) -> _Corners:
    height, width = label_HW.shape
    bands, total = [], 0
    for top in range(0, height + 1, _BAND):
        bottom = min(
            top + _BAND, height + 1
        )  # points of the rows top .. bottom - 1, between the pixels of top - 1 .. bottom
        pixels = np.full((bottom - top + 1, width + 2), ignore, np.uint8)
        pixels[int(top == 0) : height - top + 1, 1:-1] = label_HW[max(top - 1, 0) : bottom]
        across, down = pixels[:, 1:] == pixels[:, :-1], pixels[1:] == pixels[:-1]
        plain = (across[:-1] & across[1:]) | (down[:, :-1] & down[:, 1:])  # inside a piece, or a straight border
        y, x = np.divmod(np.flatnonzero(~plain), width + 1)
        quad = np.stack([pixels[y, x], pixels[y, x + 1], pixels[y + 1, x + 1], pixels[y + 1, x]], axis=1)
        point, kind, meeting = _kinds(quad, ignore)
        holder = np.where(kind < 4, kind, np.where(kind < 8, kind + 1, kind)) % 4
        bands.append((x[point], y[point] + top, quad[point, holder], kind, meeting))
        total += len(kind)
        if total > max_points:
            raise Refused(
                "too-detailed",
                f"the classes' borders have more than {max_points} points; ask for fewer classes, a smaller size or the mask",
            )
    x, y = (np.concatenate([band[i] for band in bands]) for i in (0, 1))
    label, kind, meeting = (np.concatenate([band[i] for band in bands]) for i in (2, 3, 4))
    return _Corners(x, y, y * (width + 1) + x, label, kind, meeting)


def _kinds(quad: NDArray[np.uint8], ignore: int) -> tuple[Array, Array, Flags]:
    """(point, kind, meeting) of each corner at points that are not plain; `quad` n x 4 is their pixels a, b, c, d."""
    real = quad != ignore
    same = [quad[:, i] == quad[:, (i + 1) % 4] for i in range(4)]  # a = b, b = c, c = d, d = a
    kinds = np.empty((len(quad), 12), np.bool_)
    for i in range(4):
        before, here, after, opposite = same[i - 1], same[i], same[(i + 1) % 4], same[(i + 2) % 4]
        kinds[:, i] = real[:, i] & ~before & ~here
        kinds[:, 4 + i] = real[:, (i + 1) % 4] & after & opposite
        kinds[:, 8 + i] = real[:, i] & here & ~before & ~after & ~opposite
    point, kind = np.nonzero(kinds)
    lone = sum(part.astype(np.int8) for part in same) == 2  # one pixel against three
    return point, kind, ~np.asarray(lone)[point]


@dataclass(frozen=True)
class _Rings:
    """Corners in the order of their rings, where each ring starts, the ring of each corner, each ring's top left one."""

    order: Array
    start: Array
    ring: Array
    top: Array


def _rings(corners: _Corners) -> _Rings:
    rings = _cycles(corners, following := _links(corners))
    # A ring may pass one point twice (two of its pixels meet crosswise): then it is cut into two. Such points of a ring
    # nest like brackets, because a ring does not cross itself, so all can be cut at once.
    pairs = [
        np.flatnonzero((corners.vertex[n:] == corners.vertex[:-n]) & (corners.label[n:] == corners.label[:-n]))
        for n in (1, 2)
    ]
    first, second = np.concatenate(pairs), np.concatenate([pairs[0] + 1, pairs[1] + 2])
    own = rings.ring[first] == rings.ring[second]
    if not own.any():
        return rings
    first, second = first[own], second[own]
    following[first], following[second] = following[second], following[first]
    return _cycles(corners, following)


def _links(corners: _Corners) -> Array:
    """Each corner's successor. Along one line and in one direction the stretches of border never overlap: in order, the
    i-th corner that one leaves belongs to the i-th that one reaches."""
    following = np.empty(len(corners.x), np.int64)
    comes, goes = _COMES[corners.kind], _GOES[corners.kind]
    down = np.lexsort((corners.y, corners.x))
    for direction, order in enumerate((np.arange(len(down)), down) * 2):
        following[order[goes[order] == direction]] = order[comes[order] == direction]
    return following


def _cycles(corners: _Corners, following: Array) -> _Rings:
    """Rings begin where pieces meet, if they do, else at the top left: the same point seen from either side.

    A plain loop over lists: a step takes about 0.1 us, pointer doubling over arrays takes more.
    """
    successor = following.tolist()
    order: list[int] = []
    starts: list[int] = []
    for corner in [*np.flatnonzero(corners.meeting).tolist(), *range(len(successor))]:
        if (after := successor[corner]) < 0:
            continue
        starts.append(len(order))
        while after >= 0:
            order.append(corner)
            successor[corner] = -1
            corner = after
            after = successor[corner]
    turn, start = np.array(order, np.int64), np.array(starts, np.int64)
    ring = np.empty(len(order), np.int64)
    ring[turn] = np.repeat(np.arange(len(starts)), np.diff(start, append=len(order)))
    return _Rings(turn, start, ring, np.minimum.reduceat(turn, start))


def _runs(label_HW: NDArray[np.uint8]) -> tuple[Array, Array]:
    """Runs of one id along rows, in raster order: index of the first pixel, and length."""
    change = np.ones(label_HW.shape, np.bool_)
    np.not_equal(label_HW[:, 1:], label_HW[:, :-1], out=change[:, 1:])
    start = np.flatnonzero(change)
    return start, np.diff(start, append=label_HW.size)


def _left_of(corners: _Corners, rings: _Rings, row: Array, column: Array) -> Array:
    """The ring along the left side of pixels that begin a run: of the stretches going up, the one that spans it."""
    tops = np.flatnonzero(_COMES[corners.kind] == 3)
    tops = tops[np.lexsort((corners.y[tops], corners.x[tops]))]
    line = int(corners.y.max()) + 1
    key = corners.x[tops] * line + corners.y[tops]
    return rings.ring[tops[np.searchsorted(key, column * line + row, "right") - 1]]


def _pieces(outline: Flags, left: Array) -> Array:
    """The outline of each ring's piece: itself, or for a hole that of the piece around it.

    `left` is of use for holes: a hole's top left corner lies below a pixel of that piece, and `left` is the ring on the
    left of that pixel's run. It is the outline, or another hole that begins higher; so following it ends at the outline.
    """
    piece = np.where(outline, np.arange(len(outline)), left)
    while not np.array_equal(piece, further := piece[piece]):
        piece = further
    return piece


def _closed(corners: _Corners, rings: _Rings) -> ClosedLines:
    length = np.diff(rings.start, append=len(rings.order)) + 1
    start = np.cumsum(length) - length
    order = np.insert(rings.order, np.append(rings.start[1:], len(rings.order)), rings.order[rings.start])
    fixed = corners.meeting[order]
    fixed[start] = fixed[start + length - 1] = True
    return ClosedLines(np.stack([corners.x[order], corners.y[order]], axis=1), fixed, start)
