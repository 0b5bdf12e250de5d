"""Pascal VOC's layout, as VOC 2012 itself and the "segmentation mask" exports of CVAT, Datumaro and labelme2voc have it.

JPEGImages/NAME.jpg             every image
SegmentationClass/NAME.png      its mask, a palette PNG of class ids with 255 for the border; or in the classes' colours.
                                Images without one are unlabelled. `data.annotations` names another such folder; where
                                SegmentationClass holds no masks, those in SegmentationClassPNG count (labelme2voc)
ImageSets/Segmentation/*.txt    train, val and test; used where data.lists names no list
labelmap.txt                    `name:r,g,b:parts:actions` a line: other classes than VOC's 21, and their colours
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common import mask_encoding, split_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk_all
from pipeline.formats.common.task import Item
from pipeline.formats.names import layout, matching
from pipeline.formats.names.image_files import Found, images_among, photographs_among
from pipeline.imaging import label_maps
from pipeline.storage import atomic

LABEL_MAP = "labelmap.txt"
PNG_MASKS = "SegmentationClassPNG"
SETS = {"labelled": "train", "unlabelled": "unlabelled", "val": "val", "test": "test"}  # split -> file, as written
NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# A class's name may hold colons, so the colour and what follows it are found from the end.
_LABELMAP = re.compile(r"^(?P<name>[^:].*?):(?:(?P<colour>\s*\d+\s*,\s*\d+\s*,\s*\d+\s*)(?::[^:]*){0,2}|:[^:]*:[^:]*)$")
ASSUMED = "Pascal VOC's own 21 classes, which count where no labelmap.txt, class_names.txt or classes.txt names others"


def colour(index: int) -> list[int]:
    """VOC's palette: bits 0, 3, 6 of the index are red's highest bits first, 1, 4, 7 green's, 2, 5 blue's (VOClabelcolormap
    of the VOC development kit)."""
    return [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read a VOC tree. Raises SourceError: no JPEGImages, a bad labelmap.txt or list; names the file."""
    root = home(root)
    mask_files = _mask_files(root, data)
    pictures = photographs_among(walk_all(root / "JPEGImages"), {name_id(name) for name in mask_files.images})
    if data.annotations and not mask_files.images:
        raise SourceError(f"{root / data.annotations}: no files; data.annotations must name the folder of masks")
    matched = matching.match(list(mask_files.images), pictures.images)
    masks = {matched.images[name]: path for name, path in mask_files.images.items() if name in matched.images}

    known = classes(root, data)
    tally: Counter[str] = Counter()
    makers, notes = _makers(root, masks, known, max_pixels, tally)
    ids = {name_id(name) for name in pictures.images}
    masked = {name_id(name) for name in masks}
    splits = split_lists.decide(
        root, data.lists, ids, {f"JPEGImages/{key}": key for key in ids}, _sets(root, ids), masked
    )
    return Source(
        files=[
            *((f"images/{n}", path) for n, path in pictures.images.items() if name_id(n) not in splits.left_out),
            *makers,
        ],
        classes=known,
        class_list=ASSUMED if known == own_classes() else None,
        lists=splits.lists,
        groups=groups_by(data.group, sorted(ids)) or layout.groups_or_singles(pictures.images),
        refused=[(f"masks/{name}", "mask-without-image", reason) for name, reason in matched.refused.items()],
        notes=[
            *notes,
            *(f"masks matched to images by {rule}: {line}" for rule, line in matched.forgiven),
            *splits.notes,
        ],
        skipped=[
            *((kind, f"JPEGImages/{name}") for kind, name in pictures.skipped),
            *mask_files.skipped,
        ],
        tally=tally,
    )


def _mask_files(root: Path, data: config.Data) -> Found:
    """The masks, in the folder that the settings name, in SegmentationClass, or where that has none beside it."""
    found = Found({}, [])
    for folder in [data.annotations] if data.annotations else ["SegmentationClass", PNG_MASKS]:
        here = images_among(walk_all(root / folder))
        found = Found(here.images, [*found.skipped, *((kind, f"{folder}/{name}") for kind, name in here.skipped)])
        if found.images:
            break
    return found


def _makers(
    root: Path, masks: Mapping[str, Path], known: class_lists.Classes, max_pixels: int, tally: Counter[str]
) -> tuple[list[tuple[str, Path | Maker]], list[str]]:
    """The masks' members, as they came or rendered, and what was decided about them."""
    colours = mask_encoding.colours_of(known, [], str(root / "labelmap.txt"))
    how = "ids"
    if masks:
        how = mask_encoding.decide(list(masks.values()), len(known), colours, max_pixels, prefer="colours")
    if how == "ids" and len(known) == 2 and mask_encoding.are_0_and_255(masks.values(), len(known), max_pixels):
        rendered: dict[str, Maker] = {
            name: partial(mask_encoding.render_0_and_255, path, max_pixels) for name, path in masks.items()
        }
        return [(f"masks/{name_id(name)}.png", maker) for name, maker in rendered.items()], [mask_encoding.BINARY_NOTE]
    members: list[tuple[str, Path | Maker]] = []
    for name, path in masks.items():
        if how == "ids":
            members.append((f"masks/{name_id(name)}{path.suffix}", path))
        else:
            maker = partial(mask_encoding.render, path, colours, max_pixels, tally)
            members.append((f"masks/{name_id(name)}.png", maker))
    return members, [f"masks: {how}"]


