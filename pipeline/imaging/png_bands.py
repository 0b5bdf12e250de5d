"""A PNG band of rows by band of rows: memory for a band, whatever the height.

Pillow's decoder gives nothing before the last row. It does not need to: the rows are inflated here as they come, and each
band goes to that decoder as a small PNG of its own. Twice: once as plain bytes, with the last row of the band before on
top, to undo the row filters in C; once as what it is (grey, palette, 16 bits, with transparency) where that is not RGB
already. So the colour rules are those of `pipeline.imaging.decode`, by the same code.

PNG specification, third edition: 5 (chunks), 7 (filter and sample layout), 9 (filters), 10 (one zlib stream).
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from pipeline.imaging.decode import Image_HWC, Refused, SampleRange, to_rgb
from pipeline.imaging.headers import exif_orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BAND_PIXELS = 1 << 18  # of four bytes each, as the decoder holds them; copies on the way take some ten times that
_PIECE = 1 << 16
# An encoder writes chunks of 8 KiB and more; a file that is all chunk headers would only cost time.
_MOST_CHUNKS, _LARGEST_KEPT = 1 << 18, 1 << 20
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_AS_BYTES = {1: 0, 2: 4, 3: 2, 4: 6}  # 8-bit colour type whose pixel has that many bytes
_KEPT = (b"PLTE", b"tRNS", b"eXIf")


@dataclass(frozen=True)
class PngLayout:
    """What a PNG's chunks say: sizes in pixels, bits per sample, colour type, Adam7 or not, EXIF orientation, and the
    chunks that its colours need."""

    height: int
    width: int
    depth: int
    colour: int
    interlaced: bool
    animated: bool
    orientation: int
    colours: tuple[tuple[bytes, bytes], ...]

    @property
    def pixel_bytes(self) -> int:
        """Distance in bytes to the pixel that the filters look at."""
        return max(1, _CHANNELS[self.colour] * self.depth // 8)

    @property
    def row_bytes(self) -> int:
        return (self.width * _CHANNELS[self.colour] * self.depth + 7) // 8

    @property
    def by_rows(self) -> bool:
        """Whether `bands` can read it: not interlaced, and not 16-bit colour (no 8-bit pixel is as wide)."""
        return not self.interlaced and self.pixel_bytes in _AS_BYTES


def _heads(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(kind, length) of each chunk up to IEND, the file standing at its body; the caller may read the body or not.

    Raises Refused("truncated" | "corrupt").
    """
    size = file.seek(0, io.SEEK_END)
    at = len(SIGNATURE)
    for _ in range(_MOST_CHUNKS):
        file.seek(at)
        head = file.read(8)
        length = int.from_bytes(head[:4], "big")
        if len(head) < 8 or at + 12 + length > size:
            raise Refused("truncated", f"the PNG ends after {size} bytes, before its end mark; send the whole file")
        yield head[4:], length
        if head[4:] == b"IEND":
            return
        at += 12 + length
    raise Refused("corrupt", f"the PNG has more than {_MOST_CHUNKS} chunks; save it again")


def _body(file: BinaryIO, kind: bytes, length: int) -> Iterator[bytes]:
    """A chunk's body in pieces; Refused("corrupt") at its end if the checksum is wrong."""
    at, found = file.tell() - 8, zlib.crc32(kind)
    while length:
        piece = file.read(min(length, _PIECE))
        if not piece:
            raise Refused("truncated", f"PNG chunk {kind!r} at byte {at} is cut off; send the whole file")
        found, length = zlib.crc32(piece, found), length - len(piece)
        yield piece
    if file.read(4) != found.to_bytes(4, "big"):
        raise Refused("corrupt", f"PNG chunk {kind!r} at byte {at} has a wrong checksum; send the original file again")


