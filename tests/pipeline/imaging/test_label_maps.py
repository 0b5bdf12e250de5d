"""label_maps: exact round trips, PNG read by hand, COCO run lengths by a slow loop and pycocotools' strings."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pipeline.imaging import label_maps
from pipeline.imaging.decode import Refused

LIMIT = 10**6
PALETTE = [(10, 20, 30), (40, 50, 60), (70, 80, 90), (1, 2, 3), (200, 0, 100)]


def save(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def code(data: bytes, **options: object) -> str:
    with pytest.raises(Refused) as caught:
        label_maps.decode_mask(data, **({"max_pixels": LIMIT} | options))
    return caught.value.code


def chunks(data: bytes) -> dict[bytes, bytes]:
    found, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(data[at + 4 : at + 8 + length])
        found[data[at + 4 : at + 8]] = body
        at += 12 + length
    return found


shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.uint8, shapes, elements=st.integers(0, 255)), st.sampled_from([2, 16, 17, 256]), st.booleans())
def test_eight_bit_round_trip(label: np.ndarray, ids: int, indexed: bool) -> None:
    label = (label.astype(int) % ids).astype(np.uint8)
    data = label_maps.encode_png(label, PALETTE if indexed else None)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), label)
    found = label_maps.decode_mask(data, max_pixels=LIMIT)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, label)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint16, shapes, elements=st.integers(0, 65535)))
def test_sixteen_bit_round_trip(label: np.ndarray) -> None:
    data = label_maps.encode_png(label)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), label)
    found = label_maps.decode_mask(data, max_pixels=LIMIT)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, label)


def test_palette_is_written_and_255_has_its_own_colour() -> None:
    small = np.array([[0, 1, 4]], np.uint8)
    parts = chunks(label_maps.encode_png(small, PALETTE))
    assert parts[b"IHDR"] == struct.pack(">IIBBBBB", 3, 1, 4, 3, 0, 0, 0)
    assert parts[b"PLTE"] == bytes(sum(PALETTE, ()))
    void = np.array([[0, 255, 4, 7]], np.uint8)
    data = label_maps.encode_png(void, PALETTE)
    assert chunks(data)[b"IHDR"][8] == 8
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert shown[0].tolist() == [[10, 20, 30], list(label_maps.IGNORE_COLOUR), [200, 0, 100], [0, 0, 0]]


def test_rows_are_filtered_up_and_strictly_readable() -> None:
    """The stream as the specification says it: filter byte 2, then differences to the row above, modulo 256."""
    label = np.random.default_rng(1).integers(0, 256, (6, 9), dtype=np.uint8)
    raw = np.frombuffer(zlib.decompress(chunks(label_maps.encode_png(label))[b"IDAT"]), np.uint8).reshape(6, 10)
    assert (raw[:, 0] == 2).all()
    np.testing.assert_array_equal(np.cumsum(raw[:, 1:].astype(int), axis=0) % 256, label)


def test_encode_refuses_what_is_no_label_map() -> None:
    for wrong in (np.zeros((2, 2, 1), np.uint8), np.zeros((0, 3), np.uint8), np.zeros((2, 2), np.int64)):
        with pytest.raises(ValueError, match="label map"):
            label_maps.encode_png(wrong)
    with pytest.raises(ValueError, match="256"):
        label_maps.encode_png(np.zeros((2, 2), np.uint16), PALETTE)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_low_depth_grey_ids_are_as_stored(depth: int) -> None:
    ids = np.arange(16, dtype=np.uint8).reshape(2, 8) % (1 << depth)
    bits = "".join(f"{value:0{depth}b}" for value in ids.ravel())
    packed = int(bits, 2).to_bytes(2 * depth, "big")
    raw = b"".join(b"\x00" + packed[y * depth : (y + 1) * depth] for y in range(2))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 2, depth, 0, 0, 0, 0)), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts
    )
    np.testing.assert_array_equal(label_maps.decode_mask(data, max_pixels=LIMIT), ids)


def test_palette_indices_and_tiff_ids_are_as_stored() -> None:
    ids = np.array([[0, 3, 255], [2, 1, 0]], np.uint8)
    indexed = Image.fromarray(ids, "P")
    indexed.putpalette(list(range(256)) * 3)
    np.testing.assert_array_equal(label_maps.decode_mask(save(indexed), max_pixels=LIMIT), ids)
    np.testing.assert_array_equal(label_maps.decode_mask(save(Image.fromarray(ids), "TIFF"), max_pixels=LIMIT), ids)
    np.testing.assert_array_equal(label_maps.decode_mask(save(Image.fromarray(ids), "BMP"), max_pixels=LIMIT), ids)


def test_colour_masks_need_the_classes_colours() -> None:
    rgb = np.array([[[0, 0, 0], [255, 0, 0]], [[255, 0, 0], [1, 2, 3]]], np.uint8)
    data = save(Image.fromarray(rgb))
    assert code(data) == "rgb-mask"
    table = {(0, 0, 0): 5, (255, 0, 0): 2, (1, 2, 3): 255}
    assert label_maps.decode_mask(data, max_pixels=LIMIT, colours=table).tolist() == [[5, 2], [2, 255]]
    del table[1, 2, 3]
    with pytest.raises(Refused, match=r"1 colours of no class: #010203 \(1 pixels\)") as caught:
        label_maps.decode_mask(data, max_pixels=LIMIT, colours=table)
    assert caught.value.code == "unknown-colour"
    wide = label_maps.decode_mask(data, max_pixels=LIMIT, colours={(0, 0, 0): 300, (255, 0, 0): 2, (1, 2, 3): 1})
    assert wide.dtype == np.uint16


def test_colours_become_ids_as_one_by_one() -> None:
    rng = np.random.default_rng(7)
    colours = {tuple(map(int, c)): n for n, c in enumerate(rng.integers(0, 256, (200, 3)))}
    colours = dict(list(colours.items())[:199]) | {(255, 255, 255): 255, (0, 0, 0): 0}
    listed = list(colours)
    pixels_HWC = np.array(listed, np.uint8)[rng.integers(0, len(listed), (37, 41))]
    expected = [[colours[tuple(map(int, pixel))] for pixel in row] for row in pixels_HWC]
    found_HW = label_maps.from_colours(pixels_HWC, colours)
    assert (found_HW.dtype, found_HW.tolist()) == (np.uint8, expected)


def test_what_is_no_mask() -> None:
    grey = Image.fromarray(np.zeros((8, 8), np.uint8))
    assert code(save(grey, "JPEG")) == "lossy-mask"
    assert code(save(grey.convert("RGB"), "WEBP")) == "lossy-mask"
    assert code(save(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")) == "unsupported-depth"
    assert code(save(grey), max_pixels=63) == "too-many-pixels"
    assert code(save(grey)[:60]) == "truncated"
    assert code(b"hello there") == "not-an-image"


def slow_counts(mask: np.ndarray) -> list[int]:
    counts, current, run = [], False, 0
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if bool(mask[y, x]) == current:
                run += 1
            else:
                counts.append(run)
                current, run = bool(mask[y, x]), 1
    return [*counts, run]


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.uint8, shapes, elements=st.integers(0, 3)))
def test_run_lengths_against_a_slow_loop(label: np.ndarray) -> None:
    by_class = label_maps.class_rles(label)
    assert sorted(by_class) == np.unique(label).tolist()
    for value in range(4):
        mask = label == value
        plain = label_maps.to_rle(mask, compressed=False)
        assert plain == {"size": list(mask.shape), "counts": slow_counts(mask)}
        packed = label_maps.to_rle(mask)
        if mask.any():
            assert by_class[value] == packed
        np.testing.assert_array_equal(label_maps.from_rle(plain), mask)
        np.testing.assert_array_equal(label_maps.from_rle(packed), mask)


def slow_unpack(text: str) -> list[int] | None:
    """COCO's text form read character by character; None where it is damaged."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        five = ord(character) - 48
        if not 0 <= five < 64 or shift > 55:
            return None
        value |= (five & 31) << shift
        shift += 5
        if five & 32:
            continue
        if five & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return None if shift else counts


