"""Label maps: in from PNG (BMP, TIFF) ids, out as a fast PNG, COCO run lengths or colours.

Ids are 8- or 16-bit. 255 (8-bit) and 65535 (16-bit) mean *ignore* and are never a class.
A mask is read as stored: no EXIF turning (Pillow turns TIFF by itself), no resampling, no colour management.
"""

import colorsys
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.images import Image_HWC, Refused, open_header, short

Ids = NDArray[np.uint8] | NDArray[np.uint16]
Colour = tuple[int, int, int]

IGNORE = 255
IGNORE_COLOUR: Colour = (224, 224, 192)  # the cream that PASCAL VOC draws its void border with
_LOSSY = ("JPEG", "WEBP")
_BITS, _PHOTOMETRIC = 258, 262  # TIFF 6.0 tags


def decode_mask(data: bytes, *, max_pixels: int, colours: Mapping[Colour, int] | None = None) -> Ids:
    """Encoded mask -> uint8 or uint16 ids, H x W.

    Grey values and palette indices are ids as stored, at any bit depth; a grey TIFF has 8 or 16 bits and 0 for black,
    because the decoder inverts or spreads the others' values. RGB(A) masks need `colours`, (r, g, b) -> id.

    Raises:
        Refused: the codes of `pipeline.images`, or "lossy-mask", "tiff-mask", "rgb-mask", "unknown-colour".
    """
    kind, image = open_header(data, max_pixels)
    if kind in _LOSSY:
        raise Refused("lossy-mask", f"{kind} blurs class ids; save masks as PNG")
    if isinstance(image, TiffImageFile) and (image.mode in ("1", "L") or image.mode.startswith("I;16")):
        bits, black = image.tag_v2.get(_BITS, (1,)), image.tag_v2.get(_PHOTOMETRIC)
        if bits not in ((8,), (16,)) or black != 1:
            raise Refused(
                "tiff-mask",
                f"a grey TIFF of {bits[0]} bits with photometric interpretation {black} does not give back its class "
                "ids; save the mask as PNG, or as TIFF with 8 or 16 bits where 0 is black (interpretation 1)",
            )
    try:
        image.load()
        mode = image.mode
        if mode == "P":
            return np.array(image)
        if mode in ("1", "L"):
            ids: NDArray[np.uint8] = np.array(image, dtype=np.uint8)
            if mode == "L":
                ids //= np.uint8(_grey_step(data, kind))
            return ids
        if mode.startswith("I;16"):
            wide: NDArray[np.uint16] = np.array(image).astype(np.uint16)
            return wide
        pixels_HWC = np.asarray(image.convert("RGB"))
    except Exception as error:  # a plugin may raise nearly anything on damaged bytes
        code = "truncated" if "truncated" in str(error) else "corrupt"
        raise Refused(code, f"the mask cannot be decoded ({short(error)}); save it again") from error
    if mode in ("I", "F") or mode.startswith(("I;", "F;")):
        raise Refused("unsupported-depth", f"mask pixels of kind {mode} are no ids; save 8- or 16-bit grey")
    if colours is None:
        raise Refused("rgb-mask", "the mask is in colours, not class ids; save class ids or give the classes' colours")
    return _from_colours(pixels_HWC, colours)


def _grey_step(data: bytes, kind: str) -> int:
    """Pillow spreads 2- and 4-bit PNG greys over 0..255: the factor that undoes it. Byte 24 is the bit depth."""
    return {2: 85, 4: 17}.get(data[24], 1) if kind == "PNG" else 1


def _from_colours(pixels_HWC: Image_HWC, colours: Mapping[Colour, int]) -> Ids:
    packed = pixels_HWC.astype(np.uint32)
    packed_HW = packed[..., 0] << 16 | packed[..., 1] << 8 | packed[..., 2]
    found, inverse, counts = np.unique(packed_HW, return_inverse=True, return_counts=True)
    table = {r << 16 | g << 8 | b: value for (r, g, b), value in colours.items()}
    unknown = [(int(colour), int(n)) for colour, n in zip(found, counts, strict=True) if int(colour) not in table]
    if unknown:
        named = ", ".join(f"#{colour:06x} ({n} pixels)" for colour, n in unknown[:5])
        raise Refused("unknown-colour", f"the mask has {len(unknown)} colours of no class: {named}; add them or fix it")
    ids = [table[int(colour)] for colour in found]
    lookup = np.array(ids, dtype=np.uint8 if max(ids) <= 255 else np.uint16)
    ids_HW: Ids = lookup[inverse.reshape(packed_HW.shape)]
    return ids_HW


