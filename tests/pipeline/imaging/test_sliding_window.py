"""sliding_window: seams of a pixelwise model vanish, votes against a loop over windows and pixels, rows regrouped."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.imaging import sliding_window

RNG = np.random.default_rng(11)


def cut(image: np.ndarray, heights: list[int]) -> list[np.ndarray]:
    """The image in bands of the heights, again and again."""
    bands, top = [], 0
    while top < len(image):
        height = heights[len(bands) % len(heights)]
        bands.append(image[top : top + height])
        top += height
    return bands


def pixelwise(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return window.argmax(axis=2).astype(np.uint8), window.max(axis=2)


def of_the_window(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every window has another class and uneven confidence."""
    label = np.full(window.shape[:2], window[0, 0, 0] % 7, np.uint8)
    return label, (window[..., 1] // 2 + window[0, 0, 1] // 3).astype(np.uint8)


def blended(image: np.ndarray, run, window: int, overlap: int, heights: list[int]) -> tuple[np.ndarray, np.ndarray]:
    plan = sliding_window.grid(*image.shape[:2], window=window, overlap=overlap)
    labels, confidences = zip(*sliding_window.blend(cut(image, heights), plan, run, overlap=overlap), strict=True)
    return np.concatenate(labels), np.concatenate(confidences)


def by_loop(image: np.ndarray, run, window: int, overlap: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = image.shape[:2]
    best = np.full((height, width), -1.0)
    label, confidence = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    for top in sliding_window.starts(height, window, overlap):
        for left in sliding_window.starts(width, window, overlap):
            bottom, right = min(top + window, height), min(left + window, width)
            labels, confidences = run(image[top:bottom, left:right])
            for y in range(top, bottom):
                for x in range(left, right):
                    near = 1.0
                    for at, begin, end, length in ((y, top, bottom, height), (x, left, right, width)):
                        edges = [overlap + 1]
                        edges += [at - begin + 1] if begin > 0 else []
                        edges += [end - at] if end < length else []
                        near *= min(edges) / (overlap + 1)
                    vote = near * confidences[y - top, x - left]
                    if vote > best[y, x] + 1e-6:
                        best[y, x] = vote
                        label[y, x], confidence[y, x] = labels[y - top, x - left], confidences[y - top, x - left]
    return label, confidence


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_windows_cover_the_axis_with_the_overlap(length: int, window: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    found = sliding_window.starts(length, window, overlap)
    assert found[0] == 0
    assert found[-1] == max(0, length - window)
    assert all(a + window - b >= overlap and b > a for a, b in itertools.pairwise(found))
    if len(found) > 1:  # one fewer could not do it
        assert (len(found) - 1) * (window - overlap) + overlap < length


@pytest.mark.parametrize("overlap", [0, 1, 5, 8])
def test_a_pixelwise_model_has_no_seams(overlap: int) -> None:
    """Sizes below, at and above the window, and all offsets that its last window can have."""
    for height in (1, 11, 12, 13, 17, 24, 25, 31):
        for width in range(10, 37):
            image = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
            got = blended(image, pixelwise, 12, overlap, [3, 1, 7])
            for ours, whole in zip(got, pixelwise(image), strict=True):
                np.testing.assert_array_equal(ours, whole)


@pytest.mark.parametrize(("height", "width"), [(30, 41), (12, 40), (40, 9), (25, 25)])
@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_votes_are_those_of_the_slow_loop(height: int, width: int, overlap: int) -> None:
    image = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    got, want = blended(image, of_the_window, 12, overlap, [5]), by_loop(image, of_the_window, 12, overlap)
    for ours, loops in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, loops)


def test_equal_confidence_changes_hands_in_the_middle_of_the_overlap() -> None:
    """Two windows, 0..12 and 8..20: columns 8..9 go to the left one, 10..11 to the right one."""
    image = np.zeros((4, 20, 3), np.uint8)
    image[:, 8:, 0] = 1
    label, _ = blended(
        image, lambda w: (np.full(w.shape[:2], w[0, 0, 0]), np.full(w.shape[:2], 9, np.uint8)), 12, 4, [4]
    )
    np.testing.assert_array_equal(label, np.repeat([[0] * 10 + [1] * 10], 4, axis=0))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 60), st.integers(1, 20))
def test_rows_regrouped(heights: list[int], length: int, window: int) -> None:
    image = np.arange(length, dtype=np.uint8).reshape(length, 1, 1)
    window = min(window, length)
    tops = sliding_window.starts(length, window, window // 2)
    got = [rows.copy() for rows in sliding_window.regrouped(cut(image, heights), tops, window)]
    for top, rows in zip(tops, got, strict=True):
        np.testing.assert_array_equal(rows, image[top : top + window])


def test_bands_that_end_early_are_an_error() -> None:
    with pytest.raises(ValueError, match="end at row 7, before row 10"):
        list(sliding_window.regrouped([np.zeros((7, 2, 3), np.uint8)], (0,), 10))
    with pytest.raises(ValueError, match="does not fit"):
        sliding_window.starts(10, 4, 4)
