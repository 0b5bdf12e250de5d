"""What a mask file's pixels say: class ids, or the classes' colours. Found out by looking, and rendered to ids.

A palette PNG holds indices and, beside them, the colours to show them in. The indices are the ids, whatever the palette
shows: opened as RGB they would be lost. Only where they cannot be ids (beyond the classes) and every colour in use is a
class's, its colours count; where both could be meant and differ, the user is asked.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.ImageFile import ImageFile

from pipeline.formats.common.source import SourceError
from pipeline.imaging import decode, label_maps
from pipeline.imaging.mask_png import Colour

BLACK_AND_WHITE: dict[Colour, int] = {(0, 0, 0): 0, (255, 255, 255): 1}
BLACK_AND_WHITE_NOTE = "there are two classes without colours: black is the first, white the second"
BINARY_NOTE = "masks hold only 0 and 255 and there are two classes: 0 is the first, 255 the second"
SAMPLE = 32
STRAYS = 4  # so many times as many masks of one kind make the other ones strays, which ingest quarantines
_RENDERED = ("RGB", "RGBA", "LA", "PA", "La", "RGBa", "CMYK", "YCbCr")


def decide(
    paths: Sequence[Path],
    classes: int | None,
    colours: Mapping[Colour, int],
    max_pixels: int,
    prefer: str | None = None,
) -> str:
    """ "ids" or "colours", from up to `SAMPLE` masks spread over `paths`.

    Args:
        classes: how many there are; None when only the masks can say (then they are ids).
        colours: the classes' colours, and those that mean ignore -> 255.
        prefer: the answer where palettes could mean either; None: that is an error.

    Raises:
        SourceError: masks of both kinds, neither of them rare, or palettes that could mean either; says what to set.
    """
    step = max(1, len(paths) // SAMPLE)
    votes: dict[str, list[Path]] = {}
    for path in paths[::step][:SAMPLE]:
        try:
            votes.setdefault(_kind(path.read_bytes(), classes, colours, max_pixels), []).append(path)
        except decode.Refused:
            continue  # ingest quarantines it with its reason
    some, others = (len(votes.get(kind, ())) for kind in ("ids", "colours"))
    if min(some, others) * STRAYS > max(some, others):
        raise SourceError(
            f"{votes['ids'][0]} holds class ids but {votes['colours'][0]} colours; set data.masks to ids or colours: masks of "
            "the other kind are then quarantined"
        )
    if list(votes) == ["either"] and prefer is not None:
        return prefer
    if list(votes) == ["either"]:
        raise SourceError(
            f"{votes['either'][0]}: its palette's indices and its palette's colours name different classes; set data.masks: "
            "ids (the indices count) or colours (the palette does)"
        )
    return "colours" if others > some else "ids"


def _kind(data: bytes, classes: int | None, colours: Mapping[Colour, int], max_pixels: int) -> str:
    _, image = _load(data, max_pixels)
    if image.mode in _RENDERED:
        return "colours"
    if image.mode != "P" or classes is None:
        return "ids"
    ids = np.unique(np.asarray(image))
    table = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    shown = [tuple(int(v) for v in table[k]) if k < len(table) else None for k in ids]
    by_colour = [colours.get(c) if c is not None and len(c) == 3 else None for c in shown]
    as_ids, as_colours = all(k < classes or k == label_maps.IGNORE for k in ids), None not in by_colour
    if as_ids and as_colours:
        return "ids" if by_colour == ids.tolist() else "either"
    return "colours" if as_colours else "ids"


def are_0_and_255(paths: Iterable[Path], classes: int | None, max_pixels: int) -> bool:
    """Whether the masks hold the ids 0 and 255 and no others: masks of two classes as image editors and many tools save them,
    not class 0 with ignored pixels. In masks of 16 bits 65535 is 255.

    Args:
        classes: how many there are; None when only the masks can say. A mask of ids beyond them has no say: it is refused
            either way (a smoothed edge, a picture among the masks).
    """
    found = set[int]()
    for path in paths:
        try:
            ids_HW = label_maps.decode_mask(path.read_bytes(), max_pixels=max_pixels)
        except decode.Refused:
            continue  # ingest quarantines it with its reason
        here = {255 if k == 65535 else int(k) for k in np.flatnonzero(np.bincount(ids_HW.ravel()))}
        if here <= {0, 255}:
            found |= here
        elif classes is None or max(here - {255}) < max(classes, 2):
            return False
    return found == {0, 255}


def render_0_and_255(path: Path, max_pixels: int) -> bytes:
    """Mask file of 0 and 255 -> PNG of the ids 0 and 1.

    Raises:
        images.Refused: as `label_maps.decode_mask`; "binary-mask" where there are other values.
    """
    ids_HW = label_maps.decode_mask(path.read_bytes(), max_pixels=max_pixels)
    if (odd := np.setdiff1d(ids_HW, (0, 255, 65535))).size:
        listed = ", ".join(map(str, odd[:5]))
        raise decode.Refused(
            "binary-mask", f"the other masks hold only 0 and 255, this one also {listed}; threshold it"
        )
    return label_maps.encode_png((ids_HW > 0).astype(np.uint8))


def _load(data: bytes, max_pixels: int) -> tuple[str, ImageFile]:
    kind, image = decode.open_header(data, max_pixels)
    if kind in ("JPEG", "WEBP"):
        raise decode.Refused("lossy-mask", f"{kind} blurs masks; save them as PNG")
    try:
        image.load()
    except Exception as error:  # a plugin may raise nearly anything on damaged bytes
        code = "truncated" if "truncated" in str(error) else "corrupt"
        raise decode.Refused(code, f"the mask cannot be decoded ({decode.short(error)}); save it again") from error
    return kind, image


def colours_of(classes: Sequence[Mapping[str, Any]], ignored: Sequence[Colour], where: str) -> dict[Colour, int]:
    """Class colours and ignored colours -> id. Raises SourceError where two classes have one colour."""
    found: dict[Colour, int] = {}
    for item in classes:
        red, green, blue = (int(value) for value in item["color"])
        if (red, green, blue) in found:
            raise SourceError(f"{where}: two classes have the colour {red} {green} {blue}; give each its own")
        found[red, green, blue] = int(item["id"])
    return dict.fromkeys((label_maps.IGNORE_COLOUR, *ignored), label_maps.IGNORE) | found


def render(path: Path, colours: Mapping[Colour, int], max_pixels: int, tally: Counter[str]) -> bytes:
    """Mask file in colours (RGB, RGBA, grey or palette) -> PNG of ids. Fully transparent pixels become 255 (ignore).

    Raises:
        images.Refused: as `label_maps.decode_mask`; "rgb-mask" where a pixel is half transparent.
    """
    _, image = _load(path.read_bytes(), max_pixels)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise decode.Refused("rgb-mask", f"the mask has pixels of kind {image.mode}, not colours; set data.masks: ids")
    clear_HW = None
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        rgba_HWC = np.asarray(image.convert("RGBA"))
        pixels_HWC, alpha_HW = np.ascontiguousarray(rgba_HWC[..., :3]), rgba_HWC[..., 3]
        if not np.isin(alpha_HW, (0, 255)).all():
            raise decode.Refused("rgb-mask", "the mask has half transparent pixels, which mix colours; save it opaque")
        if not alpha_HW.all():
            clear_HW = alpha_HW == 0
            pixels_HWC[clear_HW] = label_maps.IGNORE_COLOUR
            tally["colour masks with transparent pixels (ignored)"] += 1
    else:
        pixels_HWC = np.asarray(image.convert("RGB"))
    ids_HW = label_maps.from_colours(pixels_HWC, colours)
    if clear_HW is not None:
        ids_HW[clear_HW] = label_maps.IGNORE
    return label_maps.encode_png(ids_HW)
