"""A TIFF band of rows by band of rows: memory for a row of its strips or tiles, whatever the height.

Each strip or tile is compressed on its own, so each one, put behind a directory of its own, is a small TIFF. It goes to
the same decoder (libtiff through Pillow) and through the same colour rules as a whole image would: any compression, depth
and byte order that `pipeline.imaging.decode` reads is read here.

TIFF 6.0: 2 (structure), 15 (tiles).
"""

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from pipeline.imaging.decode import Image_HWC, Refused, SampleRange, is_wide, short, to_rgb

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _OFFSETS, _ORIENTATION, _SAMPLES = 256, 257, 258, 259, 273, 274, 277
_ROWS, _COUNTS, _PLANAR, _TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_COUNTS = 278, 279, 284, 322, 323, 324, 325
# What decides how samples become pixels: bits, compression, photometric, fill order, samples, planes, T4 and T6 options,
# predictor, colour map, extra samples, sample format, JPEG tables, YCbCr coefficients, subsampling, positions, range.
_COPIED = (258, 259, 262, 266, 277, 284, 292, 293, 317, 320, 338, 339, 347, 529, 530, 531, 532)
_UNCOMPRESSED, _OLD_JPEG = 1, 6
_BAND_PIXELS = 1 << 23  # of a row of strips or tiles: 24 MB as RGB, and a piece of it in the decoder
_DIRECTORY_BYTES = 8 << 20
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


@dataclass(frozen=True)
class TiffLayout:
    """Sizes of the image and of its pieces (strips or tiles) in pixels as stored, orientation, and what `bands` needs."""

    height: int
    width: int
    piece_height: int
    piece_width: int
    orientation: int
    several: bool
    by_rows: bool
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    directory: ImageFileDirectory_v2


