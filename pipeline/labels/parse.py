"""What came back from a label tool: records with a name and a label map."""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import config
from pipeline.formats import cvat, labelstudio, voc
from pipeline.formats.coco import masks as coco_masks
from pipeline.formats.common import annotations, mask_encoding, parsing, unpack
from pipeline.formats.common import class_list as class_files
from pipeline.formats.common.annotations import Picture
from pipeline.formats.common.source import SourceError, name_id, walk
from pipeline.formats.names import class_names, image_files
from pipeline.formats.names.skipped import Skipped
from pipeline.imaging import decode, label_maps
from pipeline.storage import manifest

TOOLS = ("cvat", "labelstudio", "coco", "folder")
NAMES = "names.json"  # in an exported folder: name id -> image id
MASK_ROOMS = ("masks", "SegmentationClass")
MASKS = (".png", ".bmp", ".tif", ".tiff")


class Record(NamedTuple):
    """`name` as the tool has it, `names` what else the image may be called, `id` the image id where it was carried along.
    `draw(row)` -> ids H x W, 255 = ignore.

    `draw` raises images.Refused where the labels cannot be used. `passed_over`: (kind, which) of what it leaves out;
    `forgiven`: of names of classes that are not quite the project's.
    """

    name: str
    id: str
    draw: Callable[[manifest.Row], NDArray[np.uint8]]
    names: Sequence[str] = ()
    passed_over: Sequence[Skipped] = ()
    forgiven: Sequence[Skipped] = ()


def detect(path: Path) -> str:
    """Which tool wrote it. Raises SourceError where that cannot be told."""
    if path.is_dir():
        if (path / cvat.NAME).exists():
            return "cvat"
        has_masks = any((path / room).is_dir() for room in MASK_ROOMS)
        return "coco" if not has_masks and _label_files(path) else "folder"
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".xml" or zipfile.is_zipfile(path):
        return "cvat"  # unless `unpacked` took the zip apart
    with path.open("rb") as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if head in (b"[", b"{"):
        return "labelstudio" if head == b"[" else "coco"
    raise SourceError(f"{path}: neither CVAT's xml or zip, nor Label Studio's or COCO's json, nor a folder of masks")


def _label_files(folder: Path) -> list[Path]:
    """JSON files of a folder that may be COCO's; ours and the system's apart."""
    return [
        path
        for name, path in walk(folder).items()
        if path.suffix.lower() == ".json" and path.name != NAMES and not image_files.is_system_file(name)
    ]


@contextmanager
def unpacked(path: Path, params: config.Ingest, temporary: Path) -> Iterator[Path]:
    """The delivery; for an archive without annotations.xml a folder below `temporary` that is gone after the block.

    Raises:
        archives.DumpRefused, SourceError: as `unpack.opened`.
    """
    with ExitStack() as stack:
        folder = (
            stack.enter_context(unpack.opened(path, params, temporary)) if path.is_file() and _packed(path) else path
        )
        try:
            yield folder
        except SourceError as error:  # who packed it knows the archive's name, not the folder's
            raise SourceError(str(error).replace(str(folder), str(path))) from error


def _packed(path: Path) -> bool:
    """Whether it is an archive that CVAT's reader does not take whole."""
    if not zipfile.is_zipfile(path):
        return path.name.endswith((".tar", ".tgz", ".tar.gz", ".tar.zst"))
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.rpartition("/")[2] != cvat.NAME for name in archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        raise SourceError(f"{path}: a damaged zip ({error}); export it again") from error


def read(
    path: Path, tool: str, classes: Sequence[Mapping[str, Any]], data: config.Data, max_pixels: int
) -> Iterator[Record]:
    """Records of a delivery; images that nobody annotated are left out.

    Args:
        data: `unannotated` says what a pixel in no shape is, as in the source itself.

    Raises:
        SourceError: the delivery as a whole cannot be read.
    """
    if tool == "folder":
        return _folder(path, classes, max_pixels)
    ids = annotations.class_ids([c["name"] for c in classes])
    empty = class_files.empty_id(data, ids)
    if tool == "cvat":
        return _drawn(cvat.load(path / cvat.NAME if path.is_dir() else path)[1], ids, empty, data, max_pixels)
    if tool == "labelstudio":
        return _drawn(labelstudio.load(path), ids, empty, data, max_pixels)
    return _coco(_only_label_file(path), ids, empty, max_pixels)


