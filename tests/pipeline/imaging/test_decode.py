"""pipeline.imaging.decode: exact decoding, header limits, thousands of damaged files. Colours: test_decode_kinds.py."""

import io
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipeline.imaging import decode
from tests.support.image_files import chunk, exif, png, save

# Set at import by the module itself; pytest resets the filters for every test.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

PICTURE = np.random.default_rng(7).integers(0, 256, (13, 21, 3), dtype=np.uint8)
LIMIT = 10**6


def code(data: bytes, **limits: float) -> str:
    with pytest.raises(decode.Refused) as caught:
        decode.decode(data, **({"max_pixels": LIMIT} | limits))
    assert len(str(caught.value)) > 20
    return caught.value.code


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_come_back_exactly(kind: str, options: dict[str, object]) -> None:
    data = save(Image.fromarray(PICTURE), kind, **options)
    found = decode.decode(data, max_pixels=LIMIT)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert found.flags.writeable
    np.testing.assert_array_equal(found, PICTURE)
    assert decode.probe(data) == (kind, 21, 13)


def test_jpeg_is_what_the_decoder_says() -> None:
    data = save(Image.fromarray(PICTURE), "JPEG", quality=90)
    np.testing.assert_array_equal(decode.decode(data, max_pixels=LIMIT), np.asarray(Image.open(io.BytesIO(data))))
    assert decode.probe(data) == ("JPEG", 21, 13)


def test_multi_picture_jpeg_gives_its_main_picture() -> None:
    frames = [Image.fromarray(PICTURE), Image.fromarray(PICTURE[::-1].copy())]
    data = save(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode.decode(data, max_pixels=LIMIT), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"\x00" * 64, "not-an-image"),
        (b"<!doctype html><p>404", "not-an-image"),
        (b"just text, http://example.com/a.png", "not-an-image"),
        (b"GIF89a" + b"\x00" * 30, "unsupported-format"),
        (b"%PDF-1.7\n", "unsupported-format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported-format"),
        (b"\xc5\xd0\xd3\xc6" + b"\x00" * 30, "unsupported-format"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported-format"),
        (b"\x00\x00\x00\x20ftypheic" + b"\x00" * 30, "unsupported-format"),
        (b"BM", "not-an-image"),
    ],
)
def test_what_is_no_listed_image(data: bytes, expected: str) -> None:
    assert code(data) == expected
    with pytest.raises(decode.Refused):
        decode.probe(data)


def test_float_and_32_bit_images_are_refused() -> None:
    for array in (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int32)):
        assert code(save(Image.fromarray(array), "TIFF")) == "unsupported-depth"


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG"])
def test_limits_are_checked_on_the_header(kind: str) -> None:
    data = save(Image.fromarray(np.zeros((1, 200, 3), np.uint8)), kind)
    assert code(data, max_pixels=199) == "too-many-pixels"
    assert code(data, max_aspect=199) == "bad-aspect"
    assert decode.decode(data, max_pixels=200, max_aspect=200).shape == (1, 200, 3)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_every_truncation_is_refused(kind: str) -> None:
    data = save(Image.fromarray(PICTURE), kind, **({"lossless": True} if kind == "WEBP" else {}))
    for length in range(0, len(data) - 1, 7):
        try:
            found = decode.decode(data[:length], max_pixels=LIMIT)
        except decode.Refused as error:
            assert error.code in ("empty", "not-an-image", "truncated", "corrupt")  # noqa: PT017
        else:
            np.testing.assert_array_equal(found, PICTURE)  # only bytes after the picture are missing
            assert kind == "TIFF"


def test_truncated_jpeg() -> None:
    data = save(Image.fromarray(np.tile(PICTURE, (8, 8, 1))), "JPEG")
    for share in (0.2, 0.5, 0.9):
        assert code(data[: int(share * len(data))]) in ("truncated", "corrupt")


def test_every_flipped_byte_of_a_png_is_noticed() -> None:
    data = bytearray(save(Image.fromarray(PICTURE[:4, :4].copy()), "PNG"))
    for at in range(len(data)):
        data[at] ^= 0x20
        with pytest.raises(decode.Refused):
            decode.decode(bytes(data), max_pixels=LIMIT)
        data[at] ^= 0x20
    assert decode.decode(bytes(data), max_pixels=LIMIT).shape == (4, 4, 3)


def test_random_damage_gives_an_image_or_a_refusal() -> None:
    dice = random.Random(3)
    for kind in decode.FORMATS:
        whole = save(Image.fromarray(PICTURE), kind)
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(dice.randint(1, 6)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            try:
                found = decode.decode(bytes(data), max_pixels=LIMIT)
            except decode.Refused:
                continue
            assert found.dtype == np.uint8
            assert found.shape[2] == 3
            assert found.size <= 3 * LIMIT


def test_threads_agree() -> None:
    encoded = [
        save(Image.fromarray(np.roll(PICTURE, i, 1)), kind) for i in range(8) for kind in ("PNG", "JPEG", "TIFF")
    ]
    alone = [decode.decode(data, max_pixels=LIMIT) for data in encoded]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode.decode(data, max_pixels=LIMIT), encoded * 4))
    for i, found in enumerate(together):
        np.testing.assert_array_equal(found, alone[i % len(encoded)])


def test_refused_keeps_its_code_between_processes() -> None:
    error = pickle.loads(pickle.dumps(decode.Refused("truncated", "ends early; send it all")))
    assert (error.code, str(error)) == ("truncated", "ends early; send it all")


def test_damaged_exif_is_silent() -> None:
    """Warnings are turned into errors for the whole process: the plugins' own would end it."""
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff" + b"\x12\x01\x03\x00\x01\x00\x00\x00\x63\x00\x00\x00" * 2
    jpeg = save(Image.fromarray(PICTURE), "JPEG", exif=exif)
    huge = png(20000, 20000, 1, 0, b"\x00" * 20000)
    program = (
        "import sys\nfrom pipeline.imaging import decode as images\n"
        f"assert images.decode({jpeg!r}, max_pixels=10**6).shape == (13, 21, 3)\n"
        f"assert images.probe({huge!r}) == ('PNG', 20000, 20000)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("orientation", [3, 6])
def test_png_is_turned_wherever_its_exif_chunk_stands(orientation: int) -> None:
    plain = save(Image.fromarray(PICTURE))
    block = chunk(b"eXIf", exif(orientation).removeprefix(b"Exif\x00\x00"))
    first, last = plain.index(b"IDAT") - 4, plain.index(b"IEND") - 4
    before, after = (plain[:at] + block + plain[at:] for at in (first, last))
    np.testing.assert_array_equal(decode.decode(after, max_pixels=LIMIT), decode.orient(PICTURE, orientation))
    np.testing.assert_array_equal(decode.decode(before, max_pixels=LIMIT), decode.decode(after, max_pixels=LIMIT))
    assert decode.probe(before) == decode.probe(after) == ("PNG", *((13, 21) if orientation == 6 else (21, 13)))
