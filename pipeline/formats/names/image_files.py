"""Which files of a folder are images: the content decides; labels, world files and other companions never count.

What a system or camera leaves beside pictures must neither take a picture's name (`x.json` beside `x.png`) nor stop the rest.
"""

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipeline.formats.names import matching
from pipeline.formats.names.skipped import Skipped
from pipeline.imaging import decode
from pipeline.storage import archives

SYSTEM = "the system's own file"
BESIDE_IMAGE = "mask beside its image, not read from here; move it to masks/"
# Files of the system: never anybody's data.
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", "icon\r"})
_SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information"})
# The camera's own format beside its JPEG. Many begin like a TIFF, and none is read here.
_RAW = frozenset({".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw", ".x3f", ".3fr"})


class Found(NamedTuple):
    """`images`: name -> path, in order. `skipped`: the other files, each with its kind."""

    images: dict[str, Path]
    skipped: list[Skipped]


def is_system_file(name: str) -> bool:
    """Whether a path is one that an operating system made: hidden, `Thumbs.db`, below `__MACOSX`, macOS's `._x`."""
    folders = PurePosixPath(name).parts
    hidden = any(part.startswith(".") for part in folders)
    return hidden or folders[-1].casefold() in _SYSTEM_FILES or any(f.casefold() in _SYSTEM_FOLDERS for f in folders)


def images_among(files: Mapping[str, Path]) -> Found:
    """Tell images from what lies beside them.

    A file counts as an image when its extension is an image's (what is wrong with it is said when it is decoded) or its
    content is; never when the system or the camera made it for itself.
    """
    found = Found({}, [])
    for name, path in files.items():
        if (kind := kind_of(name, None) or _as_link(path) or _by_content(name, path)) is None:
            found.images[name] = path
        else:
            found.skipped.append((kind, name))
    return found


def photographs_among(files: Mapping[str, Path], labelled: Collection[str] = ()) -> Found:
    """As `images_among`, without masks that lie beside their images (`matching.masks_beside`)."""
    found = images_among(files)
    for name in matching.masks_beside(list(found.images), labelled):
        del found.images[name]
        found.skipped.append((BESIDE_IMAGE, name))
    return found


def kind_of(name: str, head: bytes | None) -> str | None:
    """What a file is that is no image, by its name and its first bytes; None for an image, and for what only unknown first
    bytes (`head` None) could tell."""
    extension = PurePosixPath(name).suffix.casefold()
    if is_system_file(name):
        return SYSTEM
    if extension in _RAW:
        return "camera raw; export it as JPEG, PNG or TIFF"
    if extension in archives.EXTENSIONS or head is None:
        return None
    try:
        decode.sniff(head)
    except decode.Refused as error:
        return f"no image ({extension or error.code})"
    return None


def _as_link(path: Path) -> str | None:
    return "a link that leads nowhere" if path.is_symlink() and not path.exists() else None


def _by_content(name: str, path: Path) -> str | None:
    if PurePosixPath(name).suffix.casefold() in archives.EXTENSIONS:
        return None
    with path.open("rb") as file:
        return kind_of(name, file.read(256))