def _only_label_file(path: Path) -> Path:
    """COCO's file itself, or the one in a folder of it. Raises SourceError where several could be meant."""
    if not path.is_dir():
        return path
    found = _label_files(path)
    if len(found) != 1:
        listed = ", ".join(file.relative_to(path).as_posix() for file in found[:4])
        raise SourceError(f"{path}: {len(found)} JSON files in it ({listed}); import the one that holds the labels")
    return found[0]


def _drawn(
    found: Sequence[Picture], ids: Mapping[str, int], empty: int, data: config.Data, max_pixels: int
) -> Iterator[Record]:
    known = list(ids)
    meant = class_names.meant({shape.label for picture in found for shape in picture.shapes}, known)
    ids = {**ids, **{name: ids[class_] for name, class_ in meant.items()}}
    for picture in found:
        if picture.annotated:
            forgiven = _forgiven({shape.label for shape in picture.shapes}, meant, picture.name)
            draw = partial(_paint, picture, ids=ids, empty=empty, data=data, max_pixels=max_pixels)
            left_out = [(kind, f"{which} of {picture.name}") for kind, which in (*picture.lost, *picture.overruled)]
            yield Record(picture.name, picture.id, draw, picture.names, left_out, forgiven)


def _forgiven(labels: Iterable[Any], meant: Mapping[str, str], image: str) -> list[Skipped]:
    """What to say of an image's labels that are not quite the names of classes."""
    loose = sorted(label for label in labels if meant.get(label, label) != label)
    return [("spelling of a class", f"{label!r} of {image} is {meant[label]!r}") for label in loose]


def _paint(
    picture: Picture, row: manifest.Row, *, ids: Mapping[str, int], empty: int, data: config.Data, max_pixels: int
) -> NDArray[np.uint8]:
    """One picture's label map. Raises images.Refused where it says nothing, or where a part of it would be lost."""
    if picture.lost and data.unannotated == "background":
        raise decode.Refused(annotations.NO_AREA, annotations.lost_reason(picture.lost[0]))
    if not picture.shapes:
        if data.no_shapes == "background":
            return np.full((row.height, row.width), empty, np.uint8)
        raise decode.Refused(
            "no-shapes", "nothing is drawn on it; if that means free of objects, set data.no_shapes: background"
        )
    check_size(picture.height, picture.width, row)  # before anything of that size is made
    return annotations.paint(picture, ids, max_pixels=max_pixels, unannotated=empty)


