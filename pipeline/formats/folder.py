"""A plain folder of images: `images/`, `masks/` for some of them, and optional text lists.

images/ANY/PATH.jpg     every image; its *name id* is the path under images/ without the extension
masks/ANY/PATH.png      that image's mask: class ids, or the classes' colours; or one binary mask for each class (see
                        `pipeline.formats.common.binary_masks`); images without one are unlabelled
classes.txt             line n (from 0) names class n, optionally followed by a colour: `road #804080` or
                        `road 128 64 128`; with `data.classes: null` the ids found in the masks are the classes.
                        Lines `ignore 0 0 0` at its end say which colours of a colour mask mean ignore
labelled.txt ...        the images of each part, one a line (params.yaml: data.lists)
"""

from collections import Counter
from functools import partial
from pathlib import Path

from pipeline import config
from pipeline.formats.common import binary_masks, mask_encoding, split_lists
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk
from pipeline.imaging import decode, label_maps
from pipeline.imaging.mask_png import Colour


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read a source folder's lists and names; image bytes are read later, one at a time.

    `max_pixels` is the budget for masks that are decoded here, to find out what they hold.

    Raises:
        SourceError: no images, a class file or list that is not there, a list names an unknown image or one twice, a
            group that does not match, masks of mixed or unclear encoding; names the file.
    """
    image_files, mask_files = walk(root / "images"), walk(root / "masks")
    if not image_files:
        raise SourceError(f"{root}: no files under images/; data.path must name a folder that holds images/ and masks/")
    ids = {name_id(name) for name in image_files}
    listed = split_lists.read(root, data.lists, ids, {f"images/{key}": key for key in ids})
    groups = groups_by(data.group, sorted(ids))
    file = class_lists.read(root, data)
    known, ignored = file if file is not None else (None, [])
    how: str = data.masks
    if how == "auto" and _are_binary(mask_files, ids, known):
        how = "binary"
    found = [(f"images/{name}", path) for name, path in image_files.items()]
    if how == "binary":
        return _binary(root, data, mask_files, ids, known, Source(found, known or [], listed, groups), max_pixels)
    colours = mask_encoding.colours_of(known, ignored, str(data.classes)) if known and _distinct(known) else {}
    if how == "auto":
        how = mask_encoding.decide(list(mask_files.values()), len(known) if known else None, colours, max_pixels)
    tally: Counter[str] = Counter()
    origins: list[tuple[str, Path | Maker]] = [(f"masks/{name}", path) for name, path in mask_files.items()]
    if how == "colours":
        colours = _needed(root, data, known, ignored)
        origins = [
            (f"masks/{name_id(name)}.png", partial(mask_encoding.render, path, colours, max_pixels, tally))
            for name, path in mask_files.items()
        ]
    return Source(
        files=[*found, *origins],
        classes=known if known is not None else _infer_classes(mask_files, max_pixels),
        lists=listed,
        groups=groups,
        notes=[f"masks: {how}" + " (found by looking)" * (data.masks == "auto")] if mask_files else [],
        tally=tally,
    )


def _distinct(known: class_lists.Classes) -> bool:
    return len({tuple(c["color"]) for c in known}) == len(known)


def _needed(
    root: Path, data: config.Data, known: class_lists.Classes | None, ignored: list[Colour]
) -> dict[Colour, int]:
    if known is None:
        raise SourceError(
            f"{root}: the masks are in colours, and only a class file says what they mean: name one in data.classes, "
            "with lines such as `road 128 64 128`"
        )
    return mask_encoding.colours_of(known, ignored, str(root / str(data.classes)))


def _are_binary(mask_files: dict[str, Path], ids: set[str], known: class_lists.Classes | None) -> bool:
    """No mask has an image's own name, and most name an image and a class."""
    if not mask_files or any(name_id(name) in ids for name in mask_files):
        return False
    _, left = binary_masks.group(mask_files, ids, [c["name"] for c in known] if known else None)
    return len(left) < len(mask_files) / 2


def _binary(
    root: Path,
    data: config.Data,
    mask_files: dict[str, Path],
    ids: set[str],
    known: class_lists.Classes | None,
    source: Source,
    max_pixels: int,
) -> Source:
    parts, left = binary_masks.group(mask_files, ids, [c["name"] for c in known] if known else None)
    classes, number, notes = class_lists.named(root, data, sorted({name for by in parts.values() for name in by}))
    empty, tally = class_lists.empty_id(data, number), source.tally
    rendered: list[tuple[str, Path | Maker]] = [
        (
            f"masks/{key}.png",
            partial(binary_masks.render, {number[n]: path for n, path in by.items()}, empty, max_pixels, tally),
        )
        for key, by in sorted(parts.items())
    ]
    reason = "no image and class go by this name; expected masks/NAME/CLASS, masks/CLASS/NAME or masks/NAME_CLASS"
    return Source(
        files=[*source.files, *rendered],
        classes=classes,
        lists=source.lists,
        groups=source.groups,
        refused=[(f"masks/{name}", "mask-without-image", reason) for name in left],
        notes=[
            "masks: binary, one file per class" + " (found by looking)" * (data.masks == "auto"),
            f"pixels in no class: {data.unannotated}",
            *notes,
        ],
        tally=tally,
    )


def _infer_classes(mask_files: dict[str, Path], max_pixels: int) -> class_lists.Classes:
    highest = -1
    for path in mask_files.values():
        try:
            ids = label_maps.decode_mask(path.read_bytes(), max_pixels=max_pixels)
        except decode.Refused:
            continue  # ingest quarantines it with its reason
        if (known := ids[ids < 255]).size:
            highest = max(highest, int(known.max()))
    if highest < 0:
        raise SourceError("no class file and no readable mask: name a file with one class a line in data.classes")
    return [{"id": k, "name": f"class_{k}", "color": list(c)} for k, c in enumerate(label_maps.palette(highest + 1))]