numbers = st.text([chr(48 + five) for five in range(64)], min_size=0, max_size=14)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=60) | st.lists(st.integers(0, 1 << 20), min_size=1, max_size=9)
)
def test_the_text_form_is_read_as_a_slow_loop_reads_it(counts: list[int]) -> None:
    text = label_maps.pack_counts(counts)
    assert slow_unpack(text) == counts
    if 0 < sum(counts) < LIMIT:
        mask_HW = label_maps.from_rle({"size": [1, sum(counts)], "counts": text})
        np.testing.assert_array_equal(mask_HW[0], np.repeat(np.arange(len(counts)) % 2 == 1, counts))


@settings(max_examples=400, deadline=None)
@given(numbers | st.text(max_size=5))
def test_a_damaged_text_form_is_refused_wherever_the_slow_loop_refuses_it(text: str) -> None:
    counts = slow_unpack(text)
    good = bool(counts) and min(counts) >= 0 and 0 < sum(counts) < LIMIT
    size = [1, sum(counts)] if counts and good else [1, 7]
    if good:
        assert label_maps.from_rle({"size": size, "counts": text}).sum() == sum(counts[1::2])
        return
    with pytest.raises(Refused) as caught:
        label_maps.from_rle({"size": size, "counts": text})
    assert caught.value.code == "bad-rle"