def _coco(path: Path, ids: Mapping[str, int], empty: int, max_pixels: int) -> Iterator[Record]:
    """One label file, painted as `masks.render` does: the largest annotation first."""
    document = parsing.read_json(path)
    try:
        listed_pictures = {_identifier(record): record for record in parsing.field(document, "images", list)}
        names = {_identifier(record): str(record["name"]) for record in parsing.field(document, "categories", list)}
        drawn: dict[Any, list[tuple[str | None, Any]]] = {}
        lost: dict[Any, list[Skipped]] = {}
        for one in parsing.field(document, "annotations", list):
            # Where pixels in no shape are ignored, what has no area costs nothing.
            image = parsing.identifier(one, "image_id")
            if empty == label_maps.IGNORE and not coco_masks.has_area(one.get("segmentation")):
                lost.setdefault(image, []).append((annotations.NO_AREA, f"annotation {one.get('id')}"))
            else:
                drawn.setdefault(image, []).append((names.get(parsing.identifier(one, "category_id") or ""), one))
    except (parsing.Broken, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: not a COCO file with instances ({error!r}); export it again") from error
    meant = class_names.meant(names.values(), list(ids))
    ids = {**ids, **{name: ids[class_] for name, class_ in meant.items()}}
    for number, record in listed_pictures.items():
        if number not in drawn:
            continue
        name, height, width = str(record.get("file_name")), record.get("height"), record.get("width")
        size = coco_masks.CocoSize(height, width)

        def draw(
            row: manifest.Row, size: coco_masks.CocoSize = size, mine: list[tuple[str | None, Any]] = drawn[number]
        ) -> NDArray[np.uint8]:
            check_size(size.height, size.width, row)
            if unknown := sorted({str(what) for what, _ in mine} - ids.keys()):
                listed = ", ".join(annotations.nearest(what, list(ids)) for what in unknown[:5])
                raise decode.Refused("unknown-class", f"unknown classes: {listed}; rename them in the tool")
            png = coco_masks.render(size, mine, ids, empty, max_pixels)
            return label_maps.decode_mask(png, max_pixels=max_pixels).astype(np.uint8)

        left_out = [(kind, f"{which} of {name}") for kind, which in lost.get(number, ())]
        forgiven = _forgiven({what for what, _ in drawn[number]} - {None}, meant, name)
        yield Record(name, "", draw, passed_over=left_out, forgiven=forgiven)


def _identifier(record: Any) -> str:
    """Raises Broken where the record has no id."""
    if (found := parsing.identifier(record, "id")) is None:
        raise parsing.Broken("a record has no id")
    return found


def check_size(height: Any, width: Any, row: manifest.Row) -> None:
    """Raises images.Refused("mask-size") where the labels are not of the image's size."""
    if (height, width) != (row.height, row.width):
        raise decode.Refused(
            "mask-size",
            f"the labels are {width} x {height}, the image {row.width} x {row.height}; label this very image",
        )


def _folder(path: Path, classes: Sequence[Mapping[str, Any]], max_pixels: int) -> Iterator[Record]:
    """masks/, SegmentationClass/ or the folder itself; class ids by its classes.txt or VOC's labelmap.txt, matched by name."""
    home = next((path / room for room in MASK_ROOMS if (path / room).is_dir()), path)
    found = {name: file for name, file in walk(home).items() if name.lower().endswith(MASKS)}
    if not found:
        raise SourceError(f"{home}: no mask in it; expected class ids as PNG")
    known = parsing.read_json(path / NAMES) if (path / NAMES).exists() else {}
    if not isinstance(known, dict):
        raise SourceError(f"{path / NAMES}: not an object of name ids and image ids; take it as it was exported")
    names = [c["name"] for c in classes]
    theirs = names
    if (path / "classes.txt").exists():
        lines = class_files.read_lines(path / "classes.txt", "write it")
        theirs = [c["name"] for c in class_files.parse(lines, path / "classes.txt")[0]]
    mapped = voc.label_map(path / voc.LABEL_MAP) if (path / voc.LABEL_MAP).exists() else []
    theirs = [c["name"] for c in mapped] or theirs
    table = np.full(256, -1, np.int64)
    meant = class_names.meant(theirs, names)
    table[: len(theirs)] = [names.index(meant[name]) if name in meant else -1 for name in theirs]
    table[label_maps.IGNORE] = label_maps.IGNORE
    colours = {tuple(c["color"]): theirs.index(c["name"]) for c in mapped or classes if c["name"] in theirs}
    colours |= {label_maps.IGNORE_COLOUR: label_maps.IGNORE}
    if len(theirs) == 2 and mask_encoding.are_0_and_255(found.values(), len(theirs), max_pixels):
        table[label_maps.IGNORE] = table[1]  # two classes as image editors save them: 0 is the first, 255 the second
    for name, file in found.items():

        def draw(row: manifest.Row, file: Path = file) -> NDArray[np.uint8]:
            ids_HW = label_maps.decode_mask(file.read_bytes(), max_pixels=max_pixels, colours=colours)
            check_size(ids_HW.shape[0], ids_HW.shape[1], row)
            void_HW = ids_HW == (65535 if ids_HW.dtype == np.uint16 else label_maps.IGNORE)
            if (ids_HW[~void_HW] > 255).any():
                raise decode.Refused("mask-class-id", f"ids up to {ids_HW.max()}; there are {len(names)} classes")
            mapped_HW = table[np.where(void_HW, label_maps.IGNORE, ids_HW)]
            if (odd := np.unique(ids_HW[mapped_HW < 0])).size:
                _refuse(odd.tolist(), theirs, names)
            return mapped_HW.astype(np.uint8)

        yield Record(name, str(known.get(name_id(name), "")), draw, forgiven=_forgiven(theirs, meant, name))


def _refuse(ids: Sequence[int], theirs: Sequence[str], names: Sequence[str]) -> None:
    alien = [theirs[i] for i in ids if i < len(theirs)]
    if alien:
        listed = ", ".join(annotations.nearest(name, names) for name in alien[:5])
        raise decode.Refused("unknown-class", f"unknown classes: {listed}; rename them in classes.txt")
    raise decode.Refused("mask-class-id", f"ids outside 0..{len(theirs) - 1}: {ids[:5]}; map them to a class or to 255")