def layout(file: BinaryIO) -> PngLayout:
    """Walk the chunk heads; no pixel is read. Raises Refused("truncated" | "corrupt")."""
    kept: dict[bytes, bytes] = {}
    head, animated = b"", False
    for number, (kind, length) in enumerate(_heads(file)):
        if number == 0:
            if kind != b"IHDR" or length != 13:
                raise Refused("corrupt", "the PNG does not begin with its header; send the original file again")
            head = b"".join(_body(file, kind, length))
        animated = animated or kind == b"acTL"
        if kind in _KEPT and kind not in kept:
            if length > _LARGEST_KEPT:
                raise Refused("corrupt", f"PNG chunk {kind!r} has {length} bytes; save the image again")
            kept[kind] = b"".join(_body(file, kind, length))
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", head)
    if depth not in _DEPTHS.get(colour, ()) or 0 in (width, height) or (colour == 3 and b"PLTE" not in kept):
        raise Refused("corrupt", f"a PNG of {width} x {height} pixels, {depth} bits and colour type {colour} is none")
    colours = tuple((kind, kept[kind]) for kind in _KEPT[:2] if kind in kept)
    orientation = exif_orientation(kept.get(b"eXIf", b""))
    return PngLayout(height, width, depth, colour, interlace != 0, animated, orientation, colours)


def bands(file: BinaryIO, found: PngLayout) -> Iterator[Image_HWC]:
    """RGB bands, n x width x 3, from the top, as stored (before the EXIF orientation).

    Raises:
        Refused: "truncated" or "corrupt", also for a wrong checksum anywhere in the file, or "dark-16-bit", at the latest
        after the last band; "unsupported-depth" is not possible here.
    """
    samples = SampleRange(found.depth == 16)
    rows = max(1, 4 * BAND_PIXELS // max(found.row_bytes, 4 * found.width))
    above: NDArray[np.uint8] = np.zeros(found.row_bytes, np.uint8)
    pieces = _inflated(file, found, rows)
    for filtered in pieces:
        raw = _unfiltered(filtered, above, found)
        above = raw[-1].copy()
        yield _coloured(raw, found, samples)
    samples.check()


def _inflated(file: BinaryIO, found: PngLayout, rows: int) -> Iterator[NDArray[np.uint8]]:
    """Filter byte and filtered bytes of `rows` rows at a time (the last time fewer); then the rest of the file."""
    inflate, done, line = zlib.decompressobj(), 0, found.row_bytes + 1
    held = bytearray()
    for kind, length in _heads(file):
        for piece in _body(file, kind, length):
            while kind == b"IDAT" and piece and done < found.height:
                wanted = min(rows, found.height - done) * line
                try:
                    held += inflate.decompress(piece, wanted - len(held))
                except zlib.error as error:
                    raise Refused(
                        "corrupt", f"the PNG's pixels cannot be inflated ({error}); send the original file again"
                    ) from error
                piece = inflate.unconsumed_tail
                if len(held) == wanted:
                    done += wanted // line
                    yield np.frombuffer(bytes(held), np.uint8).reshape(-1, line)
                    held.clear()
                elif inflate.eof:
                    break
    if done < found.height:
        raise Refused("truncated", f"the PNG has {done} of its {found.height} rows; send the whole file")


def _small(height: int, width: int, depth: int, colour: int, lines: NDArray[np.uint8], more: bytes = b"") -> bytes:
    """A PNG around rows that have their filter bytes; `more` are whole chunks. Stored, not compressed."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(lines.data, 0)
    return SIGNATURE + _chunk(b"IHDR", head) + more + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _unfiltered(filtered: NDArray[np.uint8], above: NDArray[np.uint8], found: PngLayout) -> NDArray[np.uint8]:
    """n x (1 + row bytes) -> n x row bytes: the band read as pixels of single bytes, below the row above it."""
    if int(filtered[:, 0].max()) > 4:
        raise Refused("corrupt", f"the PNG has a row filter {filtered[:, 0].max()}; send the original file again")
    lines = np.empty((len(filtered) + 1, filtered.shape[1]), np.uint8)
    lines[0, 0], lines[0, 1:], lines[1:] = 0, above, filtered
    step = found.pixel_bytes
    image = PngImageFile(io.BytesIO(_small(len(lines), found.row_bytes // step, 8, _AS_BYTES[step], lines)))
    return np.asarray(image).reshape(len(lines), found.row_bytes)[1:]


def _coloured(raw: NDArray[np.uint8], found: PngLayout, samples: SampleRange) -> Image_HWC:
    if (found.depth, found.colour) == (8, 2) and not any(kind == b"tRNS" for kind, _ in found.colours):
        return raw.reshape(len(raw), found.width, 3)
    lines = np.pad(raw, ((0, 0), (1, 0)))
    more = b"".join(_chunk(kind, body) for kind, body in found.colours)
    image = PngImageFile(io.BytesIO(_small(len(raw), found.width, found.depth, found.colour, lines, more)))
    image.load()
    return to_rgb(image, samples)
