"""pipeline.imaging.resize against fractions, slow loops and Pillow."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.imaging import resize

RNG = np.random.default_rng(11)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1024), st.integers(1, 64))
def test_plan_against_exact_fractions(height: int, width: int, long_side: int, stride: int) -> None:
    found = resize.plan(height, width, long_side=long_side, stride=stride)
    scale = min(Fraction(1), Fraction(long_side, max(height, width)))
    want = [max(1, int(side * scale + Fraction(1, 2))) for side in (height, width)]
    assert [found.scaled_height, found.scaled_width] == want
    assert max(want) == min(long_side, max(height, width))
    for scaled, padded in ((want[0], found.padded_height), (want[1], found.padded_width)):
        assert padded % stride == 0
        assert 0 <= padded - scaled < stride


def test_plan_refuses_nothingness() -> None:
    for sizes in ((0, 5), (5, 0), (-1, 5)):
        with pytest.raises(ValueError, match="positive"):
            resize.plan(*sizes, long_side=8, stride=2)


def test_apply_pads_right_and_bottom_with_the_edge() -> None:
    image = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    plan = resize.plan(5, 7, long_side=64, stride=8)
    found = resize.apply(image, plan)
    assert found.shape == (8, 8, 3)
    for y in range(8):
        for x in range(8):
            assert found[y, x].tolist() == image[min(y, 4), min(x, 6)].tolist()


def test_apply_scales_like_antialiased_bilinear() -> None:
    image = RNG.integers(0, 256, (90, 61, 3), dtype=np.uint8)
    plan = resize.plan(90, 61, long_side=30, stride=1)
    want = np.asarray(Image.fromarray(image).resize((20, 30), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize.apply(image, plan), want)
    # Antialiasing: a fine checkerboard becomes grey, not one of its two colours.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None].repeat(3, 2)
    small = resize.apply(board, resize.plan(64, 64, long_side=16, stride=1))
    assert np.abs(small[1:-1, 1:-1].astype(int) - 127).max() <= 3


def nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    out = np.zeros((height, width), values.dtype)
    for y in range(height):
        for x in range(width):
            row = int((y + Fraction(1, 2)) * Fraction(values.shape[0], height))
            column = int((x + Fraction(1, 2)) * Fraction(values.shape[1], width))
            out[y, x] = values[row, column]
    return out


@pytest.mark.parametrize(
    ("height", "width", "long_side"), [(37, 23, 16), (23, 37, 16), (9, 9, 64), (40, 1, 7), (50, 49, 49)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_and_answers_against_slow_loops(height: int, width: int, long_side: int, dtype: type) -> None:
    plan = resize.plan(height, width, long_side=long_side, stride=4)
    mask = RNG.integers(0, 9, (height, width)).astype(dtype)
    there = resize.apply_mask(mask, plan, ignore=77)
    inner = there[: plan.scaled_height, : plan.scaled_width]
    np.testing.assert_array_equal(inner, nearest(mask, plan.scaled_height, plan.scaled_width))
    outside = np.ones(there.shape, bool)
    outside[: plan.scaled_height, : plan.scaled_width] = False
    assert (there[outside] == 77).all()
    assert there.dtype == dtype
    back = resize.restore(there, plan)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, nearest(inner, height, width))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 17))
def test_nothing_is_lost_where_nothing_is_scaled(height: int, width: int, stride: int) -> None:
    plan = resize.plan(height, width, long_side=60, stride=stride)
    mask = np.random.default_rng(height * 61 + width).integers(0, 200, (height, width), dtype=np.uint8)
    np.testing.assert_array_equal(resize.restore(resize.apply_mask(mask, plan), plan), mask)
    image = mask[:, :, None].repeat(3, 2)
    np.testing.assert_array_equal(resize.apply(image, plan)[:height, :width], image)


def test_wrong_sizes_are_named() -> None:
    plan = resize.plan(10, 12, long_side=64, stride=8)
    with pytest.raises(ValueError, match="image is 12 x 10 but the plan is for 10 x 12"):
        resize.apply(np.zeros((12, 10, 3), np.uint8), plan)
    with pytest.raises(ValueError, match="mask"):
        resize.apply_mask(np.zeros((9, 12), np.uint8), plan)
    with pytest.raises(ValueError, match="answer"):
        resize.restore(np.zeros((10, 12), np.uint8), plan)