def home(root: Path) -> Path:
    """The folder that holds JPEGImages: `root`, or one or two levels down (VOCdevkit/VOC2012)."""
    for pattern in ("JPEGImages", "*/JPEGImages", "*/*/JPEGImages"):
        if found := sorted(path.parent for path in root.glob(pattern) if path.is_dir()):
            if len(found) > 1:
                raise SourceError(f"{root}: JPEGImages is in {found[0]} and in {found[1]}; name one in data.path")
            return found[0]
    raise SourceError(f"{root}: no folder JPEGImages, which a VOC tree has")


def own_classes() -> class_lists.Classes:
    """VOC's own 21, in its own colours."""
    return [{"id": k, "name": name, "color": colour(k)} for k, name in enumerate(NAMES)]


def classes(root: Path, data: config.Data) -> class_lists.Classes:
    """Those of classes.txt, else labelmap.txt, else VOC's own 21."""
    if (file := class_lists.read(root, data)) is not None:
        return file[0]
    path = root / LABEL_MAP
    return label_map(path) if path.exists() else own_classes()


def label_map(path: Path) -> class_lists.Classes:
    """The classes of a labelmap.txt, as CVAT and Datumaro write it beside VOC masks."""
    lines: list[str] = []
    for number, line in enumerate(class_lists.read_lines(path, "write it"), 1):
        if not line or line.startswith("#"):
            continue
        match = _LABELMAP.match(line if ":" in line else f"{line}:::")
        if match is None:
            raise SourceError(f"{path}: line {number}: {line!r} is not `name:r,g,b:parts:actions`")
        name = match["name"]
        # Datumaro may leave the colour to VOC's palette.
        numbers = match["colour"].split(",") if match["colour"] else list(map(str, colour(len(lines))))
        lines.append(f"{name} {' '.join(n.strip() for n in numbers)}")
    return class_lists.parse(lines, path)[0]


def _sets(root: Path, ids: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    folder = root / "ImageSets/Segmentation"
    for path in sorted(folder.glob("*.[tT][xX][tT]")) if folder.is_dir() else ():
        if part := layout.split_word(path.stem):
            listed = split_lists.resolve(list(filter(None, class_lists.read_lines(path, ""))), path, ids, {})
            found[part] = list(dict.fromkeys([*found.get(part, ()), *listed]))  # test.txt and test2012.txt
    return found


def write(
    folder: Path, items: Iterable[Item], classes: Sequence[dict[str, Any]], splits: Mapping[str, str] | None = None
) -> int:
    """Write a VOC tree in place of `folder`; returns how many images.

    Masks are palette PNGs of class ids, 255 where ignored. Images keep their bytes and their own extension: other programs
    look for .jpg alone, but a picture that is packed again is another picture.

    Args:
        splits: image id -> split; an image in none of `SETS` is in no set.
    """
    colours = [tuple(c["color"]) for c in classes]
    if len({*colours, label_maps.IGNORE_COLOUR}) <= len(colours):
        colours = label_maps.palette(len(classes))  # readers that go by colour must tell the classes apart

    sets: dict[str, list[str]] = {}
    count = 0
    with atomic.replacing_folder(folder) as fresh:
        for item in items:
            count += 1
            stem = name_id(item.name)
            atomic.write_bytes(fresh / "JPEGImages" / item.name, item.image)
            if item.label_HW is not None:
                png = label_maps.encode_png(item.label_HW, colours)
                atomic.write_bytes(fresh / "SegmentationClass" / f"{stem}.png", png)
            if part := SETS.get((splits or {}).get(item.id, "")):
                sets.setdefault(part, []).append(stem)

        for part, names in sets.items():
            atomic.write_text(fresh / "ImageSets/Segmentation" / f"{part}.txt", "".join(f"{n}\n" for n in names))
        lines = [f"{c['name']}:{','.join(map(str, v))}::\n" for c, v in zip(classes, colours, strict=True)]
        if class_lists.IGNORE not in {
            c["name"] for c in classes
        }:  # Datumaro refuses colours that the map does not name
            lines.append(f"{class_lists.IGNORE}:{','.join(map(str, label_maps.IGNORE_COLOUR))}::\n")
        atomic.write_text(fresh / "labelmap.txt", "# label:color_rgb:parts:actions\n" + "".join(lines))
    return count
