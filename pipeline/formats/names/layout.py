"""Words in paths that carry meaning: which split a folder, list or label file belongs to, and which folders are only layout.

A folder named `train` states a split, `images` or `JPEGImages` only that images lie there; neither is a place whose images
belong together. What is left of a path is its group.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from typing import Literal

from pipeline.formats.common.source import name_id

Part = Literal["train", "val", "test"]

_PARTS: dict[str, Part] = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "tst": "test",
}  # fmt: skip
_YEAR = re.compile(r"(?<=[a-z])(19|20)\d\d$")  # train2017
# What stands beside a split's word and says nothing about which one it is.
_OF_SETS = frozenset(
    {
        "set",
        "data",
        "dataset",
        "split",
        "part",
        "images",
        "imgs",
        "img",
        "image",
        "masks",
        "mask",
        "labels",
        "label",
        "annotations",
    }
)
_A_YEAR = re.compile(r"(19|20)\d\d")
_SEPARATORS = re.compile(r"[^A-Za-z0-9]+")

# Folders that tools create whatever is in the images. `default` is CVAT's name for "no subset".
LAYOUT = frozenset(
    {
        "images", "image", "imgs", "img", "jpegimages", "pngimages", "leftimg8bit", "default", "data", "dataset",
        "masks", "mask", "labels", "label", "annotations", "annotation", "segmentationclass", "segmentationclasspng",
        "segmentationclassraw", "segmentationobject", "gtfine", "upload", "media",
    }
)  # fmt: skip
# Of these, what people call places and things as well: layout only as long as no other place stands beside it.
_ALSO_NAMES = frozenset({"data", "dataset", "media", "upload", "default", "label", "mask", "annotation"})


def split_word(word: str) -> Part | None:
    """The split that a name states and nothing else: in any case, with or without a year, and what it is a set of.

    `Valid` -> val, `train2017` -> train, `Training_Set` -> train, `testset` -> test, `val_images` -> val.
    """
    plain = _YEAR.sub("", word.strip().casefold())
    if plain in _PARTS:
        return _PARTS[plain]
    words = [part for part in _SEPARATORS.split(plain) if part and part not in _OF_SETS and not _A_YEAR.fullmatch(part)]
    return _PARTS.get(_YEAR.sub("", words[0].removesuffix("set"))) if len(words) == 1 else None


def split_in_name(stem: str) -> Part | None:
    """The split that a list's or label file's name states among its words: `instances_Test` -> test.

    None where no word or more than one split is stated (`train_val`, `trainval`).
    """
    stated = {part for word in _SEPARATORS.split(stem) if (part := split_word(word))}
    return stated.pop() if len(stated) == 1 else None


def split_in_path(path: str) -> Part | None:
    """The split that the folders of an image's path state: `images/Training/cam0/x.png` -> train.

    None where none or more than one is stated; the file's own name never counts.
    """
    folders = path.replace("\\", "/").split("/")[:-1]
    stated = {part for folder in folders if (part := split_word(folder))}
    return stated.pop() if len(stated) == 1 else None


def is_layout(folder: str) -> bool:
    """Whether a folder's name says only what lies there, or which split it is; neither makes a group."""
    return folder.casefold() in LAYOUT or split_word(folder) is not None


def group_in_path(path: str, places: Set[str] = frozenset()) -> str:
    """The folders of an image's path that are neither layout nor a split, joined: `images/val/cam0/x.png` -> `cam0`.

    "" where nothing is left. `places`: as `places_in`; these folders count whatever their names.
    """
    folders = [folder for folder in path.replace("\\", "/").split("/")[:-1] if folder]
    named = ["/".join(folders[: end + 1]) in places for end in range(len(folders))]
    return "/".join(
        folder for folder, is_place in zip(folders, named, strict=True) if is_place or not is_layout(folder)
    )


def places_in(paths: Iterable[str]) -> Set[str]:
    """Folders, as paths, whose names are layout elsewhere and that stand for a place here: `data/` beside `lab/`.

    A tool makes one folder of such a name, and all images lie below it; where images lie in folders beside it, somebody
    named it so.
    """
    children: dict[str, set[str]] = defaultdict(set)
    for folder in {path.replace("\\", "/").rpartition("/")[0] for path in paths}:
        parts = [part for part in folder.split("/") if part]
        for depth, part in enumerate(parts):
            children["/".join(parts[:depth])].add(part)
    places: set[str] = set()
    for above, names in children.items():
        own = {name for name in names if not is_layout(name) or name.casefold() in _ALSO_NAMES}
        if len(own) > 1:
            places |= {f"{above}/{name}".lstrip("/") for name in own if is_layout(name)}
    return places


def groups(paths: Iterable[str]) -> dict[str, str] | None:
    """Name id -> group by the images' folders; an image in no such folder is a group of its own.

    A folder that is in several splits (`train/cat`, `val/cat`) is a group in each: who made them wanted it on both sides.

    Args:
        paths: every image's path, with its extension.

    Returns:
        None where the folders tell fewer than two groups apart: one folder around everything says nothing about what
        belongs together, and as a group it would leave val and test empty.
    """
    listed = list(paths)
    places = places_in(listed)
    found = {name_id(path): (group_in_path(path, places), split_in_path(path)) for path in listed}
    if len({group for group, _ in found.values()}) < 2:
        return None
    sides = {stated for stated in found.values() if stated[1]}
    times = Counter(group for group, _ in sides)
    return {
        key: f"{part}/{group}" if group and part and times[group] > 1 else group or key
        for key, (group, part) in found.items()
    }


def groups_or_singles(paths: Iterable[str]) -> dict[str, str]:
    """As `groups`; where the folders tell nothing apart, each image is a group of its own."""
    names = list(paths)
    return groups(names) or {name_id(name): name_id(name) for name in names}


def parts(paths: Sequence[str]) -> dict[str, list[str]]:
    """The name ids of the images whose folders state a split, by split, in the order given."""
    found: dict[str, list[str]] = {}
    for path in paths:
        if part := split_in_path(path):
            found.setdefault(part, []).append(name_id(path))
    return found
