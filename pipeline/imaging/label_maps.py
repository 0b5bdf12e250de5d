"""Label maps: in from PNG (BMP, TIFF) ids, out as a fast PNG, COCO run lengths or colours.

Ids are 8- or 16-bit. 255 (8-bit) and 65535 (16-bit) mean *ignore* and are never a class.
A mask is read as stored: no EXIF turning (Pillow turns TIFF by itself), no resampling, no colour management.
"""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.imaging.decode import STRIP_PIXELS, Image_HWC, Refused, open_header, short
from pipeline.imaging.mask_png import IGNORE as IGNORE
from pipeline.imaging.mask_png import IGNORE_COLOUR as IGNORE_COLOUR
from pipeline.imaging.mask_png import Colour as Colour
from pipeline.imaging.mask_png import Ids as Ids
from pipeline.imaging.mask_png import encode_png as encode_png

MAX_RUN = 1 << 32  # pixels of one run length; no image is that large, and sums of these fit in 64 bits
_LOSSY = ("JPEG", "WEBP")
_BITS, _PHOTOMETRIC = 258, 262  # TIFF 6.0 tags


def decode_mask(data: bytes, *, max_pixels: int, colours: Mapping[Colour, int] | None = None) -> Ids:
    """Encoded mask -> uint8 or uint16 ids, H x W.

    Grey values and palette indices are ids as stored, at any bit depth; a grey TIFF has 8 or 16 bits and 0 for black,
    because the decoder inverts or spreads the others' values. RGB(A) masks need `colours`, (r, g, b) -> id.

    Raises:
        Refused: the codes of `pipeline.imaging.decode`, or "lossy-mask", "tiff-mask", "rgb-mask", "unknown-colour".
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
        raise Refused(
            "unsupported-depth",
            f"mask pixels of kind {mode} (32 bits, signed or float) are no ids; save 8- or 16-bit grey, with -1 as 255 "
            "(in 16 bits 65535), which mean ignore",
        )
    if colours is None:
        raise Refused("rgb-mask", "the mask is in colours, not class ids; save class ids or give the classes' colours")
    return from_colours(pixels_HWC, colours)


def opaque(data: bytes, *, max_pixels: int) -> NDArray[np.bool_]:
    """Encoded picture -> H x W, True where it is painted: not transparent, or without an alpha channel not black.

    Raises:
        Refused: the codes of `pipeline.imaging.decode`.
    """
    _, image = open_header(data, max_pixels)
    try:
        image.load()
        if "A" in image.getbands() or "transparency" in image.info:
            painted_HW: NDArray[np.bool_] = np.asarray(image.convert("RGBA"))[..., 3] > 0
        else:
            painted_HW = np.asarray(image.convert("RGB")).max(axis=2) > 0
    except Exception as error:  # a plugin may raise nearly anything on damaged bytes
        raise Refused("corrupt", f"the picture cannot be decoded ({short(error)}); save it again") from error
    return painted_HW


def _grey_step(data: bytes, kind: str) -> int:
    """Pillow spreads 2- and 4-bit PNG greys over 0..255: the factor that undoes it. Byte 24 is the bit depth."""
    return {2: 85, 4: 17}.get(data[24], 1) if kind == "PNG" else 1


def from_colours(pixels_HWC: Image_HWC, colours: Mapping[Colour, int]) -> Ids:
    """H x W x 3 -> ids by exact colour, uint8 where the colours in use have ids that fit.

    Raises:
        Refused: "unknown-colour", with the first five and their pixels.
    """
    packed_HW = pixels_HWC[..., 0].astype(np.uint32)
    for channel in (1, 2):
        packed_HW <<= np.uint32(8)
        packed_HW |= pixels_HWC[..., channel]
    ids_HW = _colour_table(tuple(sorted(colours.items())))[packed_HW]
    if not ids_HW.all():
        raise _unknown_colours(packed_HW[ids_HW == 0])
    ids_HW -= np.uint16(1)
    narrow_HW: Ids = ids_HW.astype(np.uint8) if ids_HW.max(initial=0) <= IGNORE else ids_HW
    return narrow_HW


@lru_cache(4)
def _colour_table(colours: tuple[tuple[Colour, int], ...]) -> NDArray[np.uint16]:
    """Id + 1 of each of the 2^24 colours, 0 for one of no class. The system gives memory only to the pages in use."""
    table = np.zeros(1 << 24, np.uint16)
    for (red, green, blue), value in colours:
        table[red << 16 | green << 8 | blue] = value + 1
    return table


def _unknown_colours(packed_N: NDArray[np.uint32]) -> Refused:
    found, counts = np.unique(packed_N, return_counts=True)
    named = ", ".join(f"#{colour:06x} ({n} pixels)" for colour, n in zip(found[:5], counts[:5], strict=True))
    first = " ".join(map(str, int(found[0]).to_bytes(3, "big")))
    return Refused(
        "unknown-colour",
        f"the mask has {len(found)} colours of no class: {named}; give each to a class in the class file, or end that "
        f"file with `ignore {first}` where it means none",
    )


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
    blended_HWC = np.empty_like(image_HWC)
    step = max(1, STRIP_PIXELS // label_HW.shape[1])
    for top in range(0, len(label_HW), step):  # 16 bits a sample, so not for the whole image
        rows = np.s_[top : top + step]
        strip = image_HWC[rows] * keep[label_HW[rows]][:, :, None]
        strip += tint[label_HW[rows]]
        blended_HWC[rows] = strip >> 8
    return blended_HWC


def to_rle(mask_HW: NDArray[np.bool_], *, compressed: bool = True) -> dict[str, Any]:
    """Boolean mask -> COCO run lengths {"size": [h, w], "counts"}: column by column, starting with the run of False.

    `compressed` gives COCO's text form (what `pycocotools.mask.decode` takes), otherwise the list of run lengths.
    """
    return class_rles(mask_HW.astype(np.uint8), compressed=compressed).get(1) or _rle(
        [mask_HW.size], mask_HW.shape, compressed
    )


def class_rles(label_HW: NDArray[np.uint8], *, compressed: bool = True) -> dict[int, dict[str, Any]]:
    """Run lengths of every id present, as `to_rle(label_HW == id)` gives them, in one pass over the pixels."""
    return column_rles([label_HW], *label_HW.shape, compressed=compressed)


def column_rles(
    bands: Iterable[NDArray[np.uint8]], height: int, width: int, *, compressed: bool = True
) -> dict[int, dict[str, Any]]:
    """`class_rles` of a label map that comes in bands of columns, each `height` x n, from the left."""
    pieces, owners, done, last = [], [], 0, -1
    for band_HW in bands:
        flat = band_HW.ravel(order="F")
        begins = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
        begins = begins[1:] if flat[0] == last else begins  # the run of the band before goes on
        pieces.append(begins + done)
        owners.append(flat[begins])
        done, last = done + flat.size, int(flat[-1])
    starts, owner = np.concatenate(pieces), np.concatenate(owners)
    ends = np.append(starts[1:], height * width)
    answer = {}
    for value in np.unique(owner):
        mine = owner == value
        edges = np.stack([starts[mine], ends[mine]], axis=1).ravel()  # inside runs are never adjacent to each other
        counts = np.diff(edges, prepend=0)
        if edges[-1] < height * width:
            counts = np.append(counts, height * width - edges[-1])
        answer[int(value)] = _rle(counts.tolist(), (height, width), compressed)
    return answer


def _rle(counts: list[int], shape: tuple[int, ...], compressed: bool) -> dict[str, Any]:
    return {"size": list(shape), "counts": pack_counts(counts) if compressed else counts}


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


def _unpack_counts(text: str) -> NDArray[np.int64]:
    """The run lengths of COCO's text form, as `pack_counts` writes it."""
    fives = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    wrong = np.flatnonzero((fives < 0) | (fives >= 64))
    if wrong.size:
        raise Refused("bad-rle", f"character {text[wrong[0]]!r} cannot stand in COCO run lengths")
    ends = np.flatnonzero(fives < 32)
    if not fives.size:
        return fives
    if fives[-1] >= 32:
        raise Refused("bad-rle", "the COCO run lengths end inside a number")

    starts = np.concatenate(([0], ends[:-1] + 1))
    length = ends - starts + 1
    if length.max() > 12:
        raise Refused("bad-rle", f"a number of {length.max()} characters cannot stand in COCO run lengths")
    shift = 5 * (np.arange(len(fives)) - np.repeat(starts, length))
    values = np.add.reduceat((fives & 31) << shift, starts)
    values -= np.where(fives[ends] & 16, 1 << 5 * length, 0)
    if np.abs(values).max() > MAX_RUN:
        raise Refused("bad-rle", f"a run of {values[np.abs(values).argmax()]} pixels cannot stand in COCO run lengths")

    # From the fourth on each is the difference to the one two before.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _listed_counts(counts: Sequence[Any]) -> NDArray[np.int64]:
    """Run lengths as a list; also of strings or floats, which some tools write."""
    values = np.array(counts)
    return values if values.dtype == np.int64 and values.ndim == 1 else np.array([int(n) for n in counts], np.int64)


