"""pipeline.imaging.polygonize and pipeline.imaging.simplify against slow loops: filling, flooding, recursion."""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pipeline.imaging import polygonize
from pipeline.imaging import simplify as simplify_module
from pipeline.imaging.decode import Refused
from pipeline.imaging.simplify import simplify
from tests.support.synthetic_masks import fill, regions

MAPS = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.sampled_from([0, 1, 2, 255])
)


def pieces(label_HW: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(id, mask) of each 4-connected piece by flooding, by id, then by the first pixel."""
    left = {tuple(at) for at in np.argwhere(label_HW != 255).tolist()}
    found = []
    while left:
        first = min(left)
        wave, mask = [first], np.zeros(label_HW.shape, bool)
        left.discard(first)
        while wave:
            y, x = wave.pop()
            mask[y, x] = True
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left and label_HW[near] == label_HW[y, x]:
                    left.discard(near)
                    wave.append(near)
        found.append((int(label_HW[first]), mask))
    return sorted(found, key=lambda piece: piece[0])


@given(MAPS)
@settings(max_examples=300, deadline=None)
def test_unsimplified_polygons_are_the_pieces_of_the_map(label_HW: np.ndarray) -> None:
    confidence_HW = (np.arange(label_HW.size) * 37 % 256).astype(np.uint8).reshape(label_HW.shape)
    found = polygonize.trace(label_HW, confidence_HW=confidence_HW)
    for polygon, (label, mask) in zip(found, pieces(label_HW), strict=True):
        assert polygon.label == label
        np.testing.assert_array_equal(fill(polygon.rings, *label_HW.shape), mask)
        assert polygon.pixels == mask.sum()
        assert polygon.confidence == pytest.approx(confidence_HW[mask].mean() / 255)
        for number, ring in enumerate(polygon.rings):
            assert ring[0].tolist() == ring[-1].tolist()
            assert len({tuple(point) for point in ring.tolist()}) == len(ring) - 1 >= 4
            x, y = ring.T
            assert ((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0) == (number == 0)
            np.testing.assert_array_equal(
                fill(polygon.rings[number:][:1], *label_HW.shape) & mask, mask * (number == 0)
            )


def test_bands_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    label_HW = regions(61, 47, 5, seed=1)
    whole = polygonize.trace(label_HW)
    for rows in (1, 2, 7, 61, 62):
        monkeypatch.setattr(polygonize, "_BAND", rows)
        for one, other in zip(whole, polygonize.trace(label_HW), strict=True):
            assert (one.label, [r.tolist() for r in one.rings]) == (other.label, [r.tolist() for r in other.rings])


def away(point: Sequence[int], start: Sequence[int], end: Sequence[int]) -> float:
    """Distance of a point to a segment."""
    p, a, b = (np.array(q, float) for q in (point, start, end))
    length2 = float((b - a) @ (b - a))
    share = min(1.0, max(0.0, float((p - a) @ (b - a)) / length2)) if length2 else 0.0
    return float(np.hypot(*(p - a - share * (b - a))))


def recursive(points: list[list[int]], tolerance: float) -> list[list[int]]:
    """Douglas and Peucker's algorithm (1973) as it is usually written down."""
    if len(points) < 3:
        return points
    distances = [away(point, points[0], points[-1]) for point in points[1:-1]]
    if max(distances) <= tolerance:
        return [points[0], points[-1]]
    split = 1 + int(np.argmax(distances))
    return recursive(points[: split + 1], tolerance)[:-1] + recursive(points[split:], tolerance)


@pytest.mark.parametrize("tolerance", [0.0, 30.0, 300.0])
def test_simplify_is_douglas_peucker(tolerance: float) -> None:
    rng = np.random.default_rng(5)
    lines = [rng.integers(0, 4000, (n, 2)) for n in (2, 3, 4, 17, 200)]  # so wide apart that no two are equally far
    lines[3][-1] = lines[3][0]  # a closed one
    fixed = np.concatenate([np.isin(np.arange(len(line)), (0, len(line) - 1)) for line in lines])
    keep = simplify(np.concatenate(lines), fixed, tolerance)
    want = [point for line in lines for point in recursive(line.tolist(), tolerance)]
    assert np.concatenate(lines)[keep].tolist() == want


def test_simplify_stops_splitting_and_then_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile shape may not cost squared time; what is kept is never further off than was asked for."""
    angle = np.linspace(0, 3, 400)
    spiral = np.stack([1e5 + np.exp(angle) * 900 * np.cos(angle), 1e5 + np.exp(angle) * 900 * np.sin(angle)], axis=1)
    line, fixed = spiral.astype(np.int64), np.isin(np.arange(400), (0, 399))
    usual = simplify(line, fixed, 1.0)
    monkeypatch.setattr("pipeline.imaging.simplify.ROUNDS", 2)
    early = simplify(line, fixed, 1.0)
    assert usual.sum() < early.sum() == 400


@given(st.integers(0, 10_000), st.sampled_from([0.8, 1.0, 2.5]))
@example(2244, 2.5)
@example(3, 1.0)
@settings(max_examples=40, deadline=None)
def test_simplified_neighbours_keep_one_border(seed: int, tolerance: float) -> None:
    """Each step of a border is there as often in one direction as in the other: no gap, no overlap. (Twice where a piece
    is so thin that both its sides become one line.) Only an edge from frame to frame may have one side: the image's end."""
    label_HW = regions(40, 55, 4, seed=seed)
    steps, frame = Counter[tuple[int, int, int, int]](), set()
    for polygon in polygonize.trace(label_HW, tolerance=tolerance):
        for ring in polygon.rings:
            for (x0, y0), (x1, y1) in itertools.pairwise(ring.tolist()):
                parts = math.gcd(x1 - x0, y1 - y0)  # two collinear edges on one side may be one edge on the other
                dx, dy = (x1 - x0) // parts, (y1 - y0) // parts
                these = [(x0 + i * dx, y0 + i * dy, dx, dy) for i in range(parts)]
                steps.update(these)
                if all(x in (0, 55) or y in (0, 40) for x, y in ((x0, y0), (x1, y1))):
                    frame.update(these)
    inside = [step for step in steps if step not in frame]
    assert len(inside) > 20
    for x, y, dx, dy in inside:
        assert steps[x + dx, y + dy, -dx, -dy] == steps[x, y, dx, dy]


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 4.0])
def test_no_border_moves_further_than_the_tolerance(tolerance: float) -> None:
    pytest.importorskip("shapely")
    label_HW = regions(70, 90, 3, seed=3)
    exact = polygonize.trace(label_HW)
    simpler = polygonize.trace(label_HW, tolerance=tolerance)
    assert 0 < sum(len(r) for p in simpler for r in p.rings) < sum(len(r) for p in exact for r in p.rings)
    for polygon in simpler:
        kept = polygon.rings[0].tolist()
        same = [p.rings[0].tolist() for p in exact if (p.label, p.pixels) == (polygon.label, polygon.pixels)]
        full = next(ring for ring in same if ring[0] == kept[0] and all(point in ring for point in kept))
        at, bounds = 0, [0]
        for point in kept[1:-1]:
            at = full.index(point, at + 1)
            bounds.append(at)
        bounds.append(len(full) - 1)
        for start, end in itertools.pairwise(bounds):
            assert max(away(p, full[start], full[end]) for p in full[start : end + 1]) <= tolerance + 1e-9


