"""What every label format becomes: archive members by reference, classes, lists, groups, and what cannot be used."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.formats.names.skipped import Skipped

LISTS = ("labelled", "unlabelled", "val", "test")
Maker = Callable[[], bytes]  # renders one mask PNG when asked; raises images.Refused, which quarantines that mask


class SourceError(ValueError):
    """The source cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class Source:
    """A source's content. An image is `images/NAME_ID.EXT`, its mask `masks/NAME_ID.png`.

    Attributes:
        files: archive member name -> the file that holds its bytes, or who renders them (masks only).
        classes: {"id", "name", "color": [r, g, b]} each, ids 0..n-1 in order.
        lists: labelled, unlabelled, val, test -> name ids, or None where the source says nothing.
        groups: name id -> group; None: by `data.group`, else by the sub-folder.
        refused: (member name, code, reason) of records that cannot be used; they go to the quarantine list.
        class_list: the published list of classes that was taken for want of a class file, in words; None otherwise.
        notes: what the reader decided, one line each, for pull's table.
        skipped: (kind, name) of files, shapes and records that were passed over, and why they do not count.
        tally: what happened while masks were rendered, counted by its makers.
    """

    files: Sequence[tuple[str, Path | Maker]]
    classes: list[dict[str, Any]]
    lists: dict[str, list[str] | None]
    groups: dict[str, str] | None = None
    refused: Sequence[tuple[str, str, str]] = ()
    class_list: str | None = None
    notes: Sequence[str] = ()
    skipped: Sequence[Skipped] = ()
    tally: Counter[str] = field(default_factory=Counter)


def name_id(path: str) -> str:
    """Path under images/ or masks/ without its extension: `a/b.tar.jpg` -> `a/b.tar`."""
    folder, _, file = path.rpartition("/")
    stem = file.rpartition(".")[0] or file
    return f"{folder}/{stem}" if folder else stem


def walk(folder: Path) -> dict[str, Path]:
    """Regular files below a folder, {relative name: path} sorted by name, without hidden ones; {} where it is absent."""
    return {
        name: path
        for name, path in walk_all(folder).items()
        if not any(p.startswith(".") for p in name.split("/")) and path.exists()
    }


def walk_all(folder: Path) -> dict[str, Path]:
    """As `walk`, with hidden files and links that lead nowhere. Linked folders are followed, each place once."""
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above, or a second one to the same
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(place, name)
            if path.is_file() or not path.exists():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def groups_by(pattern: str | None, ids: Sequence[str]) -> dict[str, str] | None:
    """Group of each name id by `data.group`, a regular expression with one (...) part; None without a pattern.

    Raises:
        SourceError: not a regular expression, not exactly one (...), or an id that does not match.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SourceError(f"data.group: {pattern!r} is not a regular expression ({error})") from error
    if compiled.groups != 1:
        raise SourceError(f"data.group: {pattern!r} needs exactly one (...) part: the group's name within the name id")
    found = {key: match[1] for key in ids if (match := compiled.search(key)) and match[1]}
    if missing := next((key for key in ids if key not in found), None):
        raise SourceError(f"data.group: {pattern!r} finds no group in the image id {missing!r}")
    return found
