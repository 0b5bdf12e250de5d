"""Which images `marginalia predict` reads, from files, folders and archives, and the name that each one's answer gets.

Names are given in the order of reading, before anything is decoded: the same inputs always lead to the same names,
whichever of the images turn out to be broken.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.formats.common.source import name_id
from pipeline.imaging import decode
from pipeline.storage import archives

EXTENSIONS = archives.EXTENSIONS
# A bundle runs without a project: the caps of an ingested dump, as the repository's params.yaml has them.
LIMITS = archives.ArchiveLimits(total_bytes=64 << 30, file_bytes=256 << 20, files=1_000_000, ratio=200)
MAX_PIXELS = 178_956_970
RESERVED = ("overlays", "confidence")  # folders that predict writes beside the masks
_ARCHIVE = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_FILES = (".png", ".jpg", ".csv", ".json")  # what predict's own files end in
_HEAD = 256  # bytes that `decode.sniff` looks at
_STEM = 200  # bytes: a temporary name is longer than the name, and file systems stop at 255


class SourceError(ValueError):
    """The inputs or the output folder cannot be used; the message says what to change."""


class Quarantined(NamedTuple):
    """What was not predicted: the file (or ARCHIVE/MEMBER), a short code and a reason that says what to do."""

    file: str
    code: str
    reason: str


@dataclass(frozen=True)
class Found:
    """An image to predict. `name` is the path of its answer without extension, unique regardless of case; `path` is None
    for a member of an archive. `load()` gives the bytes or raises images.Refused."""

    file: str
    name: str
    path: Path | None
    load: Callable[[], bytes]


def unique(path: str, taken: dict[str, int]) -> str:
    """`path` without its extension, or that with `~2`, `~3`... where an earlier one has the name: nothing is lost to
    a.jpg beside a.png. `taken` is kept between calls: name -> the number that its next namesake tries first.

    Names are told apart without case, as on the file systems of Windows and macOS. A folder that could stand in the way
    of a written file or folder gets a `~`.
    """
    *folders, stem = name_id(path).split("/")
    folders = [part + "~" if part.casefold().endswith(_FILES) else part for part in folders]
    if folders and folders[0].casefold() in RESERVED:
        folders[0] += "~"
    stem = stem.encode("utf-8", "replace")[:_STEM].decode("utf-8", "ignore")
    name = "/".join([*(part.encode("utf-8", "replace").decode() for part in folders), stem])
    number, found = taken.get(name.casefold(), 1), name
    while found.casefold() in taken:
        number += 1
        found = f"{name}~{number}"
    taken[name.casefold()] = max(number, 1)
    taken.setdefault(found.casefold(), 1)
    return found


def walk(inputs: Sequence[Path], skip: Mapping[Path, Quarantined] | None = None) -> Iterator[Found | Quarantined]:
    """Everything to predict, in a fixed order; a member of an archive is held in memory until the next is asked for.

    A file that is named by itself is always taken, one in a folder or an archive if it looks like an image; hidden ones
    never. An archive that is damaged or hostile yields one Quarantined at the place where that shows. `skip` names
    archives that are not opened any more, and what to yield in their place.
    """
    taken: dict[str, int] = {}
    for given in inputs:
        if given.is_dir():
            for path in sorted(given.rglob("*")):
                inner = path.relative_to(given).as_posix()
                if not path.is_dir() and not _hidden(inner) and _looks_like_image(inner, partial(_head, path)):
                    yield _of_file(path, unique(inner, taken))
        elif not _ARCHIVE.search(given.name):
            yield _of_file(given, unique(given.name, taken))
        elif skip and given in skip:
            yield skip[given]
        else:
            yield from _of_archive(given, taken)


def survey(inputs: Sequence[Path], targets: Callable[[str], Sequence[Path]]) -> tuple[int, dict[Path, Quarantined]]:
    """Look through the inputs once before anything is written: (images there, archives to skip).

    Archives are read to their end: one hostile or damaged member keeps the whole of it out, and a progress bar needs
    the count. That costs little beside running a network on what is in them.

    Args:
        targets: the files that will be written for an image's name.

    Raises:
        SourceError: an input does not exist, holds no image, or would be written to.
    """
    for given in inputs:
        if not given.exists():
            raise SourceError(f"{given}: no such file or folder")

    found, skip = _look_through(inputs)
    if not found and not skip:
        raise SourceError(f"no image in {', '.join(map(str, inputs))}; name image files, folders or archives of them")

    read = {item.path.resolve() for item in found if item.path is not None}
    folders = [given.resolve() for given in inputs if given.is_dir()]
    for item in found:
        for target in targets(item.name):
            _check_target(target, read, folders)
    return len(found), skip


class _Image(NamedTuple):
    """What is kept of an image that was found: not its bytes."""

    name: str
    path: Path | None


def _look_through(inputs: Sequence[Path]) -> tuple[list[_Image], dict[Path, Quarantined]]:
    """The images to predict, and the archives that are refused, by path."""
    by_name = {_shown(given): given for given in inputs}
    skip: dict[Path, Quarantined] = {}
    while True:
        found: list[_Image] = []
        refused: dict[Path, Quarantined] = {}
        for item in walk(inputs, skip):
            if isinstance(item, Quarantined):
                refused[by_name[item.file]] = item
            else:
                found.append(_Image(item.name, item.path))
        if refused.keys() <= skip.keys():
            return found, skip
        skip |= refused  # and once more: their members must not keep a name from others


def _check_target(target: Path, read: set[Path], folders: Sequence[Path]) -> None:
    """Raises SourceError where a written file would replace an input, or be read as one the next time."""
    target = target.parent.resolve() / target.name  # a folder below the output may be a link
    if target in read:
        raise SourceError(f"{target}: the answer would overwrite an input; choose another output folder")
    for folder in folders:
        if target.is_relative_to(folder) and not _hidden(target.relative_to(folder).as_posix()):
            raise SourceError(
                f"{target}: the answers would lie in the input folder {folder} and be read as images the next "
                "time; choose an output folder outside"
            )


def _of_file(path: Path, name: str) -> Found:
    return Found(_shown(path), name, path, partial(_load, path))


def _of_archive(path: Path, taken: dict[str, int]) -> Iterator[Found | Quarantined]:
    try:
        for member in archives.read(path, LIMITS):
            if not _hidden(member.name) and _looks_like_image(member.name, partial(_beginning, member)):
                yield Found(
                    f"{_shown(path)}/{member.name}", unique(member.name, taken), None, partial(_unpacked, member)
                )
    except (archives.DumpRefused, OSError) as error:
        yield Quarantined(_shown(path), "archive", _plain(str(error)))


def _hidden(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts) or parts[-1] == "Thumbs.db"


def _looks_like_image(name: str, head: Callable[[], bytes]) -> bool:
    if name.lower().endswith(EXTENSIONS):
        return True
    try:
        decode.sniff(head())
    except decode.Refused:
        return False
    return True


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():
            return b""  # opening a pipe would wait for its writer
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def _beginning(member: archives.ArchiveMember) -> bytes:
    return (member.data or b"")[:_HEAD]


def _load(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise decode.Refused("unreadable", "a link to nothing or no plain file; put the file itself there")
        if (size := path.stat().st_size) > LIMITS.file_bytes:
            raise _too_large(size)
        return path.read_bytes()
    except OSError as error:
        raise decode.Refused("unreadable", f"{error.strerror or error}; check the file and its permissions") from error


def _unpacked(member: archives.ArchiveMember) -> bytes:
    if member.data is None:
        raise _too_large(member.size)
    return member.data


def _too_large(size: int) -> decode.Refused:
    return decode.Refused("too-many-bytes", f"{size} bytes; the limit is {LIMITS.file_bytes}; save it smaller")


def _shown(path: Path) -> str:
    """The path as text that UTF-8 can write, whatever bytes the file system has in it."""
    return _plain(str(path))


def _plain(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