def from_rle(rle: Mapping[str, Any], *, max_pixels: int = 1 << 28) -> NDArray[np.bool_]:
    """COCO run lengths, list or text form -> boolean H x W. Raises Refused("bad-rle" | "too-many-pixels")."""
    counts, height, width = _checked_runs(rle, max_pixels)
    inside = np.arange(len(counts)) % 2 == 1
    mask_WH = np.repeat(inside, counts).reshape(width, height)
    return np.ascontiguousarray(mask_WH.T)


def rle_patch(
    rle: Mapping[str, Any], *, max_pixels: int = 1 << 28
) -> tuple[tuple[int, int], int, int, NDArray[np.bool_]]:
    """As `from_rle`, of the box alone that holds every pixel inside: ((H, W), its first row, its first column, the box)."""
    counts, height, width = _checked_runs(rle, max_pixels)
    edges = np.cumsum(counts)[: len(counts) // 2 * 2].reshape(-1, 2)  # begin and end of each run inside
    edges = edges[edges[:, 0] < edges[:, 1]]
    if not len(edges):
        return (height, width), 0, 0, np.zeros((0, 0), np.bool_)

    (first, begin), (last, end) = np.divmod(edges[:, 0], height), np.divmod(edges[:, 1] - 1, height)
    left, right = int(first[0]), int(last[-1]) + 1
    beyond = bool((first < last).any())  # a run that goes on in the next column holds its bottom and that one's top
    top, bottom = (0, height) if beyond else (int(begin.min()), int(end.max()) + 1)

    bounds = np.concatenate(([0], edges.ravel() - left * height, [(right - left) * height]))
    inside = np.arange(len(bounds) - 1) % 2 == 1
    mask_WH = np.repeat(inside, np.diff(bounds)).reshape(right - left, height)
    return (height, width), top, left, np.ascontiguousarray(mask_WH[:, top:bottom].T)


def _checked_runs(rle: Mapping[str, Any], max_pixels: int) -> tuple[NDArray[np.int64], int, int]:
    """(run lengths that add up to the pixels, height, width)."""
    try:
        height, width = (int(side) for side in rle["size"])
        counts = _unpack_counts(rle["counts"]) if isinstance(rle["counts"], str) else _listed_counts(rle["counts"])
    except Refused:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refused("bad-rle", f"run lengths need 'size': [h, w] and 'counts': {error!r}") from error
    if height < 1 or width < 1 or height * width > max_pixels:
        raise Refused("too-many-pixels", f"run lengths of {height} x {width} pixels; the limit is {max_pixels}")

    size = height * width
    fits = counts.size and counts.min() >= 0 and counts.max() <= size  # so the sum cannot overflow
    if not fits or counts.sum() != size:
        total = sum(counts.tolist())
        raise Refused("bad-rle", f"run lengths sum to {total}, not {height} x {width}, or one is negative")
    return counts, height, width
