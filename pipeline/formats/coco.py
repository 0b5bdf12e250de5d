"""COCO: instances and stuff (polygons, run lengths) and panoptic PNGs -> one label map for each image.

Which files: `data.annotations`, a path or pattern in the source; else annotations/*.json, else every JSON below it, without
COCO's captions, keypoints and image_info. Several files may label one image (instances and stuff).

The map is painted by area, the largest annotation first, so that what lies on something stays visible; equal areas in the
file's order. `iscrowd` regions are of their class like any other: Datumaro and CVAT set it on every run-length mask.
An image without an annotation is unlabelled. One broken annotation refuses its image's mask.

Images are looked for by file_name in the source, its images/, the folder of the JSON file, and the folder that the JSON
file's name ends in (instances_train2017.json -> train2017/). That end also says which images are val or test. Each image
is a group of its own, or belongs to the folder in its file_name.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import config
from pipeline.formats import coco_panoptic
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common import parsing, rasterize, split_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id
from pipeline.imaging import decode, label_maps
from pipeline.storage import archives

MAX_HELD = 1 << 30  # bytes of one image's annotations, each cut to its box
_OTHERS = ("captions_", "person_keypoints_", "image_info_")


class Picture(NamedTuple):
    """One image of the label files. `key` is its name id, `name` its file_name; height and width are as the file says, to
    be checked; `part` is val, test or train, as the label file's name says."""

    key: str
    path: Path
    name: str
    height: Any
    width: Any
    part: str