def encode_png(label_HW: Ids, palette: Sequence[Colour] | None = None) -> bytes:
    """Ids -> PNG bytes, several times faster than Pillow's default and smaller.

    uint8 with a palette becomes an indexed PNG (index = id, 255 drawn as `IGNORE_COLOUR`), without one grey;
    uint16 becomes 16-bit grey. Pillow reads back the same ids.

    Every row is filtered by "up" (difference to the row above: nearly all zeros on a label map) and deflated with
    run lengths only (Z_RLE). Against filter 0 that is as fast and a quarter smaller. Indexed maps with ids up to 15 are
    packed two to a byte first, which halves the work; grey is not: readers spread 4-bit greys over 0..255.
    PNG specification, third edition: 5 (chunks), 7.2 (packing), 9 (filters).
    """
    if label_HW.ndim != 2 or 0 in label_HW.shape:
        raise ValueError(f"a label map has two axes and at least one pixel, got shape {label_HW.shape}")
    if label_HW.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"a label map is uint8 or uint16, got {label_HW.dtype}")
    height, width = label_HW.shape
    rows: NDArray[np.uint8]
    if label_HW.dtype == np.uint16:
        if palette is not None:
            raise ValueError("a palette has at most 256 entries; write 16-bit ids without one")
        depth, rows = 16, np.ascontiguousarray(label_HW.astype(">u2")).view(np.uint8)
    else:
        depth, rows = 8, label_HW.astype(np.uint8, copy=False)
        if palette is not None and int(label_HW.max()) <= 15:
            depth, rows = 4, _pack_nibbles(rows)
    head = struct.pack(">IIBBBBB", width, height, depth, 0 if palette is None else 3, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", head)]
    if palette is not None:
        parts.append(_chunk(b"PLTE", _palette_bytes(palette, int(label_HW.max()), 1 << depth)))
    parts += [_chunk(b"IDAT", _deflate(_filter_up(rows))), _chunk(b"IEND", b"")]
    return b"".join(parts)


def _pack_nibbles(ids_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two ids (each <= 15) a byte, left one high. The pair as one number, left + 256 right, times 4097 has
    16 left + right as its high byte: one pass instead of five."""
    if ids_HW.shape[1] % 2:
        ids_HW = np.pad(ids_HW, ((0, 0), (0, 1)))
    pairs = np.ascontiguousarray(ids_HW).view("<u2") * np.uint16(4097)
    return pairs.astype("<u2", copy=False).view(np.uint8)[:, 1::2]


def _filter_up(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def _deflate(raw: NDArray[np.uint8]) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 8, zlib.Z_RLE)
    return packer.compress(raw.data) + packer.flush()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _palette_bytes(palette: Sequence[Colour], highest: int, most: int) -> bytes:
    """PLTE body long enough for `highest`; entry 255, where present, is the ignore colour; gaps are black."""
    length = min(max(len(palette), highest + 1), most)
    table = np.zeros((length, 3), np.uint8)
    given = np.array(palette, dtype=np.uint8).reshape(-1, 3)[:length]
    table[: len(given)] = given
    if length == 256:
        table[IGNORE] = IGNORE_COLOUR
    return table.tobytes()


def palette(k: int) -> list[Colour]:
    """k distinct colours (k <= 255), well apart for neighbours: golden-ratio hues over alternating lightness."""
    if not 0 <= k <= 255:
        raise ValueError(f"at most 255 classes have 8-bit ids, got {k}")
    colours = []
    for i in range(k):
        red, green, blue = colorsys.hls_to_rgb(
            i * 0.6180339887 % 1.0, (0.5, 0.35, 0.68)[i % 3], (0.85, 0.6)[i // 3 % 2]
        )
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colours


def _lookup(colours: Sequence[Colour]) -> NDArray[np.uint8]:
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = np.array(colours, dtype=np.uint8).reshape(-1, 3)
    table[IGNORE] = IGNORE_COLOUR
    return table


def colourise(label_HW: NDArray[np.uint8], colours: Sequence[Colour]) -> Image_HWC:
    """uint8 ids -> H x W x 3; ids beyond `colours` are black, 255 is `IGNORE_COLOUR`."""
    return _lookup(colours)[label_HW]


def overlay(
    image_HWC: Image_HWC, label_HW: NDArray[np.uint8], colours: Sequence[Colour], alpha: float = 0.5
) -> Image_HWC:
    """Colours over the picture: (image * (256 - a) + colour * a + 128) >> 8, a = round(256 alpha); 255 stays."""
    if image_HWC.shape[:2] != label_HW.shape:
        raise ValueError(f"image is {image_HWC.shape[:2]} but the label map is {label_HW.shape}")
    weight = round(256 * alpha)
    tint = (_lookup(colours).astype(np.uint16) * weight + 128).astype(np.uint16)
    keep = np.full(256, 256 - weight, np.uint16)
    tint[IGNORE], keep[IGNORE] = 0, 256
    blended = image_HWC * keep[label_HW][:, :, None]
    blended += tint[label_HW]
    blended >>= 8
    return blended.astype(np.uint8)


def to_rle(mask_HW: NDArray[np.bool_], *, compressed: bool = True) -> dict[str, Any]:
    """Boolean mask -> COCO run lengths {"size": [h, w], "counts"}: column by column, starting with the run of False.

    `compressed` gives COCO's text form (what `pycocotools.mask.decode` takes), otherwise the list of run lengths.
    """
    return class_rles(mask_HW.astype(np.uint8), compressed=compressed).get(1) or _rle(
        [mask_HW.size], mask_HW, compressed
    )


def class_rles(label_HW: NDArray[np.uint8], *, compressed: bool = True) -> dict[int, dict[str, Any]]:
    """Run lengths of every id present, as `to_rle(label_HW == id)` gives them, in one pass over the pixels."""
    flat = label_HW.ravel(order="F")
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    ends = np.append(starts[1:], flat.size)
    owner = flat[starts]
    answer = {}
    for value in np.unique(owner):
        mine = owner == value
        edges = np.stack([starts[mine], ends[mine]], axis=1).ravel()  # inside runs are never adjacent to each other
        counts = np.diff(edges, prepend=0)
        if edges[-1] < flat.size:
            counts = np.append(counts, flat.size - edges[-1])
        answer[int(value)] = _rle(counts.tolist(), label_HW, compressed)
    return answer


def _rle(counts: list[int], mask_HW: NDArray[Any], compressed: bool) -> dict[str, Any]:
    return {"size": list(mask_HW.shape), "counts": pack_counts(counts) if compressed else counts}


def pack_counts(counts: list[int]) -> str:
    """COCO's text form: from the fourth on, the difference to the count two before; 5 bits a character, low bits first,
    bit 5 says that more follow, character = value + 48; the last one's bit 4 is the sign."""
    values = np.array(counts, dtype=np.int64)
    values[3:] -= np.array(counts, dtype=np.int64)[1:-2]
    characters = np.zeros((len(values), 13), np.uint8)
    used = np.zeros(characters.shape, np.bool_)
    active = np.ones(len(values), np.bool_)
    for column in range(characters.shape[1]):
        five = values & 31
        values = values >> 5
        more = values != np.where(five & 16, -1, 0)
        characters[:, column] = five + 32 * more + 48
        used[:, column] = active
        active = active & more
        if not active.any():
            break
    return characters[used].tobytes().decode("ascii")


def _unpack_counts(text: str) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for character in text.encode("ascii", "replace"):
        five = character - 48
        if not 0 <= five < 64 or shift > 60:
            raise Refused("bad-rle", f"character {chr(character)!r} cannot stand in COCO run lengths")
        value |= (five & 31) << shift
        shift += 5
        if five & 32:
            continue
        if five & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise Refused("bad-rle", "the COCO run lengths end inside a number")
    return counts


def from_rle(rle: Mapping[str, Any], *, max_pixels: int = 1 << 28) -> NDArray[np.bool_]:
    """COCO run lengths, list or text form -> boolean H x W. Raises Refused("bad-rle" | "too-many-pixels")."""
    try:
        height, width = (int(side) for side in rle["size"])
        counts = _unpack_counts(rle["counts"]) if isinstance(rle["counts"], str) else [int(n) for n in rle["counts"]]
    except Refused:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refused("bad-rle", f"run lengths need 'size': [h, w] and 'counts': {error!r}") from error
    if height < 1 or width < 1 or height * width > max_pixels:
        raise Refused("too-many-pixels", f"run lengths of {height} x {width} pixels; the limit is {max_pixels}")
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise Refused("bad-rle", f"run lengths sum to {sum(counts)}, not {height} x {width}, or one is negative")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(width, height).T.copy()