def check_directory(file: BinaryIO) -> None:
    """Refuse a first directory whose values are more than 8 MB: the decoder makes a Python number of each.

    Raises Refused("corrupt" | "truncated").
    """
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)
        file.seek(min(at, 1 << 62))
        (entries,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
        if entries > 4096:
            raise Refused("corrupt", f"the TIFF's directory has {entries} entries; save the image again")
        total = 0
        for _ in range(entries):
            entry = file.read(20 if big else 12)
            kind, count = struct.unpack_from(order + ("HQ" if big else "HI"), entry, 2)
            total += _TYPE_BYTES.get(kind, 1) * count
    except struct.error as error:
        raise Refused("truncated", "the TIFF ends inside its directory; send the whole file") from error
    if total > _DIRECTORY_BYTES:
        raise Refused("corrupt", f"the TIFF's directory holds {total} bytes of values; save it with larger strips")


def layout(file: BinaryIO) -> TiffLayout:
    """Read the first directory; no pixel is read. Raises Refused("truncated" | "corrupt")."""
    check_directory(file)
    file.seek(0)
    try:
        image = TiffImageFile(file)  # also finds out whether the kind of pixel is known
        tags = image.tag_v2
        height, width = int(tags[_LENGTH]), int(tags[_WIDTH])
        tiled = _TILE_OFFSETS in tags
        if tiled:
            sides = int(tags[_TILE_LENGTH]), int(tags[_TILE_WIDTH])
        else:
            sides = min(int(tags.get(_ROWS, height)), height), width
        offsets = _numbers(tags.get(_TILE_OFFSETS if tiled else _OFFSETS, ()))
        counts = _numbers(tags.get(_TILE_COUNTS if tiled else _COUNTS, ()))
        orientation = int(tags.get(_ORIENTATION, 1))
    except Exception as error:  # the plugin may raise nearly anything on damaged bytes
        raise Refused(
            "corrupt", f"the TIFF header cannot be read ({short(error)}); send the original file again"
        ) from error
    if min(height, width, *sides) < 1:
        raise Refused("corrupt", f"the TIFF says {width} x {height} pixels in pieces of {sides[1]} x {sides[0]}")
    compression, planes = tags.get(_COMPRESSION, 1), tags.get(_PLANAR, 1)
    if compression == _UNCOMPRESSED and planes == 1 and not tiled and len(offsets) == 1:
        thin = max(1, min(height, _BAND_PIXELS // width))
        row = _row_bytes(width, tags)
        offsets, sides = tuple(offsets[0] + y * row for y in range(0, height, thin)), (thin, width)
        counts = tuple(min(thin, height - y) * row for y in range(0, height, thin))
    pieces = math.ceil(height / sides[0]) * math.ceil(width / sides[1])
    small = sides[0] * max(width, sides[1]) <= _BAND_PIXELS
    known = len(offsets) == len(counts) == pieces and max(counts) <= 8 * sides[0] * sides[1] + (1 << 16)
    by_rows = small and known and planes == 1 and compression != _OLD_JPEG
    orientation = orientation if 1 <= orientation <= 8 else 1
    return TiffLayout(height, width, *sides, orientation, tags.next != 0, by_rows, offsets, counts, tags)


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in (value if isinstance(value, tuple) else (value,)))


def _row_bytes(width: int, tags: ImageFileDirectory_v2) -> int:
    """Of an uncompressed row, each sample packed to its bits, the row to a byte."""
    bits, samples = _numbers(tags.get(_BITS, (1,))), int(tags.get(_SAMPLES, 1))
    return (width * (sum(bits) if len(bits) == samples else bits[0] * samples) + 7) // 8


def bands(file: BinaryIO, found: TiffLayout) -> Iterator[Image_HWC]:
    """RGB bands, n x width x 3, from the top, as stored (before the orientation): a row of strips or tiles each.

    Raises:
        Refused: "truncated", "corrupt" or "unsupported-depth"; after the last band "dark-16-bit".
    """
    samples = SampleRange(wide=False)
    across = math.ceil(found.width / found.piece_width)
    for number, top in enumerate(range(0, found.height, found.piece_height)):
        height = min(found.piece_height, found.height - top)
        if found.piece_width == found.width:
            yield _piece(file, found, number * across, (height, found.width), samples)
            continue
        band_HWC = np.empty((height, found.width, 3), np.uint8)
        for column in range(across):
            left = column * found.piece_width
            sides = (height, min(found.piece_width, found.width - left))
            band_HWC[:, left : left + sides[1]] = _piece(file, found, number * across + column, sides, samples)
        yield band_HWC
    samples.check()


def _piece(file: BinaryIO, found: TiffLayout, number: int, inside: tuple[int, int], samples: SampleRange) -> Image_HWC:
    """The part of a strip or tile that lies in the image, `inside` rows and columns of it."""
    file.seek(found.offsets[number])
    body = file.read(min(found.counts[number], 1 << 31))
    if len(body) < found.counts[number]:
        raise Refused("truncated", f"piece {number} of the TIFF is cut off; send the whole file")
    order = found.directory.prefix
    small = ImageFileDirectory_v2(order + (b"*\0" if order == b"II" else b"\0*") + bytes(4), prefix=order)
    for tag in _COPIED:
        if tag in found.directory:
            small.tagtype[tag] = found.directory.tagtype[tag]
            small[tag] = found.directory[tag]
    strip = found.piece_width == found.width
    height = inside[0] if strip else found.piece_height
    sides = {_WIDTH: found.piece_width, _LENGTH: height, _ROWS: height, _OFFSETS: 0, _COUNTS: len(body)}
    for tag, value in sides.items():
        small.tagtype[tag] = 4  # LONG
        small[tag] = value
    whole = io.BytesIO()
    small.save(whole)
    whole.write(body)
    whole.seek(0)
    try:
        image = TiffImageFile(whole)
        samples.wide = is_wide(image)
        image.load()
        return to_rgb(image.crop((0, 0, inside[1], inside[0])), samples)
    except Refused:
        raise
    except Exception as error:
        raise Refused(
            "corrupt", f"piece {number} of the TIFF cannot be decoded ({short(error)}); send the original file again"
        ) from error