class Found(NamedTuple):
    """All label files together: the images by name id, and for each its annotations with their class names."""

    pictures: dict[str, Picture]
    drawn: dict[str, list[tuple[Any, Any]]]  # name id -> (class name or None where the category is unknown, annotation)
    panoptic: dict[str, tuple[Path, Any, dict[int, str]]]  # name id -> PNG, its annotation, category id -> name
    names: list[str]
    refused: list[tuple[str, str, str]]


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read a COCO tree. Raises SourceError: no label file, one that is no COCO, bad lists; names the file."""
    found = Found({}, {}, {}, [], [])
    used = label_files(root, data)
    for path in used:
        _collect(root, path, found)
    if both := next((key for key in found.panoptic if key in found.drawn), None):
        raise SourceError(f"{both} has panoptic labels and instances; name one kind of file in data.annotations")
    classes, ids, notes = class_lists.named(root, data, found.names)
    empty = class_lists.empty_id(data, ids)
    made: dict[str, Maker] = {}
    for key, annotations in found.drawn.items():
        made[key] = partial(render, found.pictures[key], annotations, ids, empty, max_pixels)
    for key, (png, annotation, names) in found.panoptic.items():
        numbers = {category: ids[name] for category, name in names.items()}
        made[key] = partial(coco_panoptic.render, png, annotation, numbers, empty, max_pixels)
    keys = sorted(found.pictures)
    stated = {name_id(found.pictures[key].name): key for key in keys}
    aliases = (stated if len(stated) == len(keys) else {}) | {f"images/{key}": key for key in keys}
    listed, left_out = split_lists.read(root, data.lists, set(keys), aliases), set[str]()
    if not split_lists.given(data.lists):
        parts = {part: [key for key in keys if found.pictures[key].part == part] for part in ("val", "test")}
        listed, left_out, said = split_lists.own(parts, set(made))
        notes += said
    files: list[tuple[str, Path | Maker]] = [
        (f"images/{key}{found.pictures[key].path.suffix}", found.pictures[key].path)
        for key in keys
        if key not in left_out
    ]
    return Source(
        files=files + [(f"masks/{key}.png", made[key]) for key in sorted(made)],
        classes=classes,
        lists=listed,
        groups=groups_by(data.group, keys) or {k: found.pictures[k].name.rpartition("/")[0] or k for k in keys},
        refused=found.refused,
        notes=[
            f"label files: {', '.join(path.name for path in used)}",
            f"{len(keys)} images, {len(made)} with annotations; pixels in none: {data.unannotated}",
            *notes,
        ],
    )


def label_files(root: Path, data: config.Data) -> list[Path]:
    if data.annotations:
        try:
            found = sorted(path for path in root.glob(data.annotations) if path.is_file())
        except (NotImplementedError, ValueError) as error:  # absolute, or a malformed pattern
            raise SourceError(
                f"data.annotations: {data.annotations!r}: {error}; give a path or pattern relative to data.path"
            ) from error
        if not found:
            raise SourceError(f"{root}: no file {data.annotations}, which data.annotations names")
        return found
    found = sorted(root.glob("annotations/*.json")) or sorted(root.rglob("*.json"))
    found = [path for path in found if not path.name.startswith(_OTHERS)]
    if not found:
        raise SourceError(f"{root}: no JSON label file; name it in data.annotations")
    return found


def _collect(root: Path, path: Path, found: Found) -> None:
    """Add one label file's images and annotations to `found`."""
    document = parsing.read_json(path)
    try:
        pictures = parsing.field(document, "images", list)
        annotations = parsing.field(document, "annotations", list)
        categories = parsing.field(document, "categories", list)
        names = {parsing.whole(c.get("id"), "id"): parsing.field(c, "name", str) for c in categories}
    except (parsing.Broken, AttributeError) as error:
        raise SourceError(f"{path}: not a COCO file: {error}") from error
    found.names.extend(name for _, name in sorted(names.items()) if name not in found.names)
    places = _places(root, path)
    by_id: dict[Any, str] = {}
    taken: set[str] = set()
    for record in pictures:
        key = _add_picture(root, record, places, by_id, found, path.name, _part(root, path))
        if key in taken:
            reason = f"{path.name} names this image, or another with its name id, twice"
            found.refused.append((f"labels/{path.name}:images", "duplicate-name", f"{key}: {reason}"))
        elif key is not None:
            by_id[record["id"]] = key
            taken.add(key)
    for number, annotation in enumerate(annotations):
        key = by_id.get(_hashable(annotation, "image_id"))
        if key is None:
            known = isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str)
            reason = f"image_id {annotation['image_id']!r:.40} is no image here" if known else "it has no image_id"
            found.refused.append((f"labels/{path.name}:annotations[{number}]", "label-without-image", reason))
        elif "segments_info" in annotation:
            png = coco_panoptic.find(root, path, annotation)
            if key in found.panoptic:
                raise SourceError(f"{path}: annotations[{number}]: image {key} has panoptic labels already; keep one")
            found.panoptic[key] = (png, annotation, names)
        else:
            what = names.get(_hashable(annotation, "category_id"))
            found.drawn.setdefault(key, []).append((what, annotation))


def _hashable(record: Any, name: str) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _places(root: Path, path: Path) -> list[Path]:
    """Folders that may hold a label file's images, relative to nothing outside the source."""
    last = path.stem.rpartition("_")[2]
    named = [root / last, root / "images" / last] if last not in ("", "..", ".") else []
    return [root, root / "images", *named, path.parent]


def _part(root: Path, path: Path) -> str:
    """train, val or test: by the end of the label file's name (instances_val2017.json), or by its folder (valid/)."""
    words = (path.stem.rpartition("_")[2], path.parent.name if path.parent != root else "")
    return next((part for part in ("val", "test") if any(word.startswith(part) for word in words)), "train")


