"""tiff_bands: the same pixels as decoding the whole image, for every compression, depth and order; damage told."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from pipeline.imaging import decode, tiff_bands
from pipeline.imaging.decode import Refused
from tests.support.image_files import save

RNG = np.random.default_rng(5)
TYPES = {3: "H", 4: "I"}


def picture(mode: str, height: int = 37, width: int = 29) -> Image.Image:
    noise = Image.fromarray(RNG.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(RNG.integers(0, 65536, (height, width), dtype=np.uint16))
    return noise if mode == "RGBA" else noise.convert("RGB").convert(mode)


def by_hand(
    order: str, samples_HWC: np.ndarray, *, piece: tuple[int, int], tiled: bool, deflate: bool = False, turned: int = 1
) -> bytes:
    """A TIFF in byte order "<" or ">" from uint8 or uint16 samples, in tiles or strips of `piece` (height, width)."""
    height, width, channels = samples_HWC.shape
    bits = 8 * samples_HWC.itemsize
    stored = samples_HWC.astype(samples_HWC.dtype.newbyteorder(order))
    bodies = []
    for y in range(0, height, piece[0]):
        for x in range(0, width, piece[1]):
            part = stored[y : y + piece[0], x : x + piece[1]]
            if tiled:
                part = np.pad(part, ((0, piece[0] - part.shape[0]), (0, piece[1] - part.shape[1]), (0, 0)))
            raw = np.ascontiguousarray(part).tobytes()
            bodies.append(zlib.compress(raw) if deflate else raw)
    data, offsets = b"", []
    for body in bodies:
        offsets.append(8 + len(data))
        data += body + b"\0" * (len(body) % 2)
    tags = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * channels),
        259: (3, [8 if deflate else 1]),
        262: (3, [2 if channels == 3 else 1]),
        274: (3, [turned]),
        277: (3, [channels]),
    }
    places = {322: (4, [piece[1]]), 323: (4, [piece[0]])} if tiled else {278: (4, [piece[0]])}
    offset_tag, count_tag = (324, 325) if tiled else (273, 279)
    places |= {offset_tag: (4, offsets), count_tag: (4, [len(body) for body in bodies])}
    tags |= places
    entries, more, at = b"", b"", 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag in sorted(tags):
        kind, values = tags[tag]
        packed = struct.pack(order + TYPES[kind] * len(values), *values)
        if len(packed) > 4:
            packed, more = struct.pack(order + "I", at + len(more)), more + packed
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4) + more


def rows(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    found = tiff_bands.layout(file)
    assert found.by_rows
    assert not found.several
    return decode.orient(np.concatenate(list(tiff_bands.bands(file, found))), found.orientation)


def same(data: bytes) -> None:
    np.testing.assert_array_equal(rows(data), decode.decode(data, max_pixels=10_000))


def code(data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        rows(data)
    return caught.value.code


COMPRESSED = [
    ("L", "tiff_lzw"),
    ("RGB", "raw"),
    ("RGB", "tiff_lzw"),
    ("RGB", "tiff_adobe_deflate"),
    ("RGB", "packbits"),
    ("RGB", "jpeg"),
    ("L", "jpeg"),
    ("RGBA", "tiff_lzw"),
    ("LA", "tiff_adobe_deflate"),
    ("P", "tiff_lzw"),
    ("1", "group4"),
    ("1", "group3"),
    ("CMYK", "tiff_lzw"),
    ("I;16", "tiff_lzw"),
    ("I;16", "raw"),
]


@pytest.mark.parametrize(("mode", "compression"), COMPRESSED)
def test_strips_give_the_pixels_of_the_whole_image(
    mode: str, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 700)
    data = save(picture(mode), "TIFF", compression=compression)
    found = tiff_bands.layout(io.BytesIO(data))
    assert (len(found.offsets) > 1) == (compression != "raw" and mode != "1")  # Pillow writes those as one strip
    same(data)


def test_predictor_and_big_tiff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 700)
    same(save(picture("RGB"), "TIFF", compression="tiff_lzw", tiffinfo={317: 2}))
    same(save(picture("RGB"), "TIFF", big_tiff=True))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize(("channels", "kind"), [(3, np.uint8), (1, np.uint16)])
def test_tiles_and_strips_in_either_byte_order(order: str, deflate: bool, channels: int, kind: type) -> None:
    samples = RNG.integers(0, np.iinfo(kind).max, (37, 50, channels), dtype=kind)
    same(by_hand(order, samples, piece=(16, 32), tiled=True, deflate=deflate))
    same(by_hand(order, samples, piece=(48, 64), tiled=True, deflate=deflate))
    same(by_hand(order, samples, piece=(5, 50), tiled=False, deflate=deflate))


@pytest.mark.parametrize("turned", range(1, 9))
def test_orientations(turned: int) -> None:
    samples = RNG.integers(0, 256, (37, 50, 3), dtype=np.uint8)
    same(by_hand("<", samples, piece=(5, 50), tiled=False, turned=turned))


def test_one_uncompressed_strip_is_read_in_thin_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_bands, "_BAND_PIXELS", 50 * 8)
    samples = RNG.integers(0, 256, (37, 50, 3), dtype=np.uint8)
    data = by_hand("<", samples, piece=(37, 50), tiled=False)
    file = io.BytesIO(data)
    assert [len(band) for band in tiff_bands.bands(file, tiff_bands.layout(file))] == [8, 8, 8, 8, 5]
    same(data)
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 1 << 20)
    same(save(picture("1"), "TIFF"))
    compressed = by_hand("<", samples, piece=(37, 50), tiled=False, deflate=True)
    assert not tiff_bands.layout(io.BytesIO(compressed)).by_rows


def test_damage_is_told() -> None:
    samples = RNG.integers(0, 256, (37, 50, 3), dtype=np.uint8)
    good = by_hand("<", samples, piece=(5, 50), tiled=False, deflate=True)
    assert code(good[:20]) in ("truncated", "corrupt")
    broken = bytearray(good)
    broken[30:60] = bytes(30)
    assert code(bytes(broken)) == "corrupt"
    (at,) = struct.unpack_from("<I", good, 4)
    endless = bytearray(good)
    for entry in range(at + 2, at + 2 + 12 * 11, 12):
        if struct.unpack_from("<H", good, entry)[0] == 279:
            struct.pack_into("<I", endless, entry + 4, 1 << 30)
    assert code(bytes(endless)) == "corrupt"


def test_pages_and_planes_are_told() -> None:
    pages = io.BytesIO()
    picture("RGB").save(pages, "TIFF", save_all=True, append_images=[picture("RGB")])
    assert tiff_bands.layout(pages).several


def test_the_range_of_16_bits_is_that_of_the_whole_image_without_what_a_tile_has_beyond_it() -> None:
    samples_HW = np.full((40, 24), 3000, np.uint16)  # tiles of 16 x 16: the last ones reach beyond
    padded_HW = np.full((48, 32), 60_000, np.uint16)
    for brightest, refused in ((3000, True), (40_000, False)):
        samples_HW[-1, -1] = brightest
        padded_HW[:40, :24] = samples_HW
        data = tiled_16(padded_HW, 40, 24)
        if refused:
            with pytest.raises(Refused, match="up to 3000 of 65535"):
                rows(data)
            with pytest.raises(Refused, match="up to 3000 of 65535"):
                decode.decode(data, max_pixels=10_000)
        else:
            same(data)


def tiled_16(padded_HW: np.ndarray, height: int, width: int) -> bytes:
    """A grey TIFF of 16 x 16 tiles, not compressed, whose last ones hold what lies beyond the image."""
    down, across = padded_HW.shape[0] // 16, padded_HW.shape[1] // 16
    tiles = padded_HW.reshape(down, 16, across, 16).transpose(0, 2, 1, 3).reshape(-1, 512 // 2).astype("<u2")
    count = len(tiles)
    tags = [
        (256, 3, (width,)), (257, 3, (height,)), (258, 3, (16,)), (259, 3, (1,)), (262, 3, (1,)), (277, 3, (1,)),
        (322, 3, (16,)), (323, 3, (16,)), (324, 4, tuple(8 + 512 * n for n in range(count))), (325, 4, (512,) * count),
    ]  # fmt: skip
    at = 8 + tiles.nbytes
    more_at = at + 2 + 12 * len(tags) + 4
    entries, more = b"", b""
    for tag, kind, values in tags:
        packed = struct.pack("<" + {3: "H", 4: "I"}[kind] * len(values), *values)
        if len(packed) > 4:
            packed, more = struct.pack("<I", more_at + len(more)), more + packed
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", at) + tiles.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4) + more


def test_16_bits_band_by_band_are_refused_where_they_would_be_misread(tmp_path: Path) -> None:
    """Pillow reads uncompressed planes of 16 bits as if they had 8: half the picture, stretched, of low and high bytes."""
    rasterio = pytest.importorskip("rasterio", reason="the extra geotiff is not installed")
    samples_CHW = np.full((3, 20, 30), 0x4001, np.uint16)
    options = {"driver": "GTiff", "height": 20, "width": 30, "count": 3, "dtype": "uint16", "photometric": "RGB"}
    for more, refused in (({"interleave": "band"}, True), ({"interleave": "band", "compress": "deflate"}, False)):
        with rasterio.open(tmp_path / "a.tif", "w", **options, **more) as file:
            file.write(samples_CHW)
        data = (tmp_path / "a.tif").read_bytes()
        if refused:
            with pytest.raises(Refused, match="band by band") as caught:
                decode.decode(data, max_pixels=10_000)
            assert caught.value.code == "unsupported-depth"
        else:
            assert (decode.decode(data, max_pixels=10_000) == 0x40).all()
