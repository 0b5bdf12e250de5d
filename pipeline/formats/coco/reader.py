"""COCO: instances and stuff (polygons, run lengths) and panoptic PNGs -> one label map for each image.

Which files: `data.annotations`, a path or pattern in the source; else annotations/*.json, else every JSON below it that is
a COCO file, without COCO's captions, keypoints and image_info. Several files may label one image (instances and stuff), but
not with the same categories: those are two versions of its labels.

The map is painted by area, the largest annotation first, so that what lies on something stays visible; equal areas in the
file's order. `iscrowd` regions are of their class like any other: Datumaro and CVAT set it on every run-length mask.
An image without an annotation is unlabelled, or all background where `data.no_shapes` says so. One broken annotation
refuses its image's mask; one without area (a box alone, a ring of two points) is left out and counted, unless its pixels
would become background.

Images are looked for by file_name in the source, its images/, the folder of the JSON file, and the folder that the JSON
file's name ends in or whose split it states (instances_train2017.json -> train2017/, Train.json -> train/), then by
`pipeline.formats.names.matching` among all images. That end also says which images are val or test; of an image that files
of several splits list, see `pipeline.formats.coco.parts`. Each image is a group of its own, or belongs to the folder in its
file_name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import config
from pipeline.formats.coco import masks, panoptic
from pipeline.formats.coco.images import CocoImages
from pipeline.formats.coco.parts import Parts
from pipeline.formats.common import annotations as annotations_
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common import parsing, split_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id
from pipeline.formats.names import layout
from pipeline.formats.names.skipped import Skipped

_OTHERS = ("captions_", "person_keypoints_", "image_info_")


class CocoImage(NamedTuple):
    """One image of the label files. `key` is its name id, `name` its file_name."""

    key: str
    path: Path
    name: str
    size: masks.CocoSize


@dataclass
class CocoLabels:
    """All label files together: the images by name id, and for each its annotations with their class names."""

    pictures: dict[str, CocoImage] = field(default_factory=dict)
    # name id -> (class name or None where the category is unknown, annotation)
    drawn: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    # name id -> PNG, its annotation, category id -> name
    panoptic: dict[str, tuple[Path, Any, dict[str, str]]] = field(default_factory=dict)
    parts: Parts = field(default_factory=Parts)
    names: list[str] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    # name id -> the first annotation of it that covers no pixel
    no_area: dict[str, str] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    # (name id, class name) -> the label file that labels it so
    labelled_by: dict[tuple[str, Any], str] = field(default_factory=dict)


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read a COCO tree. Raises SourceError: no label file, one that is no COCO, bad lists; names the file."""
    found = CocoLabels()
    images = CocoImages(root)
    used = []
    for path in label_files(root, data):
        if _collect(images, path, found, named=data.annotations is not None):
            used.append(path)
    if not used:
        raise SourceError(
            f"{root}: no COCO label file ({found.skipped[0][1]}: {found.skipped[0][0]}); see data.annotations"
        )
    if both := next((key for key in found.panoptic if key in found.drawn), None):
        raise SourceError(f"{both} has panoptic labels and instances; name one kind of file in data.annotations")

    classes, ids, notes = class_lists.named(root, data, found.names)
    made = _makers(found, data, ids, class_lists.empty_id(data, ids), max_pixels)
    keys = sorted(found.pictures)
    paths = [f"{key}{found.pictures[key].path.suffix}" for key in keys]
    stated = {name_id(found.pictures[key].name): key for key in keys}
    aliases = (stated if len(stated) == len(keys) else {}) | {f"images/{key}": key for key in keys}
    parts = {part: [key for key in keys if found.parts.of(key) == part] for part in ("val", "test")}
    parts = {part: members for part, members in parts.items() if members}
    splits = split_lists.decide(root, data.lists, set(keys), aliases, parts, made.keys())
    files: list[tuple[str, Path | Maker]] = [
        (f"images/{path}", found.pictures[key].path)
        for key, path in zip(keys, paths, strict=True)
        if key not in splits.left_out
    ]
    return Source(
        files=files + [(f"masks/{key}.png", made[key]) for key in sorted(made)],
        classes=classes,
        lists=splits.lists,
        groups=groups_by(data.group, keys) or layout.groups_or_singles(paths),
        refused=found.refused,
        notes=[
            f"label files: {', '.join(path.name for path in used)}",
            f"{len(keys)} images, {len(made)} with labels; pixels in no shape: {data.unannotated}",
            *annotations_.no_shapes_notes(len(keys) - len(made), data.unannotated, data.no_shapes),
            *images.forgiven(),
            *found.parts.notes(),
            *notes,
            *splits.notes,
        ],
        skipped=found.skipped,
    )


def _makers(
    found: CocoLabels, data: config.Data, ids: Mapping[str, int], empty: int, max_pixels: int
) -> dict[str, Maker]:
    """Who renders each image's mask. Images whose labels would lose pixels to the background are refused instead."""
    made: dict[str, Maker] = {}
    for key, annotations in found.drawn.items():
        picture = found.pictures[key]
        made[key] = partial(masks.render, picture.size, annotations, ids, empty, max_pixels)
    for key, (png, annotation, names) in found.panoptic.items():
        numbers = {category: ids[name] for category, name in names.items()}
        made[key] = partial(panoptic.render, png, annotation, numbers, empty, max_pixels)

    for key, where in found.no_area.items():
        if data.unannotated == "background":
            made.pop(key, None)
            found.refused.append((f"masks/{key}.png", annotations_.NO_AREA, f"{where}: {annotations_.LOST}"))
        else:
            found.skipped.append(("shape without area", f"{where} of {key}"))
    if data.no_shapes == "background":
        lost = {key for key in found.no_area if key not in found.drawn}
        for key in found.pictures.keys() - made.keys() - lost:
            made[key] = partial(annotations_.render_background, found.pictures[key].path, empty, max_pixels)
    return made


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


