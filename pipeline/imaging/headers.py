"""What an image's header says, read before a pixel is decoded: PNG's chunks, WebP's canvas, EXIF's turn, TIFF's directories."""

import io
import struct
import zlib
from typing import BinaryIO

from PIL import TiffImagePlugin

_ORIENTATION = 0x0112
TILE_WIDTH, TILE_LENGTH, ROWS_PER_STRIP = 322, 323, 278
_SUBFILE_TYPE, BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 254, 258, 277
_COMPRESSION, _PLANES = 259, 284
_NO_PAGE = 1 | 4  # reduced resolution, transparency mask
MAX_DIRECTORIES = 32
_HEADER_BYTES = 32 << 20  # of a JPEG before its scan: a camera's previews fit, the decoder keeps all of it


class Refused(ValueError):
    """Bytes that will not become an image or a mask.

    Attributes:
        code: short kebab-case reason, one of "empty", "not-an-image", "unsupported-format", "truncated", "corrupt",
            "too-many-pixels", "bad-aspect", "animated", "unsupported-depth" here; `pipeline.imaging.label_maps` adds its own.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["Refused"], tuple[str, str]]:
        return Refused, (self.code, str(self))  # crosses process pools with its code


def short(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise Refused("corrupt", f"the header says {width} x {height} pixels; send the original file again")
    if width * height > max_pixels:
        raise Refused(
            "too-many-pixels",
            f"{width} x {height} = {width * height} pixels, over the limit of {max_pixels}; scale it down",
        )


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    """Verify every chunk's CRC up to IEND; return the chunks before the pixel data (IHDR, acTL...), and eXIf, which may
    stand on either side of it (PNG specification, third edition, 5.6).

    Raises Refused("corrupt") on a bad checksum and Refused("truncated") when IEND is never reached.
    """
    view, at, found, pixels = memoryview(data), 8, dict[bytes, bytes](), False
    while at + 12 <= len(view):
        length = int.from_bytes(view[at : at + 4], "big")
        kind = bytes(view[at + 4 : at + 8])
        if at + 12 + length > len(view):
            break
        if zlib.crc32(view[at + 4 : at + 8 + length]) != int.from_bytes(
            view[at + 8 + length : at + 12 + length], "big"
        ):
            raise Refused(
                "corrupt", f"PNG chunk {kind!r} at byte {at} has a wrong checksum; send the original file again"
            )
        pixels = pixels or kind == b"IDAT"
        if kind == b"IEND":
            return found
        if not pixels or kind == b"eXIf":
            found.setdefault(kind, bytes(view[at + 8 : at + 8 + length]))
        at += 12 + length
    raise Refused("truncated", f"the PNG ends after {len(data)} bytes, before its end mark; send the whole file")


def webp_size(data: bytes) -> tuple[int, int, bool]:
    """(width, height, animated) from the WebP header: the decoder allocates the whole canvas when it opens a file."""
    if len(data) < 30:
        raise Refused("truncated", "the WebP ends inside its header; send the whole file")
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise Refused("truncated", f"the WebP ends after {len(data)} bytes, before its stated end; send the whole file")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        return width, height, bool(data[20] & 0x02)
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, False
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF, False
    raise Refused("corrupt", "the WebP has no picture chunk; send the original file again")


def exif_orientation(exif: bytes) -> int:
    """Orientation 1..8 out of an EXIF block (TIFF layout, first directory); 1 if absent or damaged."""
    tiff = exif[6:] if exif.startswith(b"Exif\x00\x00") else exif
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return 1
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    if at + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, entry)
        if tag == _ORIENTATION:
            (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, entry + 8)
            return value if 1 <= value <= 8 else 1
    return 1


def check_tiff(image: TiffImagePlugin.TiffImageFile, max_pixels: int) -> None:
    """Refuse a second page (looking one directory ahead, not walking all of them) and tiles larger than the budget."""
    bits, planes = image.tag_v2.get(BITS_PER_SAMPLE, (1,)), image.tag_v2.get(_PLANES, 1)
    if planes == 2 and max(bits) > 8 and image.tag_v2.get(_COMPRESSION, 1) == 1:
        # Pillow would take each plane's bytes for samples of 8 bits, without a word.
        raise Refused(
            "unsupported-depth",
            f"a TIFF of {max(bits)} bits a sample, band by band and not compressed; save it pixel by pixel or compressed",
        )
    tile = [image.tag_v2.get(tag, 1) for tag in (TILE_WIDTH, TILE_LENGTH)]
    if not all(isinstance(side, int) for side in tile) or tile[0] * tile[1] > max(max_pixels, 1 << 20):
        raise Refused(
            "too-many-pixels",
            f"the TIFF has tiles of {tile[0]} x {tile[1]} pixels, more than the limit of {max_pixels}",
        )
    first = (image.tag_v2.get(_SUBFILE_TYPE, 0), image.size)
    try:
        for directory in range(1, MAX_DIRECTORIES):
            image.seek(directory)
            if not int(image.tag_v2.get(_SUBFILE_TYPE, 0)) & _NO_PAGE:
                raise Refused("animated", "a TIFF of several pages has no single image to segment; send one page")
        raise Refused("animated", f"a TIFF of more than {MAX_DIRECTORIES} directories; send one page")
    except EOFError:
        image.seek(0)
    except Refused:
        raise
    except Exception as error:
        raise Refused("corrupt", f"the TIFF's directories cannot be read ({short(error)}); send one page") from error
    if (image.tag_v2.get(_SUBFILE_TYPE, 0), image.size) != first:
        raise Refused("corrupt", "the TIFF's first directory changes as it is read; send one page")


def tiff_samples(data: bytes) -> str:
    """`5 bands of 16 bits` out of a TIFF's first directory; "" where it cannot be read, or is of a kind that is taken."""
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        bits, bands = directory.get(BITS_PER_SAMPLE, (1,)), directory.get(SAMPLES_PER_PIXEL, 1)
        taken = bands <= 4 and (bands == 1 or max(bits) <= 8)
        return "" if taken else f"{bands} bands of {', '.join(map(str, sorted(set(bits))))} bits"
    except Exception:  # it may be damaged in any way, and only the message gets worse
        return ""


def jpeg_one_scan(file: BinaryIO) -> bool:
    """True for a sequential JPEG with all components in its first scan: libjpeg then decodes with a few rows in memory.

    ITU-T T.81, B.1.1.3 (markers), B.2.2 (frame header), B.2.3 (scan header). Raises Refused("corrupt" | "truncated").
    """
    at, frame, components = 2, 0, 0
    end = file.seek(0, io.SEEK_END)
    while at < min(end, _HEADER_BYTES):
        file.seek(at)
        head = file.read(10)
        if len(head) < 5:
            break
        if head[0] != 0xFF:
            raise Refused("corrupt", f"byte {at} of the JPEG should begin a marker; send the original file again")
        if head[1] in (0xFF, 0x01) or 0xD0 <= head[1] <= 0xD8:  # fill bytes and markers without a body
            at += 1 if head[1] == 0xFF else 2
            continue
        if head[1] == 0xDA:
            return frame in (0xC0, 0xC1) and components == head[4]
        if 0xC0 <= head[1] <= 0xCF and head[1] not in (0xC4, 0xC8, 0xCC) and len(head) == 10:
            frame, components = head[1], head[9]
        at += 2 + int.from_bytes(head[2:4], "big")
    raise Refused(
        "truncated" if at >= end else "corrupt", f"no picture in the first {at} bytes of the JPEG; send the whole file"
    )