def test_run_lengths_that_overflow_64_bits_are_refused() -> None:
    largest = "o" * 11 + "?"  # 12 characters of 5 bits, the sign left out
    for text in (largest * 3, largest * 40, "o" * 12 + "?", "P" * 12 + "@"):
        with pytest.raises(Refused) as caught:
            label_maps.from_rle({"size": [1, 7], "counts": text})
        assert caught.value.code == "bad-rle"
    with pytest.raises(Refused):
        label_maps.from_rle({"size": [1, 2], "counts": [1 << 62] * 4 + [2]})


def test_listed_run_lengths_may_be_floats_or_strings() -> None:
    for counts in ([1, 2, 1], [1.0, 2.0, 1.0], ["1", "2", "1"]):
        assert label_maps.from_rle({"size": [2, 2], "counts": counts}).tolist() == [[False, True], [True, False]]


def test_text_form_is_what_pycocotools_writes() -> None:
    """Strings made once with pycocotools 2.0 `encode`."""
    box = np.zeros((7, 5), bool)
    box[2:5, 1:4] = True
    y, x = np.mgrid[:97, :131]
    last = np.zeros((4000, 3000), bool)
    last[-1, -1] = True
    golden = [
        (box, "9340005"),
        (np.zeros((3, 4), bool), "<"),
        (np.ones((3, 4), bool), "0<"),
        (
            (y - 40) ** 2 + (x - 60) ** 2 < 900,
            "Po2?_26J6L2M4M2M4M2N2N2N2O0O2N2O0O2N2O000O2O000O2O0000000000000000000000000001N10001N10001N2N101N2N101N2N"
            "2N2N3L3N3L3N4J6J[k3",
        ),
        (((y * 7 + x * 13) % 11 < 4)[:9, :8], "011010010O00O000001010O00010N01010O0010OO0110O000"),
        (last, "ogV^;1"),
    ]
    for mask, text in golden:
        assert label_maps.to_rle(mask)["counts"] == text
        np.testing.assert_array_equal(label_maps.from_rle({"size": list(mask.shape), "counts": text}), mask)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": [3, 4], "counts": [11]},
        {"size": [3, 4], "counts": [-1, 13]},
        {"size": [3, 4], "counts": "0<<"},
        {"size": [3, 4], "counts": "o"},
        {"size": [3, 4], "counts": "\x00"},
        {"size": [3, 4], "counts": "é"},
        {"size": [3, 4], "counts": "o" * 500},
        {"size": [3], "counts": [3]},
        {"size": [3, 4]},
        {"size": [3, 4], "counts": [None]},
        {"size": [1 << 20, 1 << 20], "counts": [1 << 40]},
        {"size": [0, 4], "counts": [0]},
    ],
)
def test_bad_run_lengths_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Refused):
        label_maps.from_rle(wrong)


