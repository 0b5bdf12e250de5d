"""Bytes that decoding an image takes at its peak, by its header alone: what a server counts before it lets one in.

Counted for `pipeline.imaging.decode.decode`, beside the encoded bytes that the caller holds: what the decoder keeps, its
picture (Pillow holds RGB as four bytes a pixel), and the answer of three bytes a pixel. By kind, for Pillow 13:

- JPEG: in several scans (progressive) libjpeg keeps two bytes for each coefficient beside the picture.
- PNG, BMP: the picture. A PNG's compressed texts are unpacked too.
- WebP: always read as an animation: two canvases, the decoder's own pixels and a copy of them, and of the encoded bytes.
- TIFF: a strip or tile is unpacked beside the picture; one to be turned is there twice.

A test decodes the worst of each kind in a process of its own and compares.
"""

import io

from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.imaging import decode, headers
from pipeline.imaging.headers import Refused
from pipeline.imaging.large_image import LargeImage

OVERHEAD = 16 << 20  # strips that are converted at a time, tables, blocks up to 32 MB that the heap keeps
_OUT = 3  # of the answer's pixel
_STORED = {"1": 1, "L": 1, "P": 1}  # of a pixel as Pillow holds it
_WIDEST = 4
_WEBP = 17
_TURN = 0x0112
_TEXT = 1 << 20  # that Pillow unpacks of one PNG chunk
_TEXTS = 64 << 20  # and of all


def decode_bytes(data: bytes, max_pixels: int) -> tuple[int, int, int]:
    """(height, width, bytes) as stored. Nothing is decoded, and a WebP, whose decoder makes its canvas when it opens a
    file, is not opened.

    Raises:
        Refused: the codes of `pipeline.imaging.decode`, by the header.
    """
    if decode.sniff(data) == "WEBP":
        width, height, animated = headers.webp_size(data)
        headers.check_pixels(width, height, max_pixels)
        if animated:
            raise Refused("animated", "an animation has no single frame to segment; send one still picture")
        return height, width, _WEBP * width * height + len(data) + OVERHEAD

    _, image = decode.open_header(data, max_pixels)
    return image.height, image.width, _peak(data, image) + OVERHEAD


def _peak(data: bytes, image: ImageFile) -> int:
    pixels = image.width * image.height
    stored = _stored(image) * pixels
    out = _OUT * pixels
    turned = 2 * out if decode.orientation_of(image) != 1 else 0
    beside = 0
    if isinstance(image, JpegImageFile):
        beside = _coefficients(data, image)
    elif isinstance(image, TiffImageFile):
        beside = _piece(image)
        if image.tag_v2.get(_TURN, 1) != 1:
            stored *= 2
    elif isinstance(image, BmpImageFile):
        beside = 2 * pixels if image.mode in _STORED else 0  # run lengths, unpacked in Python
    else:
        beside = _texts(data)
    return max(stored + beside, stored + out, turned)


def _stored(image: ImageFile) -> int:
    if image.mode.startswith("I;16"):
        return 2
    return _STORED.get(image.mode, _WIDEST)


def _coefficients(data: bytes, image: JpegImageFile) -> int:
    """Two bytes of each, for all components at their sampling (ITU-T T.81, A.1.1), where they are kept at all."""
    try:
        if headers.jpeg_one_scan(io.BytesIO(data)):
            return 0
    except Refused:  # damaged in a way that the decoder may still take: count it as several scans
        pass
    components = [(across, down) for _, across, down, _ in image.layer]
    widest = max(across for across, _ in components) * max(down for _, down in components)
    samples = sum(across * down for across, down in components)
    return 2 * image.width * image.height * samples // widest


def _piece(image: TiffImageFile) -> int:
    """A strip or tile as the decoder unpacks it, which may be larger than the image."""
    tags = image.tag_v2
    width: int = int(tags.get(headers.TILE_WIDTH, image.width))
    height: int = int(
        tags.get(headers.TILE_LENGTH, min(int(tags.get(headers.ROWS_PER_STRIP, image.height)), image.height))
    )
    bits = tags.get(headers.BITS_PER_SAMPLE, (1,))
    samples = int(tags.get(headers.SAMPLES_PER_PIXEL, 1))
    pixel: int = max(_WIDEST, -(-max(bits) * samples // 8))
    return width * height * pixel


def _texts(data: bytes) -> int:
    """Of a PNG: what its compressed texts may become."""
    packed = data.count(b"zTXt") + data.count(b"iTXt")
    return min(packed * _TEXT, _TEXTS)


def shrink_bytes(picture: LargeImage, height: int, width: int) -> int:
    """Of `picture.shrunk(height, width)`: as many rows as are read at a time, or the whole image, and what comes of it.

    Reads a file that must be decoded as a whole. Raises Refused, as that.
    """
    out = 2 * _OUT * height * width
    if picture.bands is not None:
        between = _OUT * max(picture.height * width, height * picture.width)
        return _band(picture) + between + out
    if drafted := picture.drafted(height, width):
        return (_WIDEST + _OUT + _WIDEST) * drafted + out + OVERHEAD
    between = (_OUT + _WIDEST) * picture.pixels + _WIDEST * picture.height * width
    return max(_whole(picture), between) + out


def rows_bytes(picture: LargeImage) -> int:
    """Of `picture.rows()`. Reads a file that must be decoded as a whole. Raises Refused, as that."""
    if picture.bands is not None and picture.orientation == 1:
        return _band(picture)
    return _whole(picture)


def _band(picture: LargeImage) -> int:
    """Some sixteen bytes a pixel: packed, unpacked, unfiltered, as the decoder's picture, as RGB."""
    return 16 * picture.band_pixels + OVERHEAD


def _whole(picture: LargeImage) -> int:
    """With the encoded bytes, which are read for it."""
    data = picture.read()
    return decode_bytes(data, picture.limits.whole_pixels)[2] + len(data)