def _collect(images: CocoImages, path: Path, found: CocoLabels, *, named: bool) -> bool:
    """Add one label file's images and annotations to `found`; False where it is no COCO file and nobody named it."""
    try:
        document = parsing.read_json(path)
        pictures = parsing.field(document, "images", list)
        annotations = parsing.field(document, "annotations", list)
        categories = parsing.field(document, "categories", list)
        names = {_category_id(category): parsing.field(category, "name", str) for category in categories}
    except (parsing.Broken, AttributeError, SourceError) as error:
        if not named:
            found.skipped.append((f"no COCO file ({str(error).removeprefix(f'{path}: ')})", path.name))
            return False
        raise SourceError(f"{path}: not a COCO file: {error}") from error
    in_order = sorted(names, key=lambda number: (not number.isdecimal(), int(number) if number.isdecimal() else 0))
    found.names.extend(name for name in map(names.__getitem__, in_order) if name not in found.names)

    by_id: dict[str, str] = {}
    parts: dict[str, layout.Part] = {}
    taken: set[str] = set()
    for record in pictures:
        key = _add_picture(images, record, by_id, found, path)
        if key in taken:
            reason = f"{path.name} names this image, or another with its name id, twice"
            found.refused.append((f"labels/{path.name}:images", "duplicate-name", f"{key}: {reason}"))
        elif key is not None:
            by_id[str(parsing.identifier(record, "id"))] = key
            parts[key] = _part(images.root, path, found.pictures[key].name)
            found.parts.add(key, parts[key], path.name, annotated=False)
            taken.add(key)
    for number, annotation in enumerate(annotations):
        key = by_id.get(parsing.identifier(annotation, "image_id") or "")
        where = f"labels/{path.name}:annotations[{number}]"
        if key is not None:
            found.parts.add(key, parts[key], path.name, annotated=True)
        if key is None:
            known = isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str | float)
            reason = f"image_id {annotation['image_id']!r:.40} is no image here" if known else "it has no image_id"
            found.refused.append((where, "label-without-image", reason))
        elif "segments_info" in annotation:
            png = panoptic.find(images.root, path, annotation)
            if key in found.panoptic:
                raise SourceError(f"{path}: annotations[{number}]: image {key} has panoptic labels already; keep one")
            found.panoptic[key] = (png, annotation, names)
        elif not masks.has_area(annotation.get("segmentation")):
            found.no_area.setdefault(key, f"annotation {annotation.get('id')} ({where})")
        else:
            what = names.get(parsing.identifier(annotation, "category_id") or "")
            _demand_one_version(found, key, what, path)
            found.drawn.setdefault(key, []).append((what, annotation))
    return True


def _demand_one_version(found: CocoLabels, key: str, what: Any, path: Path) -> None:
    """Raises SourceError where two files label one image with the same category: an old and a new version of its labels."""
    other = found.labelled_by.setdefault((key, what), path.name)
    if other != path.name:
        raise SourceError(
            f"{path}: labels {key} as {what!r}, as {other} does: two versions of its labels; name the one that counts in "
            "data.annotations"
        )


def _category_id(category: Any) -> str:
    """Raises Broken where it has none."""
    found = parsing.identifier(category, "id")
    if found is None:
        raise parsing.Broken(f"a category's id is {category.get('id')!r:.40}, neither text nor a whole number from 0")
    return found


def _part(root: Path, path: Path, name: str) -> layout.Part:
    """train, val or test: by a word in the label file's name (instances_val2017.json), by its folder (valid/), by the
    image's folders."""
    own = layout.split_in_name(path.stem)
    around = layout.split_word(path.parent.name) if path.parent != root else None
    return own or around or layout.split_in_path(name) or "train"


def _add_picture(
    images: CocoImages, record: Any, by_id: Mapping[str, str], found: CocoLabels, file: Path
) -> str | None:
    """Name id of one entry of `images`, None (and a refusal) where it cannot be used."""
    try:
        number, name = parsing.identifier(record, "id"), parsing.field(record, "file_name", str)
        if number is None or number in by_id:
            raise parsing.Broken(f"its id {number!r:.40} is missing or stands there twice")
    except parsing.Broken as error:
        reason = f"an image's record cannot be used: {error}"
        found.refused.append((f"labels/{file.name}:images", "label-file", reason))
        return None
    try:
        path = images.find(name, file)
    except parsing.Broken as error:
        found.refused.append((f"images/{name}", "image-missing", f"{file.name} names it: {error}"))
        return None

    key = name_id(path.relative_to(images.root).as_posix().removeprefix("images/"))
    size = masks.CocoSize(record.get("height"), record.get("width"))
    known = found.pictures.setdefault(key, CocoImage(key, path, name, size))
    if known.path != path:
        found.refused.append((f"images/{name}", "duplicate-name", f"same name id as {known.path.name}; rename one"))
        return None
    return key