def _add_picture(
    root: Path, record: Any, places: Sequence[Path], by_id: Mapping[Any, str], found: Found, file: str, part: str
) -> str | None:
    """Name id of one entry of `images`, None (and a refusal) where it cannot be used."""
    shown = f"labels/{file}:images"
    try:
        number, name = _hashable(record, "id"), parsing.field(record, "file_name", str)
        if number is None or number in by_id:
            raise parsing.Broken(f"its id {number!r:.40} is missing or stands there twice")
        safe = archives.safe_name(name, Path(file))
    except (parsing.Broken, archives.DumpRefused) as error:
        found.refused.append((shown, "label-file", f"an image's record cannot be used: {error}"))
        return None
    path = next((place / safe for place in places if (place / safe).is_file()), None)
    if path is None or not path.resolve().is_relative_to(root.resolve()):
        found.refused.append((f"images/{safe}", "image-missing", f"{file} names it, but it is not below data.path"))
        return None
    key = name_id(path.relative_to(root).as_posix().removeprefix("images/"))
    known = found.pictures.setdefault(key, Picture(key, path, safe, record.get("height"), record.get("width"), part))
    if known.path != path:
        found.refused.append((f"images/{safe}", "duplicate-name", f"same name id as {known.path.name}; rename one"))
        return None
    return key


def render(
    picture: Picture, annotations: Sequence[tuple[Any, Any]], ids: Mapping[str, int], empty: int, max_pixels: int
) -> bytes:
    """Annotations of one image -> PNG of class ids.

    Raises:
        images.Refused: "label-file", "bad-polygon", "bad-rle", "too-many-pixels"; names the annotation.
    """
    try:
        height = parsing.whole(picture.height, "the image's height")
        width = parsing.whole(picture.width, "the image's width")
        decode.check_pixels(width, height, max_pixels)
    except parsing.Broken as error:
        raise decode.Refused("label-file", str(error)) from error
    pieces: list[tuple[int, tuple[slice, slice], rasterize.Mask_HW, int]] = []
    held = 0
    for name, annotation in annotations:
        where = f"annotation {_hashable(annotation, 'id')}"
        if name is None:
            raise decode.Refused("label-file", f"{where}: no category {annotation.get('category_id')!r:.40}")
        try:
            inside_HW = pixels(annotation.get("segmentation"), height, width)
        except decode.Refused as error:
            raise decode.Refused(error.code, f"{where}: {error}") from error
        window = _window(inside_HW)
        held += inside_HW[window].size
        if held > MAX_HELD:
            raise decode.Refused("label-file", f"{where}: the image's annotations cover {held} pixels; merge some")
        pieces.append((int(inside_HW.sum()), window, inside_HW[window].copy(), ids[name]))
    label_HW = np.full((height, width), empty, np.uint8)
    for _, window, inside_HW, number in sorted(pieces, key=lambda piece: -piece[0]):
        label_HW[window][inside_HW] = number
    return label_maps.encode_png(label_HW)


def _window(inside_HW: rasterize.Mask_HW) -> tuple[slice, slice]:
    """The rows and columns that hold every pixel inside."""
    spans = [np.flatnonzero(inside_HW.any(axis=axis)) for axis in (1, 0)]
    rows, columns = (slice(int(s[0]), int(s[-1]) + 1) if s.size else slice(0, 0) for s in spans)
    return rows, columns


def pixels(segmentation: Any, height: int, width: int) -> rasterize.Mask_HW:
    """COCO's segmentation -> H x W: polygons (their union), or run lengths, column by column, as text or list.

    Raises:
        images.Refused: "bad-polygon", "bad-rle" (wrong total, or another size than the image's), "label-file".
    """
    if isinstance(segmentation, dict):
        inside_HW = label_maps.from_rle(segmentation, max_pixels=height * width)
        if inside_HW.shape != (height, width):
            raise decode.Refused(
                "bad-rle", f"run lengths of {inside_HW.shape} for an image of {(height, width)} rows and columns"
            )
        return inside_HW
    if not isinstance(segmentation, list) or not segmentation:
        raise decode.Refused(
            "label-file", "no segmentation (a box alone is no mask); draw it, or delete the annotation"
        )
    flat = [segmentation] if isinstance(segmentation[0], int | float) else segmentation
    return rasterize.union([rasterize.ring(points) for points in flat], height, width)