def invalid(label_HW: np.ndarray, tolerance: float) -> tuple[int, int]:
    """How many polygons there are, and how many of them are not valid."""
    shapely = pytest.importorskip("shapely")
    made = [shapely.Polygon(p.rings[0], p.rings[1:]) for p in polygonize.trace(label_HW, tolerance=tolerance)]
    return len(made), int((~shapely.is_valid(made)).sum())


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0, 7.0])
def test_polygons_are_valid_however_much_they_are_simplified(tolerance: float) -> None:
    for seed in range(12):
        label_HW = regions(60, 80, 6, seed=seed)
        speckled = np.where(np.random.default_rng(seed).random(label_HW.shape) < 0.1, 9, label_HW).astype(np.uint8)
        for map_HW in (label_HW, speckled):
            found, wrong = invalid(map_HW, tolerance)
            assert found > 5
            assert wrong == 0


def test_polygons_of_street_scenes_are_valid(shared_data: Path) -> None:
    """18 masks of CamVid, of whose polygons some cross themselves by Douglas and Peucker's algorithm alone."""
    masks = sorted((shared_data / "camvid/masks").glob("*.png"))[::39]
    found = [invalid(np.asarray(Image.open(mask)), tolerance=2.0) for mask in masks]
    assert len(found) == 18
    assert sum(n for n, _ in found) > 1000
    assert sum(wrong for _, wrong in found) == 0


def test_without_shapely_polygons_are_exact_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "shapely", None)  # as where it is not installed
    simplify_module.shapely_or_none.cache_clear()
    label_HW = regions(40, 55, 4, seed=1)
    exact = [[ring.tolist() for ring in p.rings] for p in polygonize.trace(label_HW)]
    for _ in range(2):
        assert [[ring.tolist() for ring in p.rings] for p in polygonize.trace(label_HW, tolerance=2.0)] == exact
    simplify_module.shapely_or_none.cache_clear()
    assert [record.getMessage().count("marginalia-seg[geo]") for record in caplog.records] == [1]


def test_what_collapses_is_dropped() -> None:
    pytest.importorskip("shapely")
    label_HW = np.zeros((20, 20), np.uint8)
    label_HW[3, 3], label_HW[10:15, 10:15] = 1, 1
    one = [p for p in polygonize.trace(label_HW, tolerance=1.0) if p.label == 1]
    assert [p.pixels for p in one] == [25]
    assert len(polygonize.trace(label_HW, tolerance=1.0)[0].rings) == 2  # the hole of the single pixel went with it
    assert [p.pixels for p in polygonize.trace(label_HW) if p.label == 1] == [1, 25]


def test_bounds_and_wrong_maps() -> None:
    noise = np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
    with pytest.raises(Refused, match="more than 1000 points") as caught:
        polygonize.trace(noise, max_points=1000)
    assert caught.value.code == "too-detailed"
    assert polygonize.trace(np.full((3, 4), 255, np.uint8)) == []
    assert [p.pixels for p in polygonize.trace(np.full((3, 4), 255, np.uint8), ignore=7)] == [12]
    for wrong in (np.zeros((2, 2, 1), np.uint8), np.zeros((0, 3), np.uint8), np.zeros((2, 2), np.int64)):
        with pytest.raises(ValueError, match="uint8 H x W"):
            polygonize.trace(wrong)
    with pytest.raises(ValueError, match="confidence"):
        polygonize.trace(noise, confidence_HW=noise[1:])
