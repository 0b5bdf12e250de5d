"""Pascal VOC's layout, as VOC 2012 itself and the "segmentation mask" exports of CVAT, Datumaro and labelme2voc have it.

JPEGImages/NAME.jpg             every image
SegmentationClass/NAME.png      its mask, a palette PNG of class ids with 255 for the border; or in the classes' colours.
                                Images without one are unlabelled. `data.annotations` names another such folder
ImageSets/Segmentation/*.txt    train, val and test; used where data.lists names no list
labelmap.txt                    `name:r,g,b:parts:actions` a line: other classes than VOC's 21, and their colours
"""

from collections import Counter
from functools import partial
from pathlib import Path

from pipeline import config
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common import mask_encoding, split_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk

LABEL_MAP = "labelmap.txt"
NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

ASSUMED = "Pascal VOC's own 21 classes, which count where no labelmap.txt, class_names.txt or classes.txt names others"


def colour(index: int) -> list[int]:
    """VOC's palette: bits 0, 3, 6 of the index are red's highest bits first, 1, 4, 7 green's, 2, 5 blue's (VOClabelcolormap
    of the VOC development kit)."""
    return [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read a VOC tree. Raises SourceError: no JPEGImages, a bad labelmap.txt or list; names the file."""
    root = home(root)
    image_files = walk(root / "JPEGImages")
    mask_files = walk(root / (data.annotations or "SegmentationClass"))
    if data.annotations and not mask_files:
        raise SourceError(f"{root / data.annotations}: no files; data.annotations must name the folder of masks")
    ids = {name_id(name) for name in image_files}
    masked = {name_id(name) for name in mask_files} & ids
    known = classes(root, data)
    colours = mask_encoding.colours_of(known, [], str(root / "labelmap.txt"))
    how, files = "ids", list[tuple[str, Path | Maker]]()
    if mask_files:
        how = mask_encoding.decide(list(mask_files.values()), len(known), colours, max_pixels, prefer="colours")
    listed, notes = (
        split_lists.read(root, data.lists, ids, {f"JPEGImages/{key}": key for key in ids}),
        [f"masks: {how}"],
    )
    left_out: set[str] = set()
    if not split_lists.given(data.lists):
        listed, left_out, said = split_lists.own(_sets(root, ids), masked)
        notes += said
    tally: Counter[str] = Counter()
    for name, path in mask_files.items():
        maker = partial(mask_encoding.render, path, colours, max_pixels, tally)
        files.append((f"masks/{name}", path) if how == "ids" else (f"masks/{name_id(name)}.png", maker))
    return Source(
        files=[(f"images/{n}", path) for n, path in image_files.items() if name_id(n) not in left_out] + files,
        classes=known,
        class_list=ASSUMED if known == own_classes() else None,
        lists=listed,
        groups=groups_by(data.group, sorted(ids)),
        notes=notes,
        tally=tally,
    )


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
        name, _, rest = line.partition(":")
        stated = rest.partition(":")[0] or ",".join(
            map(str, colour(len(lines)))
        )  # Datumaro may leave it to VOC's palette
        numbers = stated.split(",")
        if not name or len(numbers) != 3 or not all(n.strip().isdigit() for n in numbers):
            raise SourceError(f"{path}: line {number}: {line!r} is not `name:r,g,b:parts:actions`")
        lines.append(f"{name} {' '.join(n.strip() for n in numbers)}")
    return class_lists.parse(lines, path)[0]


def _sets(root: Path, ids: set[str]) -> dict[str, list[str]]:
    found = {}
    for part in ("val", "test"):
        path = root / "ImageSets/Segmentation" / f"{part}.txt"
        if path.exists():
            found[part] = split_lists.resolve(list(filter(None, class_lists.read_lines(path, ""))), path, ids, {})
    return found
