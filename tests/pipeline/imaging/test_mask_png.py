"""pipeline.imaging.mask_png: a label map in bands is the PNG of the whole one, and says what does not fit."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.imaging import label_maps, mask_png

RNG = np.random.default_rng(7)
PALETTE = label_maps.palette(21)


def read(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.verify()  # every chunk's checksum
    return np.array(Image.open(io.BytesIO(data)))


def pixels(data: bytes) -> bytes:
    """The PNG's stream of filtered rows."""
    at, found = 8, b""
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found += data[at + 8 : at + 8 + length] if data[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + length
    return zlib.decompress(found)


@pytest.mark.parametrize("highest", [3, 15, 16, 20, 255])
@pytest.mark.parametrize("width", [1, 8, 33])
@pytest.mark.parametrize("indexed", [True, False])
def test_bands_are_the_whole(highest: int, width: int, indexed: bool) -> None:
    label = RNG.integers(0, highest + 1, (50, width), dtype=np.uint8)
    label[0, 0] = highest
    table = PALETTE if indexed else None
    whole = label_maps.encode_png(label, table)
    for cuts in ([], [1], [49], [7, 8, 20]):
        bands = np.split(label, cuts)
        data = b"".join(mask_png.encode_bands(iter(bands), 50, width, highest=highest, palette=table))
        np.testing.assert_array_equal(read(data), label)
        assert pixels(data) == pixels(whole)
        assert data[:33] == whole[:33]


def test_wide_ids_and_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_png, "_IDAT_BYTES", 100)
    label = RNG.integers(0, 65536, (1000, 133), dtype=np.uint16)  # zlib keeps some hundred KB to itself
    pieces = list(mask_png.encode_bands(np.split(label, 20), 1000, 133, highest=65535, wide=True))
    assert sum(piece[4:8] == b"IDAT" for piece in pieces) > 2
    np.testing.assert_array_equal(read(b"".join(pieces)), label)


@pytest.mark.parametrize(
    ("shapes", "said"), [([(3, 4)], "3 rows together, not 5"), ([(5, 3)], "n x 4"), ([(3, 4), (0, 4)], "n x 4")]
)
def test_bands_that_do_not_fit(shapes: list[tuple[int, int]], said: str) -> None:
    bands = [np.zeros(shape, np.uint8) for shape in shapes]
    with pytest.raises(ValueError, match=said):
        list(mask_png.encode_bands(bands, 5, 4, highest=3))


def test_an_id_above_the_highest_is_an_error_not_another_id() -> None:
    with pytest.raises(ValueError, match="id 16"):
        list(mask_png.encode_bands([np.full((5, 4), 16, np.uint8)], 5, 4, highest=15, palette=PALETTE))
