"""A header that promises a gigabyte, and every unusual kind of picture by its stated rule."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.imaging import decode
from tests.support.image_files import TURNS, exif, png, save

RNG = np.random.default_rng(7)
PICTURE = RNG.integers(0, 256, (13, 21, 3), dtype=np.uint8)
LIMIT = 10**6


def test_a_bomb_is_refused_by_its_header_with_flat_memory() -> None:
    """44 kB that would be a gigabyte of RGB: judged in a process of its own, whose peak memory must not move."""
    bomb = png(19_000, 19_000, 1, 0, bytes(2375 * 19_000))
    assert len(bomb) < 60_000
    program = (
        "import resource, sys\nfrom pipeline.imaging import decode as images\n"
        "from pipeline.imaging import label_maps as masks\n"
        "data = sys.stdin.buffer.read()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for read in (images.decode, masks.decode_mask):\n"
        "    try:\n        read(data, max_pixels=178_956_970)\n"
        "    except images.Refused as error:\n        print(error.code)\n"
        "print(images.probe(data))\nprint(peak() - before < 8192)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], input=bomb, capture_output=True, check=True)
    assert done.stdout.decode().split("\n")[:4] == [
        "too-many-pixels",
        "too-many-pixels",
        "('PNG', 19000, 19000)",
        "True",
    ]


def code(data: bytes, **limits: float) -> str:
    with pytest.raises(decode.Refused) as caught:
        decode.decode(data, **({"max_pixels": LIMIT} | limits))
    assert len(str(caught.value)) > 20
    return caught.value.code


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_applied(kind: str, orientation: int, order: str) -> None:
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    turned = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif(orientation, order)}
    data = save(Image.fromarray(PICTURE), kind, **turned, **options)
    stored = Image.open(io.BytesIO(save(Image.fromarray(PICTURE), kind, **options))).convert("RGB")
    upright = np.asarray(stored if orientation == 1 else stored.transpose(TURNS[orientation]))
    np.testing.assert_array_equal(decode.decode(data, max_pixels=LIMIT), upright)
    height, width = upright.shape[:2]
    assert decode.probe(data) == (kind, width, height)


def test_orientation_six_turns_clockwise() -> None:
    """A camera held upright: the stored left column's bottom is the picture's top left."""
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)[:, :, None].repeat(3, 2)
    assert decode.orient(stored, 6)[:, :, 0].tolist() == [[3, 0], [4, 1], [5, 2]]
    assert decode.orient(stored, 8)[:, :, 0].tolist() == [[2, 5], [1, 4], [0, 3]]


def test_sixteen_bit_takes_the_high_byte_in_grey_and_colour() -> None:
    values = np.array([[0, 255, 256, 511], [32767, 32768, 65279, 65535]], np.uint16)
    want = np.array([[0, 0, 1, 1], [127, 128, 254, 255]], np.uint8)
    grey = png(2, 4, 16, 0, values.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode.decode(grey, max_pixels=LIMIT), want[:, :, None].repeat(3, 2))
    colour = png(2, 4, 16, 2, values[:, :, None].repeat(3, 2).astype(">u2").tobytes())
    np.testing.assert_array_equal(decode.decode(colour, max_pixels=LIMIT), want[:, :, None].repeat(3, 2))
    tiff = save(Image.fromarray(values), "TIFF")
    np.testing.assert_array_equal(decode.decode(tiff, max_pixels=LIMIT), want[:, :, None].repeat(3, 2))


def test_grey_palette_and_bilevel() -> None:
    grey = PICTURE[:, :, 0]
    np.testing.assert_array_equal(
        decode.decode(save(Image.fromarray(grey), "PNG"), max_pixels=LIMIT), grey[:, :, None].repeat(3, 2)
    )
    indexed = Image.fromarray((grey % 3).astype(np.uint8), "P")
    indexed.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)
    np.testing.assert_array_equal(decode.decode(save(indexed, "PNG"), max_pixels=LIMIT), colours[grey % 3])
    bilevel = Image.fromarray(grey > 128)
    want = np.where(grey > 128, 255, 0).astype(np.uint8)[:, :, None].repeat(3, 2)
    np.testing.assert_array_equal(decode.decode(save(bilevel, "PNG"), max_pixels=LIMIT), want)


def over_black(colour: int, alpha: int) -> int:
    return (colour * alpha + 127) // 255


def test_alpha_is_composited_on_black() -> None:
    rgba = RNG.integers(0, 256, (9, 5, 4), dtype=np.uint8)
    rgba[0, 0], rgba[0, 1] = (200, 100, 50, 0), (200, 100, 50, 255)
    found = decode.decode(save(Image.fromarray(rgba), "PNG"), max_pixels=LIMIT)
    for y in range(9):
        for x in range(5):
            alpha = int(rgba[y, x, 3])
            assert found[y, x].tolist() == [over_black(int(c), alpha) for c in rgba[y, x, :3]]
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, 1].tolist() == [200, 100, 50]
    la = decode.decode(save(Image.fromarray(rgba[:, :, 2:].copy(), "LA"), "PNG"), max_pixels=LIMIT)
    assert la[2, 2].tolist() == [over_black(int(rgba[2, 2, 2]), int(rgba[2, 2, 3]))] * 3
    indexed = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    indexed.putpalette([255, 128, 0, 0, 128, 255])
    half = decode.decode(save(indexed, "PNG", transparency=b"\x80\xff"), max_pixels=LIMIT)
    assert half[0].tolist() == [[128, over_black(128, 128), 0], [0, 128, 255]]


def test_cmyk() -> None:
    inks = np.array([[[0, 255, 255, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)
    found = decode.decode(save(Image.fromarray(inks, "CMYK"), "TIFF"), max_pixels=LIMIT)
    assert found[0].tolist() == [[255, 0, 0], [0, 255, 255], [0, 0, 0], [255, 255, 255]]
    flat = Image.fromarray(np.full((16, 16, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    red = decode.decode(save(flat, "JPEG", quality=95), max_pixels=LIMIT)
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 3


def test_more_than_one_frame_is_refused() -> None:
    frames = [Image.fromarray(PICTURE), Image.fromarray(PICTURE[::-1].copy())]
    for kind in ("PNG", "WEBP", "TIFF"):
        data = save(frames[0], kind, save_all=True, append_images=frames[1:])
        assert code(data) == "animated"


def test_16_bit_pictures_that_fill_too_little_of_their_range_are_refused_with_the_way_out() -> None:
    ramp_HW = np.linspace(0, 4095, 64 * 48).reshape(48, 64).astype(np.uint16)
    for brightest, refused in ((4095, True), (8191, True), (8192, False), (0, False)):
        data = save(Image.fromarray(ramp_HW * 0 + np.uint16(brightest)), "PNG")
        if refused:
            with pytest.raises(decode.Refused, match=rf"up to {brightest} of 65535: only \d+ of 256 levels"):
                decode.decode(data, max_pixels=1 << 20)
        else:
            assert decode.decode(data, max_pixels=1 << 20)[0, 0, 0] == brightest >> 8


def test_a_tiffs_smaller_copies_are_no_pages(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="the extra geotiff is not installed")
    pixels_CHW = np.random.default_rng(1).integers(0, 255, (3, 256, 256)).astype(np.uint8)
    shape = {"height": 256, "width": 256, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", tiled=True, blockxsize=64, blockysize=64, **shape
    ) as out:
        out.write(pixels_CHW)
        out.build_overviews([2, 4])
    image_HWC = decode.decode((tmp_path / "a.tif").read_bytes(), max_pixels=1 << 20)
    np.testing.assert_array_equal(image_HWC, pixels_CHW.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("bands", "dtype", "said"), [(5, "uint8", "5 bands of 8 bits"), (3, "uint16", "3 bands of 16 bits")]
)
def test_a_tiff_of_other_bands_says_which(tmp_path: Path, bands: int, dtype: str, said: str) -> None:
    rasterio = pytest.importorskip("rasterio", reason="the extra geotiff is not installed")
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=8, width=8, count=bands, dtype=dtype) as out:
        out.write(np.ones((bands, 8, 8), dtype))
    with pytest.raises(decode.Refused, match=said) as caught:
        decode.decode((tmp_path / "a.tif").read_bytes(), max_pixels=1 << 20)
    assert caught.value.code == "unsupported-depth"
