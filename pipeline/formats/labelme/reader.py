"""labelme: one JSON file per image, with polygons, rectangles, circles and masks.

Points are on the upright picture: labelme applies EXIF before it shows a photo, as `pipeline.imaging.decode` does. Shapes are
painted in the file's order, later ones over earlier ones, as labelme's own export does. `__ignore__` is its word for 255.
An image that has no file is unlabelled, as is one whose file has no shape unless `data.no_shapes` says background. Lines and
points have no area: they are counted, and refuse their image's mask where pixels in no shape are background.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.formats.common import annotations, parsing, split_lists
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk_all
from pipeline.formats.labelme import masks
from pipeline.formats.names import image_files, layout, matching
from pipeline.formats.names.skipped import Skipped
from pipeline.imaging import label_maps
from pipeline.storage import archives

IGNORE = "__ignore__"
MADE = "what labelme_json_to_dataset made of a label file"  # img.png, label.png, label_names.txt, label_viz.png


@dataclass
class Found:
    """The label files of a tree: which image each labels, and what cannot be used."""

    labelled: dict[str, Path] = field(default_factory=dict)  # name id -> its label file
    empty: dict[str, None] = field(default_factory=dict)  # name ids whose file has no shape
    embedded: dict[str, Path] = field(default_factory=dict)  # name id -> label file with the picture inside
    labels: dict[str, set[str]] = field(default_factory=dict)  # name id -> the labels of its shapes
    lost: dict[str, list[str]] = field(default_factory=dict)  # name id -> kinds of shapes without area
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    count: int = 0

    def forget(self, key: str) -> None:
        """Drop what a label file said of an image."""
        for place in (self.labelled, self.labels, self.embedded, self.lost, self.empty):
            place.pop(key, None)


class Pictures:
    """The images of a tree, found by what label files say of them."""

    def __init__(self, images: Mapping[str, Path]) -> None:
        self._images = images
        self._by_place = {path.resolve(): name for name, path in images.items()}
        self._index = matching.Index(images)
        self._forgiven: dict[str, list[str]] = {}

    def of(self, name: str, path: Path, document: Mapping[str, Any]) -> str | None:
        """The image that a file labels: its imagePath, else the one beside it with its name, else the only one whose path
        ends like its imagePath; None: it is embedded, or not there.

        Only images below the source count, so an imagePath cannot lead anywhere else.
        """
        stated = str(document.get("imagePath") or "").replace("\\", "/")
        for place in (stated, stated.rpartition("/")[2], *(path.stem + extension for extension in archives.EXTENSIONS)):
            try:
                target = (path.parent / place).resolve()
            except (OSError, ValueError):  # NUL, too long
                continue
            if target in self._by_place:
                return self._by_place[target]
        inside = document.get("imageData")
        if isinstance(inside, str):
            return self._similar(stated, inside)
        return self._similar(stated) or self._similar(name_id(name))

    def _similar(self, stated: str, inside: str | None = None) -> str | None:
        """The image whose name is like the stated one; where the label file holds the picture, only that very file."""
        found = self._index.find(stated) if stated else None
        if found is None or found.image is None:
            return None
        if inside is not None and not _is_inside(self._images[found.image], inside):
            return None
        self._forgiven.setdefault(found.rule, []).append(f"{stated} is {found.image}")
        return found.image

    def forgiven(self) -> list[str]:
        """What was done to names, a line each with the first of them."""
        return [
            f"images matched to imagePath by {rule}: {len(names)}, the first: {names[0]}"
            for rule, names in self._forgiven.items()
        ]


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read a tree of images and labelme files. Raises SourceError: no labelme file; a bad list or class file."""
    everything = walk_all(root)
    made = {name.rpartition("/")[0] for name in everything if name.endswith("/label_names.txt")}
    files = {name: path for name, path in everything.items() if not _is_label_file(name)}
    images = image_files.photographs_among(
        {name: path for name, path in files.items() if name.rpartition("/")[0] not in made},
        {name_id(name) for name in everything if _is_label_file(name)},
    )
    images.skipped.extend((MADE, name) for name in files if name.rpartition("/")[0] in made)
    pictures = Pictures(images.images)
    found = _label_files(everything, pictures)
    if not found.count:
        raise SourceError(f"{root}: no labelme file (JSON with `shapes`) below it; data.path must name their folder")

    classes, ids, notes = class_lists.named(root, data, sorted(set().union(*found.labels.values()) - {IGNORE}))
    ids[IGNORE] = label_maps.IGNORE
    members: dict[str, Path | Maker] = {f"images/{inside(name)}": path for name, path in images.images.items()}
    members |= {f"images/{key}.png": partial(masks.embedded, path) for key, path in found.embedded.items()}
    members |= _masks(found, members, data, ids, class_lists.empty_id(data, ids), max_pixels)

    names = [name.partition("/")[2] for name in members if name.startswith("images/")]
    keys = sorted(name_id(name) for name in names)
    aliases = {f"images/{key}": key for key in keys}
    splits = split_lists.decide(root, data.lists, set(keys), aliases, layout.parts(names), found.labelled.keys())
    return Source(
        files=[
            (name, origin) for name, origin in members.items() if name_id(name.partition("/")[2]) not in splits.left_out
        ],
        classes=classes,
        lists=splits.lists,
        groups=groups_by(data.group, keys) or layout.groups_or_singles(names),
        refused=found.refused,
        notes=[
            f"{found.count} labelme files, {len(found.labelled)} with shapes; pixels in no shape: {data.unannotated}",
            *annotations.no_shapes_notes(len(found.empty), data.unannotated, data.no_shapes),
            *pictures.forgiven(),
            *notes,
            *splits.notes,
        ],
        skipped=[*images.skipped, *found.skipped],
    )


