"""How a delivery lies in its archive, by the same rules as a source: which folders are only wrapping, which files are masks.

Deliveries come zipped with their own folder, with `images/` and `masks/` in it, or with masks beside the images. Nothing of
that may bring label maps in as photographs, nor hide the group that an image belongs to.
"""

from collections.abc import Iterable, Sequence

from pipeline.formats.common.source import name_id
from pipeline.formats.names import matching

MASK_FOLDERS = frozenset(
    {
        "masks", "mask", "labels", "label", "annotations", "segmentationclass", "segmentationclasspng",
        "segmentationclassraw", "segmentationobject", "gtfine", "gtcoarse", "targets", "ground_truth", "groundtruth",
    }
)  # fmt: skip
IN_MASK_FOLDER = "mask in a folder of masks; masks of a later dump are not read"
BESIDE_IMAGE = "mask beside its image; masks of a later dump are not read"


def masks_among(names: Sequence[str]) -> dict[str, str]:
    """The files that are masks of others -> why.

    A file in a folder of masks is one where another file lies in no such folder; `x_mask.png` is one beside `x.jpg`.
    """
    in_folder = [name for name in names if _folders(name) & MASK_FOLDERS]
    found = dict.fromkeys(in_folder, IN_MASK_FOLDER) if len(in_folder) < len(names) else {}
    return found | dict.fromkeys(matching.masks_beside([name for name in names if name not in found]), BESIDE_IMAGE)


def without_wrapping(names: Iterable[str]) -> dict[str, str]:
    """Every file's name -> its name without folders that wrap the whole delivery, and without `images/`.

    What stands around `images/` in all files is wrapping (`spring/images/cam0/50.png` -> `cam0/50.png`). Without an
    `images/` nothing is cut: a folder around everything may be the place that all its images show.
    """
    listed = list(names)
    common = _common_folders(listed)
    below = [name.split("/")[len(common) :] for name in listed]
    if common and not (common[-1].casefold() == "images" or all(parts[0].casefold() == "images" for parts in below)):
        return {name: _without_images(name) for name in listed}
    return {name: _without_images("/".join(parts)) for name, parts in zip(listed, below, strict=True)}


def _folders(name: str) -> set[str]:
    return {part.casefold() for part in name.split("/")[:-1]}


def _common_folders(names: Sequence[str]) -> list[str]:
    """The folders that all files lie in, outermost first."""
    paths = [name.split("/")[:-1] for name in names]
    if not paths:
        return []
    shared = []
    for first, last in zip(min(paths), max(paths), strict=False):  # what these two share, all share
        if first != last:
            break
        shared.append(first)
    return shared


def _without_images(name: str) -> str:
    return name[len("images/") :] if name.casefold().startswith("images/") else name


def unique(paths: Iterable[str]) -> list[str]:
    """Paths -> `images/...` names whose name ids are unique in the dump: nothing is lost to a.jpg beside a.png."""
    taken: dict[str, int] = {}
    return [_canonical(path, taken) for path in paths]


def _canonical(path: str, taken: dict[str, int]) -> str:
    """`taken` maps each name id to the number that its next namesake tries first: a million equal names cost a million
    steps, not their square."""
    key = name_id(path)
    extension = path[len(key) :]
    number = taken.get(key, 1)
    while (free := key if number == 1 else f"{key}~{number}") in taken:
        number += 1
    taken[free] = 2
    taken[key] = number + 1
    return f"images/{free}{extension}"
