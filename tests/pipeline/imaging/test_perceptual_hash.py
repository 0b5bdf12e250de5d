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


def same(*pictures: np.ndarray) -> list[bool]:
    """Whether each further picture shows the same as the first."""
    gallery = perceptual_hash.Gallery()
    for number, picture in enumerate(pictures):
        gallery.add(str(number), perceptual_hash.thumbnail(np.ascontiguousarray(picture)))
    return gallery.same("0", [str(number) for number in range(1, len(pictures))])


def test_the_closer_look_passes_copies_and_stops_at_an_object() -> None:
    picture = tiny_source.picture(5, 192, 256)
    darker = (picture * 0.7 + 20).astype(np.uint8)
    packed = np.asarray(Image.open(io.BytesIO(tiny_source.encode(picture, "JPEG", quality=40))))
    with_object = picture.copy()
    with_object[80:94, 60:74] = (200, 30, 30)  # 0.4 % of the picture
    recoloured = picture[..., ::-1]

    assert perceptual_hash.distance(perceptual_hash.dhash(picture), perceptual_hash.dhash(with_object)) <= 3
    assert same(picture, darker, packed, picture[::2, ::2], with_object, recoloured) == [True] * 3 + [False] * 2


def test_many_are_compared_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a slow loop of the same rule in float64, over several chunks and grown arrays."""
    monkeypatch.setattr(perceptual_hash, "CHUNK", 7)
    base = tiny_source.picture(5, 48, 64)
    rng = np.random.default_rng(0)
    pictures = [base]
    for n in range(150):
        noisy = base + rng.normal(0, n / 4, base.shape)
        pictures.append(np.clip(noisy, 0, 255).astype(np.uint8))

    def slow(first: np.ndarray, second: np.ndarray, levels: float, share: float) -> bool:
        y, x = (a.astype(np.float64) - a.astype(np.float64).mean(axis=(0, 1)) for a in (first, second))
        gain = (x * y).sum() / max((x * x).sum(), 1e-6)
        return bool(np.abs(y - gain * x).max() <= levels + share * np.sqrt((y * y).mean()))

    first, *others = map(perceptual_hash.thumbnail, pictures)
    expected = [
        slow(first.luma_HW, other.luma_HW, *perceptual_hash.LUMA_TOLERANCE)
        and slow(first.chroma_HWC, other.chroma_HWC, *perceptual_hash.CHROMA_TOLERANCE)
        for other in others
    ]
    assert 10 < sum(expected) < 140
    assert same(*pictures) == expected


def test_a_first_look_at_few_cells_changes_no_answer() -> None:
    """300 pictures of a fixed camera in other light, an object in each, and copies of some: one by one as all at once."""
    rng = np.random.default_rng(4)
    street = np.kron(rng.integers(30, 220, (8, 9)), np.ones((12, 14)))
    gallery = perceptual_hash.Gallery()
    for number in range(300):
        scene = street + rng.normal(0, 1, street.shape)
        y, x = rng.integers(0, 84), rng.integers(0, 114)
        scene[y : y + 12, x : x + 12] = rng.integers(0, 256) if number % 3 else scene[y : y + 12, x : x + 12]
        grey = np.clip(scene * rng.uniform(0.7, 1.1) + rng.uniform(-20, 20), 0, 255).astype(np.uint8)
        gallery.add(str(number), perceptual_hash.thumbnail(np.repeat(grey[:, :, None], 3, axis=2)))
    keys = [str(number) for number in range(300)]
    for key in keys[::5]:
        together = gallery.same(key, keys)
        assert together == [gallery.same(key, [other])[0] for other in keys]
        assert together[int(key)]
    assert 100 < sum(gallery.same("0", keys)) < 300