def _is_inside(path: Path, text: str) -> bool:
    """Whether a label file's imageData is this file."""
    if path.stat().st_size > len(text):
        return False
    try:
        return base64.b64decode(text) == path.read_bytes()
    except (binascii.Error, ValueError):
        return False


def _is_label_file(name: str) -> bool:
    return name.lower().endswith(".json")


def _label_files(everything: Mapping[str, Path], pictures: Pictures) -> Found:
    """Every labelme file of the tree; JSON files of another kind are passed over."""
    found = Found()
    taken: dict[str, list[str]] = {}  # name id -> the files that label it
    for name, path in everything.items():
        if not _is_label_file(name):
            continue
        if image_files.is_system_file(name):
            found.skipped.append((image_files.SYSTEM, name))
            continue
        try:
            document = parsing.read_json(path, max_bytes=masks.MAX_BYTES)
        except SourceError as error:
            found.refused.append((f"masks/{inside(name_id(name))}.png", "label-file", str(error)))
            continue
        if not isinstance(document, dict) or "shapes" not in document:
            found.skipped.append(("no labelme file (JSON without `shapes`)", name))
            continue

        found.count += 1
        picture = pictures.of(name, path, document)
        key = name_id(inside(picture or name))
        taken.setdefault(key, []).append(name)
        if not _is_best(name, key, taken[key]):
            continue
        found.forget(key)
        if picture is None:
            found.embedded[key] = path
        _add_shapes(found, key, path, masks.shapes_of(document))
    for key, names in taken.items():
        _refuse_others(found, key, names)
    return found


def _is_best(name: str, key: str, names: Sequence[str]) -> bool:
    """Whether a file is the first of those that label one image, or the one with the image's own name."""
    return name == names[0] or name_id(name).rpartition("/")[2] == key.rpartition("/")[2]


def _refuse_others(found: Found, key: str, names: Sequence[str]) -> None:
    """Of several files that label one image, the one with its own name counts (`x.json` before `x - Copy.json`), else none."""
    if len(names) == 1:
        return
    own = [name for name in names if name_id(name).rpartition("/")[2] == key.rpartition("/")[2]]
    for name in names:
        if own != [name]:
            others = ", ".join(other for other in names if other != name)
            found.refused.append((f"labels/{name}", "duplicate-name", f"labels the same image as {others}; keep one"))
    if len(own) != 1:
        found.forget(key)
        reason = f"{', '.join(names)} label this image; keep one"
        found.refused.append((f"masks/{key}.png", "duplicate-name", reason))


def _add_shapes(found: Found, key: str, path: Path, shapes: Sequence[Any]) -> None:
    lost = [masks.kind_of(shape) for shape in shapes if not masks.has_area(shape)]
    if lost:
        found.lost[key] = lost
    if len(lost) == len(shapes):
        found.empty |= {} if lost else {key: None}
        return
    drawn = [shape for shape in shapes if isinstance(shape, dict) and masks.has_area(shape)]
    found.labels[key] = {shape["label"] for shape in drawn if isinstance(shape.get("label"), str)}
    found.labelled[key] = path


def _masks(
    found: Found,
    images: Mapping[str, Path | Maker],
    data: config.Data,
    ids: Mapping[str, int],
    empty: int,
    max_pixels: int,
) -> dict[str, Path | Maker]:
    """Who renders each mask. Where what has no area would become background, the mask is refused instead."""
    made: dict[str, Path | Maker] = {}
    for key, path in found.labelled.items():
        made[f"masks/{key}.png"] = partial(masks.render, path, ids, empty, max_pixels)
    for key, kinds in found.lost.items():
        if data.unannotated == "background":
            made.pop(f"masks/{key}.png", None)
            reason = f"a shape of kind {kinds[0]!r}: {annotations.LOST}"
            found.refused.append((f"masks/{key}.png", annotations.NO_AREA, reason))
        else:
            found.skipped += [(annotations.NO_AREA, f"a {kind} of {key}") for kind in kinds]
    if data.no_shapes == "background":
        pictures = {name_id(name.partition("/")[2]): picture for name, picture in images.items()}
        for key in found.empty:
            if isinstance(picture := pictures.get(key), Path):
                made[f"masks/{key}.png"] = partial(annotations.render_background, picture, empty, max_pixels)
    return made


def inside(name: str) -> str:
    return name.removeprefix("images/")
