"""The difference hash against a slow oracle; the banded index against brute force."""

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.imaging import decode, perceptual_hash
from tests.support import tiny_source


def slow_dhash(image_HWC: np.ndarray) -> tuple[int, int]:
    """(bits, sure): float64 means over the 8 x 9 cells; `sure` marks bits that rounding cannot turn."""
    grey = np.asarray(Image.fromarray(image_HWC).convert("L"), np.float64)
    height, width = grey.shape
    bits = sure = 0
    for row in range(8):
        means = []
        for column in range(9):
            cell = grey[row * height // 8 : (row + 1) * height // 8, column * width // 9 : (column + 1) * width // 9]
            means.append(sum(map(float, cell.ravel())) / cell.size)
        for left, right in pairwise(means):
            bits = bits << 1 | (right > left)
            sure = sure << 1 | (abs(right - left) > 1.5)
    return bits, sure


def test_dhash_equals_the_slow_oracle() -> None:
    for seed in range(30):
        image = tiny_source.picture(seed, 80, 90)
        bits, sure = slow_dhash(image)
        assert sure.bit_count() > 55
        assert (perceptual_hash.dhash(image) ^ bits) & sure == 0


def test_dhash_of_known_gradients() -> None:
    ramp = np.repeat(np.linspace(0, 255, 90).astype(np.uint8)[None, :, None], 80, 0).repeat(3, 2)
    assert perceptual_hash.dhash(ramp) == 2**64 - 1
    assert perceptual_hash.dhash(ramp[:, ::-1].copy()) == 0
    half = np.concatenate([ramp[:40], ramp[:40, ::-1]])
    assert perceptual_hash.dhash(half) == 0xFFFFFFFF_00000000


def test_dhash_survives_resaving_and_scaling_but_not_another_picture() -> None:
    image = tiny_source.picture(1, 240, 320)
    small = np.asarray(Image.fromarray(image).resize((160, 120), Image.Resampling.LANCZOS))
    assert perceptual_hash.distance(perceptual_hash.dhash(image), perceptual_hash.dhash(small)) <= 3
    assert perceptual_hash.distance(perceptual_hash.dhash(image), perceptual_hash.dhash(tiny_source.picture(2))) > 12


HASH = st.integers(0, 2**64 - 1)
FLIPS = st.lists(st.integers(0, 63), max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(HASH, FLIPS), min_size=1, max_size=12), st.integers(0, 16))
def test_index_finds_exactly_what_brute_force_finds(seeds: list[tuple[int, list[int]]], bits: int) -> None:
    values = []
    for value, flips in seeds:
        near = value
        for flip in flips:
            near ^= 1 << flip
        values += [value, near]
    index, added = perceptual_hash.NearIndex(bits), {}
    for n, value in enumerate(values):
        close = {key for key, other in added.items() if (value ^ other).bit_count() <= bits}
        found = index.find(value)
        assert (found is None) == (not close)
        assert found is None or found in close
        added[str(n)] = value
        index.add(value, str(n))


def test_flat_images_are_not_duplicates_of_each_other() -> None:
    index = perceptual_hash.NearIndex(3)
    sky = np.repeat(np.linspace(0, 255, 80).astype(np.uint8)[:, None, None], 90, 1).repeat(3, 2)
    for image in (np.full((20, 20, 3), 9, np.uint8), sky, jpeg(sky)):
        flat = perceptual_hash.dhash(image)
        assert flat is None
        assert index.find(flat) is None
        index.add(flat, "a")


def jpeg(image: np.ndarray) -> np.ndarray:
    return decode.decode(tiny_source.encode(image, "JPEG", quality=80), max_pixels=image.size)


def test_a_picture_lit_from_the_left_has_near_duplicates_like_any_other() -> None:
    lit = np.repeat(np.linspace(220, 60, 180).astype(np.uint8)[None, :, None], 160, 0).repeat(3, 2)
    first, copy = perceptual_hash.dhash(lit), perceptual_hash.dhash(jpeg(lit))
    assert first == 0
    index = perceptual_hash.NearIndex(3)
    index.add(first, "lit")
    assert index.find(copy) == "lit"
    assert index.find(perceptual_hash.dhash(tiny_source.picture(5))) is None
    assert index.find(perceptual_hash.dhash(lit // 40)) == "lit"  # faint, 5 to 1 of 255 grey levels, but not flat


def test_bits_out_of_range_are_refused() -> None:
    for make in (perceptual_hash.NearIndex, lambda bits: perceptual_hash.neighbours([1, 2], bits)):
        for bits in (-1, 64):
            with pytest.raises(ValueError, match="bits"):
                make(bits)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(HASH, FLIPS), max_size=12), st.integers(0, 16))
def test_all_near_pairs_are_those_of_brute_force(seeds: list[tuple[int, list[int]]], bits: int) -> None:
    values: list[int | None] = [None, None]
    for value, flips in seeds:
        near = value
        for flip in flips:
            near ^= 1 << flip
            values += [value, near]
    want = {
        value: sorted({other for other in values if other is not None and (value ^ other).bit_count() <= bits})
        for value in values
        if value is not None
    }
    want = {value: near for value, near in want.items() if len(near) > 1 or values.count(value) > 1}
    assert {value: sorted(near) for value, near in perceptual_hash.neighbours(values, bits).items()} == want


def test_the_closer_look_passes_copies_and_stops_at_an_object() -> None:
    picture = tiny_source.picture(5, 192, 256)
    first = perceptual_hash.thumbnail(picture)
    darker = (picture * 0.7 + 20).astype(np.uint8)
    packed = np.asarray(Image.open(io.BytesIO(tiny_source.encode(picture, "JPEG", quality=40))))
    for copy in (darker, packed, picture[::2, ::2]):
        assert perceptual_hash.same_picture(first, perceptual_hash.thumbnail(np.ascontiguousarray(copy)))

    with_object = picture.copy()
    with_object[80:94, 60:74] = (200, 30, 30)  # 0.4 % of the picture
    assert perceptual_hash.distance(perceptual_hash.dhash(picture), perceptual_hash.dhash(with_object)) <= 3
    assert not perceptual_hash.same_picture(first, perceptual_hash.thumbnail(with_object))