def test_overlay_and_colours_against_a_slow_loop() -> None:
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    label = rng.integers(0, 6, (6, 7), dtype=np.uint8)
    label[0, 0] = 255
    table = dict(enumerate(PALETTE)) | {255: label_maps.IGNORE_COLOUR, 5: (0, 0, 0)}
    flat = label_maps.colourise(label, PALETTE)
    for alpha in (0.0, 0.25, 0.6, 1.0):
        weight = round(256 * alpha)
        found = label_maps.overlay(image, label, PALETTE, alpha)
        for y in range(6):
            for x in range(7):
                colour = table[int(label[y, x])]
                assert flat[y, x].tolist() == list(colour)
                want = [
                    (int(i) * (256 - weight) + c * weight + 128) >> 8 for i, c in zip(image[y, x], colour, strict=True)
                ]
                assert found[y, x].tolist() == (image[y, x].tolist() if label[y, x] == 255 else want)
    with pytest.raises(ValueError, match="label map"):
        label_maps.overlay(image, label[1:], PALETTE)


def test_palette_colours_are_distinct_and_neighbours_far_apart() -> None:
    for k in (1, 6, 21, 150, 255):
        found = label_maps.palette(k)
        assert len(set(found)) == k
    colours = np.array(label_maps.palette(24)).astype(int)
    distance = np.abs(colours[:, None] - colours[None]).sum(2) + 999 * np.eye(24, dtype=int)
    assert distance.min() > 30
    with pytest.raises(ValueError, match="255"):
        label_maps.palette(256)


def grey_tiff(bits: int, photometric: int, rows: bytes) -> bytes:
    """An uncompressed 4 x 2 grey TIFF by hand (TIFF 6.0, section 3)."""
    entries = [(256, 4), (257, 2), (258, bits), (259, 1), (262, photometric), (273, 8), (278, 2), (279, len(rows))]
    body = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    head = b"II*\x00" + struct.pack("<I", 8 + len(rows))
    return head + rows + struct.pack("<H", len(entries)) + body + bytes(4)


def test_tiff_masks_whose_ids_the_decoder_changes_are_refused() -> None:
    ids = bytes(range(8))
    plain = label_maps.decode_mask(grey_tiff(8, 1, ids), max_pixels=LIMIT)
    np.testing.assert_array_equal(plain, np.arange(8, dtype=np.uint8).reshape(2, 4))
    wide = label_maps.decode_mask(grey_tiff(16, 1, np.arange(8, dtype="<u2").tobytes()), max_pixels=LIMIT)
    np.testing.assert_array_equal(wide, np.arange(8).reshape(2, 4))
    packed = bytes([0x01, 0x23, 0x45, 0x67])
    odd = [(8, 0, ids), (4, 1, packed), (4, 0, packed), (1, 1, b"\x50\xa0"), (1, 0, b"\x50\xa0")]
    assert [code(grey_tiff(*kind)) for kind in odd] == ["tiff-mask"] * len(odd)
    assert code(save(Image.fromarray(np.zeros((2, 2, 3), np.uint8)), "TIFF")) == "rgb-mask"
    indexed = Image.frombytes("P", (4, 2), ids)
    indexed.putpalette([value for colour in PALETTE * 2 for value in colour])
    np.testing.assert_array_equal(label_maps.decode_mask(save(indexed, "TIFF"), max_pixels=LIMIT), plain)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.integers(0, 2)), st.data())
def test_run_lengths_of_columns_in_bands(label: np.ndarray, data: st.DataObject) -> None:
    height, width = label.shape
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, width - 1)).filter(lambda x: x < width))))
    got = label_maps.column_rles(np.split(label, cuts, axis=1), height, width)
    assert got == {int(value): label_maps.to_rle(label == value) for value in np.unique(label)}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.02, 0.2, 0.7, 1.0]))
def test_the_box_of_run_lengths_is_what_the_whole_mask_holds(seed: int, height: int, width: int, share: float) -> None:
    mask_HW = np.random.default_rng(seed).random((height, width)) < share
    size, top, left, box_HW = label_maps.rle_patch(label_maps.to_rle(mask_HW))
    whole_HW = np.zeros(size, np.bool_)
    whole_HW[top : top + box_HW.shape[0], left : left + box_HW.shape[1]] = box_HW
    np.testing.assert_array_equal(whole_HW, mask_HW)
    assert not box_HW.size or (box_HW.any(axis=0)[[0, -1]].all() and box_HW.any())
