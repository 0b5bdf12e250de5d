"""Shapes against slow loops over pixel centres."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.formats.common import rasterize
from pipeline.imaging import decode


def inside(x: float, y: float, ring: np.ndarray) -> bool:
    """Even-odd: crossings of the ray to the left of (x, y); a crossing at x itself counts."""
    odd = False
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if (y0 <= y) != (y1 <= y):
            odd ^= x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
    return odd


def slow(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.array([[inside(c + 0.5, r + 0.5, ring) for c in range(width)] for r in range(height)])


@pytest.mark.parametrize("seed", range(12))
def test_a_random_ring_is_filled_as_by_the_slow_loop(seed: int) -> None:
    """Also rings that cross themselves, lie partly outside, and have corners exactly on centres."""
    rng = np.random.default_rng(seed)
    ring = rng.uniform(-6, 26, (rng.integers(3, 12), 2))
    if seed % 3 == 0:
        ring = np.round(ring * 2) / 2
    np.testing.assert_array_equal(rasterize.fill([ring], 17, 21), slow(ring, 17, 21))


def test_shapes_that_share_a_border_neither_overlap_nor_leave_a_gap() -> None:
    left, right = [(0, 0), (7.5, 0), (3.5, 9), (0, 9)], [(7.5, 0), (12, 0), (12, 9), (3.5, 9)]
    count_HW = sum(rasterize.fill([np.array(p, float)], 9, 12).astype(int) for p in (left, right))
    assert (count_HW == 1).all()


def test_a_ring_within_a_ring_is_a_hole() -> None:
    outer, inner = np.array([(0, 0), (8, 0), (8, 8), (0, 8.0)]), np.array([(2, 2), (5, 2), (5, 5), (2, 5.0)])
    holed_HW = rasterize.fill([outer, inner], 8, 8)
    assert holed_HW.sum() == 64 - 9
    assert not holed_HW[2:5, 2:5].any()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_a_part_of_an_image_is_filled_with_the_same_bits_as_the_whole(seed: int) -> None:
    """Coordinates of two decimals, as tools write them, lie on the centres now and then: shifted ones round otherwise."""
    rng = np.random.default_rng(seed)
    ring = np.round(rng.uniform((90, 500), (110, 530), (6, 2)), int(rng.integers(1, 3)))
    whole_HW = rasterize.fill([ring], 560, 140)
    np.testing.assert_array_equal(rasterize.fill([ring], 35, 25, (497, 88)), whole_HW[497:532, 88:113])


def test_what_is_no_area_or_lies_outside_fills_nothing() -> None:
    for ring in ([(1, 1), (5, 1), (3, 1)], [(-9, 1), (-2, 1), (-5, 6)], [(1, 20), (5, 20), (3, 26)]):
        assert not rasterize.fill([np.array(ring, float)], 8, 9).any()
    assert not rasterize.fill([], 8, 9).any()


def test_a_ring_wound_300_times_counts_modulo_2() -> None:
    square = [(1, 1), (6, 1), (6, 6), (1, 6)]
    assert not rasterize.fill([np.array(square * 300, float)], 8, 8).any()
    assert rasterize.fill([np.array(square * 301, float)], 8, 8).sum() == 25


def test_box_and_disc() -> None:
    box_HW = rasterize.box(6, 5, 2, 1, 8, 9)
    assert box_HW[1:5, 2:6].all()
    assert box_HW.sum() == 16
    slow_HW = np.array([[np.hypot(c + 0.5 - 4, r + 0.5 - 3) <= 2.5 for c in range(9)] for r in range(8)])
    np.testing.assert_array_equal(rasterize.disc(4, 3, 2.5, 8, 9), slow_HW)


def test_flat_and_paired_points_are_the_same() -> None:
    np.testing.assert_array_equal(rasterize.ring([1, 2, 3, 4, 5, 7]), rasterize.ring([[1, 2], (3, 4), [5, 7.0]]))


@pytest.mark.parametrize(
    "points",
    [
        [], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [[0, 0], [1, 1]], [0, 0, 4, 0, float("nan"), 4], [[0, 0], [1, 1], [2]],
        [0, 0, 4, 0, float("inf"), 4], [0, 0, 4, 0, 1e30, 4], ["a", "b", "c", "d", "e", "f"], None, 5, {"x": 1},
        [[0, 0], [1, 10**400], [3, 4]],
    ],
)  # fmt: skip
def test_what_is_no_polygon_is_refused(points: object) -> None:
    with pytest.raises(decode.Refused) as caught:
        rasterize.ring(points)
    assert caught.value.code == "bad-polygon"
