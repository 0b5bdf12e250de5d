"""What decoding takes is what was counted by the header: each kind at its worst, in a process of its own."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from pipeline.imaging import decode
from pipeline.imaging.decode_cost import OVERHEAD, decode_bytes
from pipeline.imaging.headers import Refused
from tests.support.image_files import chunk, exif, save
from tests.support.serving.peak_memory import growths

SIDE = 2500
PIXELS = SIDE * SIDE
COLOURS = {"RGB": (9, 8, 7), "RGBA": (9, 8, 7, 100), "LA": (9, 100), "CMYK": (9, 8, 7, 6), "I;16": 20_000}
RNG = np.random.default_rng(3)
DECODE = """
import json, sys
from pathlib import Path
from pipeline.imaging import decode
from tests.support.serving.peak_memory import growth
def work(data):
    return decode.decode(data, max_pixels=10**9)
print(json.dumps({Path(name).name: growth(work, Path(name)) for name in sys.argv[1:]}))
"""


def flat(mode: str) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), COLOURS.get(mode, 1))


def noise(channels: int) -> Image.Image:
    pixels = RNG.integers(0, 256, (SIDE, SIDE, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[:, :, 0])


def palette() -> Image.Image:
    image = flat("P")
    image.putpalette([value for value in range(256) for _ in range(3)])
    return image


def png_16(colour: int, channels: int) -> bytes:
    rows = zlib.compress((b"\0" + bytes([100] * 2 * channels) * SIDE) * SIDE, 1)
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def cmyk() -> Image.Image:
    return Image.frombytes("CMYK", (SIDE, SIDE), RNG.integers(0, 256, 4 * PIXELS, dtype=np.uint8).tobytes())


def tiff(image: Image.Image, compression: str, **tags: int) -> bytes:
    """In a single strip, unless the tags say otherwise."""
    known = {"rows": 278, "orientation": 274}
    return save(
        image, "TIFF", compression=compression, tiffinfo={278: SIDE} | {known[name]: v for name, v in tags.items()}
    )


KINDS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: save(noise(3), "JPEG", subsampling=0),
    "jpeg, progressive": lambda: save(noise(3), "JPEG", progressive=True, subsampling=0),
    "jpeg, progressive, 4:2:0": lambda: save(noise(3), "JPEG", progressive=True, subsampling=2),
    "jpeg, progressive, CMYK": lambda: save(cmyk(), "JPEG", progressive=True),
    "jpeg, grey": lambda: save(noise(1), "JPEG"),
    "jpeg, turned": lambda: save(noise(3), "JPEG", exif=exif(6)),
    "jpeg, grey, turned": lambda: save(noise(1), "JPEG", exif=exif(6)),
    "png": lambda: save(noise(3), compress_level=0),
    "png, alpha": lambda: save(flat("RGBA")),
    "png, grey": lambda: save(flat("L")),
    "png, grey and alpha": lambda: save(flat("LA")),
    "png, palette": lambda: save(palette()),
    "png, palette and alpha": lambda: save(palette(), transparency=bytes(range(256))),
    "png, 1 bit": lambda: save(flat("1")),
    "png, 16 bits": lambda: save(flat("I;16")),
    "png, 16 bits, colour": lambda: png_16(2, 3),
    "png, 16 bits, alpha": lambda: png_16(6, 4),
    "webp, flat, alpha": lambda: save(flat("RGBA"), "WEBP", lossless=True),
    "webp, flat": lambda: save(flat("RGB"), "WEBP", lossless=True),
    "webp, alpha": lambda: save(noise(4), "WEBP", lossless=True, quality=0, method=0),
    "webp, lossy, alpha": lambda: save(noise(4), "WEBP", method=0),
    "bmp": lambda: save(noise(3), "BMP"),
    "bmp, palette": lambda: save(palette(), "BMP"),
    "tiff": lambda: save(noise(3), "TIFF"),
    "tiff, LZW": lambda: tiff(flat("RGB"), "tiff_lzw"),
    "tiff, LZW, thin strips": lambda: tiff(flat("RGB"), "tiff_lzw", rows=16),
    "tiff, Deflate, alpha": lambda: tiff(flat("RGBA"), "tiff_adobe_deflate"),
    "tiff, Deflate, noise": lambda: tiff(noise(3), "tiff_adobe_deflate"),
    "tiff, JPEG": lambda: tiff(noise(3), "jpeg"),
    "tiff, 16 bits": lambda: tiff(flat("I;16"), "tiff_lzw"),
    "tiff, CMYK": lambda: tiff(flat("CMYK"), "tiff_lzw"),
    "tiff, 1 bit": lambda: tiff(flat("1"), "group4"),
    "tiff, turned": lambda: tiff(flat("RGB"), "tiff_lzw", orientation=6),
}


def test_every_kind_takes_no_more_than_was_counted_and_not_far_less(tmp_path: Path) -> None:
    """By the peak of resident memory; at most 40 % and what does not grow with the image are counted above it."""
    counted = {}
    for name, encode in KINDS.items():
        data = encode()
        (tmp_path / name).write_bytes(data)
        height, width, counted[name] = decode_bytes(data, 10**9)
        assert height * width == PIXELS

    took = growths(DECODE, [str(tmp_path / name) for name in KINDS])

    assert took.keys() == counted.keys()
    over = {name: (took[name], counted[name]) for name in KINDS if took[name] > counted[name]}
    assert over == {}
    far = {name: (took[name], counted[name]) for name in KINDS if counted[name] > 1.4 * took[name] + OVERHEAD}
    assert far == {}


def test_a_webp_is_counted_by_its_canvas_without_being_opened() -> None:
    """38 bytes that would unpack to 50 megapixels; the body does not even have to be one that decodes."""
    data = save(Image.new("RGBA", (7070, 7070), (90, 120, 60, 200)), "WEBP", lossless=True, method=0, quality=0)
    assert len(data) < 2000
    assert decode_bytes(data[:-4] + b"junk", 10**8)[2] > 16 * 7070 * 7070


def test_texts_that_unpack_are_counted() -> None:
    plain = save(Image.new("RGB", (8, 8)))
    text = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(1 << 20)))
    many = plain[:33] + text * 5 + plain[33:]
    assert decode_bytes(many, 100)[2] - decode_bytes(plain, 100)[2] > 4.9 * (1 << 20)


def test_a_tile_larger_than_its_image_is_counted() -> None:
    with rasterio.MemoryFile() as file:
        layout = {"width": 16, "height": 16, "count": 3, "dtype": "uint8", "photometric": "RGB", "compress": "lzw"}
        tiles = {"tiled": True, "blockxsize": 1024, "blockysize": 1024, "interleave": "pixel"}
        with file.open(driver="GTiff", transform=from_origin(0, 0, 1, 1), **layout, **tiles) as dataset:
            dataset.write(np.zeros((3, 16, 16), np.uint8))
        image = bytes(file.getbuffer())
    small = save(Image.new("RGB", (16, 16)), "TIFF", compression="tiff_lzw")
    assert decode_bytes(image, 1 << 21)[2] - decode_bytes(small, 1 << 21)[2] > 3 << 20


@pytest.mark.parametrize(("data", "code"), [(b"", "empty"), (b"GIF89a", "unsupported-format"), (b"x", "not-an-image")])
def test_what_is_no_image_is_refused_as_by_the_decoder(data: bytes, code: str) -> None:
    with pytest.raises(Refused) as refused:
        decode_bytes(data, 100)
    assert refused.value.code == code


def test_strips_change_no_pixel() -> None:
    """An image of several strips, each with alpha and 16-bit samples of its own, against the whole arrays at once."""
    side = 1024
    assert side * side > 2 * decode.STRIP_PIXELS
    rgba_HWC = RNG.integers(0, 256, (side, side, 4), dtype=np.uint8)
    expected = (rgba_HWC[:, :, :3].astype(int) * rgba_HWC[:, :, 3:] + 127) // 255
    assert np.array_equal(decode.decode(save(Image.fromarray(rgba_HWC)), max_pixels=1 << 20), expected)

    wide_HW = RNG.integers(0, 65536, (side, side), dtype=np.uint16)
    grey = decode.decode(save(Image.fromarray(wide_HW)), max_pixels=1 << 20)
    assert np.array_equal(grey, np.repeat((wide_HW >> 8).astype(np.uint8)[:, :, None], 3, axis=2))
