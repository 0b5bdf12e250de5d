"""One binary mask for each class of an image -> one label map.

The three layouts in use, told apart by which part is an image's name id:

    masks/NAME/CLASS.png    masks/CLASS/NAME.png    masks/NAME_CLASS.png

Where classes overlap, the later one in the class list wins (the list goes from the background to what lies on it).
Pixels in none of them are what `data.unannotated` says.

Where there is one class, an image may also have several numbered masks (`x_mask.png`, `x_mask_1.png`, as BUSI has them): of
one object each, to be united.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from pipeline.formats.common.rasterize import Mask_HW
from pipeline.formats.common.source import name_id
from pipeline.imaging import decode, label_maps

_NUMBERED = re.compile(r"(.+[ ._-](?:masks?|segm?|labels?|gt))[ ._-]?\(?\d{1,3}\)?", re.IGNORECASE)


def numbered(mask_files: Mapping[str, Path], ids: Set[str]) -> dict[str, list[Path]]:
    """Masks that differ in a number behind a mask's word: the name without it -> all of them, that without a number first.

    Args:
        ids: name ids of the images; a mask of an image's own name is that image's.
    """
    bases: dict[str, list[Path]] = {}
    for name, path in sorted(mask_files.items()):
        key = name_id(name)
        if key not in ids and (found := _NUMBERED.fullmatch(key)):
            bases.setdefault(f"{found[1]}{path.suffix}", []).append(path)
    whole = {base: [mask_files[base]] if base in mask_files else [] for base in bases}
    return {base: both for base, paths in bases.items() if len(both := [*whole[base], *paths]) > 1}


def render_united(paths: Sequence[Path], max_pixels: int) -> bytes:
    """Numbered masks of one image -> PNG of the ids 0 and 1. Raises images.Refused as `render`."""
    inside_HW = read(paths[0].read_bytes(), max_pixels)
    for path in paths[1:]:
        more_HW = read(path.read_bytes(), max_pixels)
        if more_HW.shape != inside_HW.shape:
            raise decode.Refused("mask-size", f"{path.name} has another size than {paths[0].name}; export it again")
        inside_HW |= more_HW
    return label_maps.encode_png(inside_HW.astype(np.uint8))


def candidates(key: str, ids: Set[str]) -> Iterator[tuple[str, str]]:
    """(image name id, class name) by each layout that `key`, a mask's path without extension, fits."""
    before, _, last = key.rpartition("/")
    if before in ids:
        yield before, last
    first, _, rest = key.partition("/")
    if rest in ids:
        yield rest, first
    for at in range(len(key) - 1, 0, -1):
        if key[at] == "_" and key[:at] in ids:
            yield key[:at], key[at + 1 :]


def group(
    mask_files: Mapping[str, Path], ids: Set[str], names: Sequence[str] | None
) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Mask files by image and class, and the files that fit no image and class.

    `names` are the known classes, here in any case; None: any part beside an image's name id is a class.
    """
    known = None if names is None else {name.casefold(): name for name in names} | {name: name for name in names}
    found: dict[str, dict[str, Path]] = {}
    left = []
    for name, path in mask_files.items():
        fits = [
            (key, what if known is None else known.get(what) or known[what.casefold()])
            for key, what in candidates(name_id(name), ids)
            if known is None or what in known or what.casefold() in known
        ]
        if fits and fits[0][1] not in found.get(fits[0][0], {}):
            found.setdefault(fits[0][0], {})[fits[0][1]] = path
        else:
            left.append(name)
    return found, left


def read(data: bytes, max_pixels: int) -> Mask_HW:
    """One binary mask: 0 or black is out, the other value (1, 255, white...) is in.

    Raises:
        images.Refused: as `label_maps.decode_mask`; "binary-mask" where there are two values besides 0.
    """
    try:
        ids_HW = label_maps.decode_mask(data, max_pixels=max_pixels, colours={(0, 0, 0): 0, (255, 255, 255): 1})
    except decode.Refused as error:
        if error.code != "unknown-colour":
            raise
        raise decode.Refused("binary-mask", f"a binary mask is black and white: {error}") from error
    values = np.flatnonzero(np.bincount(ids_HW.ravel()))
    if len(values[values > 0]) > 1:
        listed = ", ".join(map(str, values[:6]))
        raise decode.Refused(
            "binary-mask", f"a binary mask has one value besides 0, this one has {listed}; threshold it"
        )
    inside_HW: Mask_HW = ids_HW > 0
    return inside_HW


def render(parts: Mapping[int, Path], empty: int, max_pixels: int, tally: Counter[str]) -> bytes:
    """{class id: its binary mask} -> PNG of ids. Raises images.Refused where one is unreadable or of another size."""
    label_HW, taken_HW, overlap = None, None, 0
    for number in sorted(parts):
        try:
            inside_HW = read(parts[number].read_bytes(), max_pixels)
        except decode.Refused as error:
            raise decode.Refused(error.code, f"{parts[number].parent.name}/{parts[number].name}: {error}") from error
        if label_HW is None or taken_HW is None:
            label_HW, taken_HW = np.full(inside_HW.shape, empty, np.uint8), np.zeros(inside_HW.shape, np.bool_)
        if inside_HW.shape != label_HW.shape:
            raise decode.Refused(
                "mask-size",
                f"{parts[number].name} has another size than the image's other binary masks; export it again",
            )
        overlap += int((inside_HW & taken_HW).sum())
        label_HW[inside_HW] = number
        taken_HW |= inside_HW
    if label_HW is None:
        raise decode.Refused("mask-missing", "no binary mask of a known class")
    if overlap:
        tally["binary masks with overlapping classes (the later one counts)"] += 1
        tally["pixels in more than one class"] += overlap
    return label_maps.encode_png(label_HW)
