"""png_bands: the same pixels as decoding the whole image, for every filter, depth and colour; damage is told."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.imaging import decode, png_bands
from pipeline.imaging.decode import Refused
from tests.support.image_files import chunk, exif, png, save

RNG = np.random.default_rng(3)
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
KINDS = [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (1, 3), (2, 3), (4, 3), (8, 3), (8, 4), (16, 4), (8, 6)]


def filtered(raw: np.ndarray, step: int, kinds: list[int]) -> bytes:
    """Rows with their PNG filters, by the specification's formulas, byte by byte; row y takes kinds[y % len(kinds)]."""
    out, above = bytearray(), np.zeros(raw.shape[1], int)
    for y, row in enumerate(raw.astype(int)):
        kind = kinds[y % len(kinds)]
        out.append(kind)
        for x, value in enumerate(row):
            a, b, c = (row[x - step] if x >= step else 0), above[x], (above[x - step] if x >= step else 0)
            near = min((abs(a + b - c - v), i, v) for i, v in enumerate((a, b, c)))[2]
            out.append((value - (0, a, b, (a + b) // 2, near)[kind]) % 256)
        above = row
    return bytes(out)


def by_hand(depth: int, colour: int, height: int, width: int, kinds: list[int], more: bytes = b"") -> bytes:
    bits = CHANNELS[colour] * depth
    raw = RNG.integers(0, 256, (height, (width * bits + 7) // 8), dtype=np.uint8)
    body = zlib.compress(filtered(raw, max(1, bits // 8), kinds))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    colours = chunk(b"PLTE", RNG.bytes(3 << min(depth, 8))) if colour == 3 else b""
    pixels = b"".join(chunk(b"IDAT", body[i : i + 50]) for i in range(0, len(body), 50))
    return png_bands.SIGNATURE + chunk(b"IHDR", head) + colours + more + pixels + chunk(b"IEND", b"")


def rows(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    return np.concatenate(list(png_bands.bands(file, png_bands.layout(file))))


def code(data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        rows(data)
    return caught.value.code


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of few rows and pieces of few bytes, so that every seam is crossed."""
    monkeypatch.setattr(png_bands, "BAND_PIXELS", 42)
    monkeypatch.setattr(png_bands, "_PIECE", 17)


@pytest.mark.parametrize(("depth", "colour"), KINDS)
@pytest.mark.parametrize("kinds", [[0], [1], [2], [3], [4], [4, 3, 2, 1, 0, 3, 4]])
def test_the_same_pixels_as_the_whole_image(depth: int, colour: int, kinds: list[int]) -> None:
    data = by_hand(depth, colour, 23, 13, kinds)
    np.testing.assert_array_equal(rows(data), decode.decode(data, max_pixels=1000))


@pytest.mark.parametrize(
    ("depth", "colour", "body"), [(8, 0, b"\0\x07"), (8, 2, b"\0\1\0\2\0\3"), (4, 3, b"\0\x80\xff")]
)
def test_transparency_is_composited_as_for_the_whole_image(depth: int, colour: int, body: bytes) -> None:
    data = by_hand(depth, colour, 9, 21, [0, 4], chunk(b"tRNS", body))
    np.testing.assert_array_equal(rows(data), decode.decode(data, max_pixels=1000))


def test_bands_hold_few_rows_and_all_of_them() -> None:
    file = io.BytesIO(by_hand(8, 2, 23, 13, [2]))
    sizes = [band.shape for band in png_bands.bands(file, png_bands.layout(file))]
    assert sizes == [(3, 13, 3)] * 7 + [(2, 13, 3)]


def test_what_cannot_be_read_by_rows_says_so() -> None:
    assert png_bands.layout(io.BytesIO(by_hand(8, 2, 2, 2, [0]))).by_rows
    assert not png_bands.layout(io.BytesIO(by_hand(16, 2, 2, 2, [0]))).by_rows
    plain = by_hand(8, 2, 2, 2, [0])
    head = plain[16:28] + b"\1"
    interlaced = plain[:8] + chunk(b"IHDR", head) + plain[33:]
    assert not png_bands.layout(io.BytesIO(interlaced)).by_rows


@pytest.mark.parametrize("late", [False, True])
def test_the_orientation_is_found_on_either_side_of_the_pixels(late: bool) -> None:
    data = save(Image.new("RGB", (3, 2)))
    block = chunk(b"eXIf", exif(6)[6:])
    at = len(data) - 12 if late else 33
    assert png_bands.layout(io.BytesIO(data[:at] + block + data[at:])).orientation == 6
    assert png_bands.layout(io.BytesIO(data)).orientation == 1


def test_damage_is_told() -> None:
    good = by_hand(8, 2, 23, 13, [1, 4])
    assert code(good[:-40]) == "truncated"
    assert code(png_bands.SIGNATURE + chunk(b"IEND", b"")) == "corrupt"
    wrong = bytearray(good)
    wrong[len(good) - 14] ^= 1  # the last pixel chunk's checksum, after its last row was handed out
    assert code(bytes(wrong)) == "corrupt"
    pixels = np.zeros((4, 12), np.uint8).tobytes()
    assert code(png(5, 4, 8, 2, pixels + bytes(12))[:33] + png(4, 4, 8, 2, pixels)[33:]) == "truncated"
    head = struct.pack(">IIBBBBB", 4, 1, 8, 2, 0, 0, 0)
    for body in (b"no zlib", zlib.compress(b"\x05" + bytes(12))):
        parts = chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
        assert code(png_bands.SIGNATURE + parts) == "corrupt"
    bad = struct.pack(">IIBBBBB", 4, 1, 3, 2, 0, 0, 0)
    assert code(png_bands.SIGNATURE + chunk(b"IHDR", bad) + chunk(b"IEND", b"")) == "corrupt"


def test_a_file_that_is_all_chunk_heads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_bands, "_MOST_CHUNKS", 20)
    assert code(by_hand(8, 2, 40, 40, [0])) == "corrupt"


def wide_png(colour: int, samples_HWC: np.ndarray) -> bytes:
    """A PNG of 16-bit samples, H x W x channels."""
    height, width = samples_HWC.shape[:2]
    raw = samples_HWC.astype(">u2").reshape(height, -1).view(np.uint8)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    body = zlib.compress(np.pad(raw, ((0, 0), (1, 0))).tobytes())
    return png_bands.SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_the_range_of_16_bits_is_that_of_the_whole_image_over_all_its_colours(colour: int, channels: int) -> None:
    """A dark sky above a bright street is right, in bands as in one piece; a bright alpha makes no picture bright."""
    dark = np.full((23, 13, channels), 3000)
    if channels in (2, 4):
        dark[..., -1] = 65535
    street = dark.copy()
    street[-1, -1, 0] = 40_000
    by_rows = channels < 3
    for picture, refused in ((dark, True), (street, False)):
        data = wide_png(colour, picture)
        for read in (rows, whole) if by_rows else (whole,):
            if refused:
                with pytest.raises(Refused, match="of 65535") as caught:
                    read(data)
                assert caught.value.code == "dark-16-bit"
            else:
                assert (read(data)[0, 0, 0], read(data)[-1, -1, 0]) == (3000 >> 8, 40_000 >> 8)


def whole(data: bytes) -> np.ndarray:
    return decode.decode(data, max_pixels=1000)
