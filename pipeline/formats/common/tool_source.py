"""A label tool's pictures and a folder of images -> a source."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import config
from pipeline.formats.common import annotations, split_lists
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common.annotations import Picture
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk
from pipeline.imaging import label_maps
from pipeline.imaging.decode import Refused
from pipeline.imaging.mask_png import Colour

SHOWN = 4  # names in a reason


def source(
    root: Path,
    data: config.Data,
    found: Sequence[Picture],
    names: Sequence[str],
    colours: Mapping[str, Colour],
    max_pixels: int,
) -> Source:
    """Images lie in `root`/images. A picture's name is its path there; where only one image has its last part, the longer of
    the two may begin with folders that the other lacks, but no folder that both state may differ. Where several pictures
    could be one image, the one that is called as the image is it; of others nobody can tell which, and none is taken.

    Args:
        names: the tool's labels; one that stands for ignored pixels becomes 255.
        colours: of some labels.

    Raises:
        SourceError: no image, or what class and id lists raise.
    """
    files = walk(root / "images")
    if not files:
        raise SourceError(f"{root}: no files under images/; export the task with its images, or put them there")
    by_end = defaultdict(list)
    for name in files:
        by_end[name.rpartition("/")[2]].append(name)
    given = class_lists.read(root, data)
    ignored = annotations.ignore_label(names, [c["name"] for c in given[0]] if given else ())
    classes, ids, notes = class_lists.named(root, data, [n for n in names if n != ignored], colours)
    ids = ids | ({ignored: label_maps.IGNORE} if ignored else {})
    empty = class_lists.empty_id(data, ids)
    members: list[tuple[str, Path | Maker]] = [(f"images/{name}", path) for name, path in files.items()]
    refused: list[tuple[str, str, str]] = []
    taken: set[str] = set()
    meant = {picture.name: _file(picture.name, files, by_end) for picture in found}
    claims: dict[str, list[str]] = defaultdict(list)
    for name, file in meant.items():
        if file is not None:
            claims[file].append(name)
    owners = {file: _owners(file, names) for file, names in claims.items()}
    for picture in found:
        file = meant[picture.name]
        if file is None:
            refused.append(
                (picture.name, "labels-without-image", "no image under images/ has this name, or several have")
            )
        elif picture.name not in owners[file]:
            refused.append((picture.name, "labels-without-image", _contested(file, claims[file])))
        elif name_id(file) in taken:
            refused.append((picture.name, "labels-twice", f"images/{file} has labels already; export one task of it"))
        elif picture.shapes:
            taken.add(name_id(file))
            members.append((f"masks/{name_id(file)}.png", _maker(picture, ids, empty, max_pixels)))
    names_ids = [name_id(name) for name in files]
    return Source(
        files=members,
        classes=classes,
        lists=split_lists.read(root, data.lists, set(names_ids)),
        groups=groups_by(data.group, names_ids),
        refused=refused,
        notes=notes,
    )


def _file(name: str, files: Mapping[str, Path], by_end: Mapping[str, list[str]]) -> str | None:
    for candidate in (name, name.removeprefix("images/"), name.rpartition("images/")[2]):
        if candidate in files:
            return candidate
    same = by_end.get(name.rpartition("/")[2], [])
    if len(same) != 1:
        return None
    # cam2/001.png is not cam1/001.png, although no other image has that last part
    return same[0] if f"/{name}".endswith(f"/{same[0]}") or f"/{same[0]}".endswith(f"/{name}") else None


def _owners(file: str, names: Sequence[str]) -> set[str]:
    """Of the pictures that could be `file` those that are: by their whole name, else the nearest where it is one."""
    exact = {name for name in names if file in (name, name.removeprefix("images/"))}
    near = {name for name in names if f"/{name}".rpartition("/images/")[2] == file} or set(names)
    return exact or (near if len(near) == 1 else set())


def _contested(file: str, names: Sequence[str]) -> str:
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"images/{file} could be each of {listed}; put every image into the folder that its picture's name states"


def _maker(picture: Picture, ids: Mapping[str, int], empty: int, max_pixels: int) -> Maker:
    def render() -> bytes:
        if not picture.height or not picture.width:
            raise Refused("bad-shape", "its labels state no image size; export it again")
        return label_maps.encode_png(annotations.paint(picture, ids, max_pixels=max_pixels, unannotated=empty))

    return render
