"""A plain folder of images: `images/`, `masks/` for some of them, and optional text lists.

images/ANY/PATH.jpg     every image; its *name id* is the path under images/ without the extension
masks/ANY/PATH.png      class ids of that image; images without one are unlabelled
classes.txt             line n (from 0) names class n, optionally followed by a colour: `road #804080` or
                        `road 128 64 128`; with `data.classes: null` the ids found in the masks are the classes
labelled.txt ...        name ids, one a line (params.yaml: data.lists)
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import images, masks
from pipeline.config import Lists
from pipeline.formats.source import LISTS, Source, SourceError, groups_by, name_id, walk

_HEX = re.compile(r"\s#([0-9a-fA-F]{6})$")
_RGB = re.compile(r"\s(\d+)\s+(\d+)\s+(\d+)$")


def _lines(path: Path, way_out: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside)
        hint = f" (there is {', '.join(near)})" if near else ""
        raise SourceError(f"{path}: not found{hint}, though params.yaml names it; {way_out}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def class_list(lines: Sequence[str], file: Path) -> list[dict[str, Any]]:
    """`name`, `name #rrggbb` or `name r g b` lines -> [{"id", "name", "color"}].

    Colours are 0..255 each; classes without one get a distinct one.

    Raises:
        SourceError: no class, a name twice, a colour beyond 255, or more than 255 classes (255 means ignore).
    """
    if not 0 < len(lines) <= 255:
        raise SourceError(f"{file}: {len(lines)} classes; expected 1 to 255, one name a line (id 255 means ignore)")
    spare = masks.palette(len(lines))
    out: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        colour = list(spare[index])
        if match := _HEX.search(line):
            colour = list(bytes.fromhex(match[1]))
        elif match := _RGB.search(line):
            colour = [int(value) for value in match.groups()]
            if max(colour) > 255:
                raise SourceError(f"{file}: line {index + 1}: {line!r}: red, green and blue are 0 to 255 each")
        name = line[: match.start()].strip() if match else line
        if any(known["name"] == name for known in out):
            raise SourceError(f"{file}: line {index + 1}: class {name!r} stands there twice")
        out.append({"id": index, "name": name, "color": colour})
    return out


def _infer_classes(mask_files: dict[str, Path], max_pixels: int) -> list[dict[str, Any]]:
    highest = -1
    for path in mask_files.values():
        try:
            ids = masks.decode_mask(path.read_bytes(), max_pixels=max_pixels)
        except images.Refused:
            continue  # ingest quarantines it with its reason
        if (known := ids[ids < 255]).size:
            highest = max(highest, int(known.max()))
    if highest < 0:
        raise SourceError("no class file and no readable mask: name a file with one class a line in data.classes")
    return [{"id": k, "name": f"class_{k}", "color": list(c)} for k, c in enumerate(masks.palette(highest + 1))]


def read(
    folder: Path, *, classes: str | None, lists: Lists, group: str | None, max_pixels: int = 178_956_970
) -> Source:
    """Read a source folder's lists and names; image bytes are read later, one at a time.

    Args:
        folder: holds `images/` and, for labelled images, `masks/`.
        classes: class file inside the folder; None: the ids found in the masks are the classes.
        lists: id lists inside the folder.
        group: regular expression with one (...) that yields an image's group from its name id. Without it the
            sub-folder under images/ is the group, and an image directly in images/ is a group of its own.
        max_pixels: budget for masks that are decoded where no class file is given.

    Raises:
        SourceError: no images, a class file or list that is not there, a list names an unknown image or one twice, a
            group that does not match; names the file.
    """
    image_files, mask_files = walk(folder / "images"), walk(folder / "masks")
    if not image_files:
        raise SourceError(
            f"{folder}: no files under images/; data.path must name a folder that holds images/ and masks/"
        )
    ids = {name_id(name) for name in image_files}
    found = {key: _id_list(folder, getattr(lists, key), ids) for key in LISTS}
    groups = groups_by(group, sorted(ids))
    if classes is None:
        known = _infer_classes(mask_files, max_pixels)
    else:
        way_out = "write it, or set data.classes: null to take the ids found in the masks as the classes"
        known = class_list(_lines(folder / classes, way_out), folder / classes)
    return Source(
        files=[(f"images/{n}", p) for n, p in image_files.items()] + [(f"masks/{n}", p) for n, p in mask_files.items()],
        classes=known,
        lists=found,
        groups=groups,
    )


def _id_list(folder: Path, file: str | None, ids: set[str]) -> list[str] | None:
    if file is None:
        return None
    listed = [line if line in ids else name_id(line) for line in _lines(folder / file, "write it, or take it out")]
    if unknown := [key for key in listed if key not in ids]:
        raise SourceError(
            f"{folder / file}: {len(unknown)} ids have no file under images/, the first is {unknown[0]!r}"
        )
    if len(set(listed)) < len(listed):
        twice = next(key for key in listed if listed.count(key) > 1)
        raise SourceError(f"{folder / file}: {twice!r} is listed twice")
    return listed
