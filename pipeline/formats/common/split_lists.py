"""Id lists as they are published: plain or gzipped, one image a line.

A line is a name id, a file name, or a path; what follows it after white space or a comma (the mask of UniMatch's pairs)
is not needed. So these all name the same image of a Cityscapes tree:

    train/aachen/aachen_000000_000019
    leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
    leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png gtFine/train/aachen/aachen_000000_000019_gtFine_...png
"""

import difflib
import gzip
import re
import zlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from pipeline.config import Lists
from pipeline.formats.common.source import LISTS, SourceError, name_id

MAX_BYTES = 256 << 20  # unpacked; the longest published list, COCO's train2017 with masks, has 6 MB


def read(
    root: Path, lists: Lists, ids: Set[str], aliases: Mapping[str, str] | None = None
) -> dict[str, list[str] | None]:
    """params.yaml's data.lists -> name ids for each, in the file's order; None for a list that is not given.

    Args:
        root: the source; a list is looked for there, then as a path of its own (relative to the project, or absolute).
        ids: every image's name id.
        aliases: other spellings without extension -> name id, such as the image's path in the original tree.

    Raises:
        SourceError: a list that is nowhere, is no text, names unknown images (how many, and the first), or one twice.
    """
    return {part: _read(root, getattr(lists, part), part, ids, aliases or {}) for part in LISTS}


def given(lists: Lists) -> bool:
    """Whether params.yaml names any list; a format's own lists count only where it does not."""
    return any(getattr(lists, part) is not None for part in LISTS)


class Splits(NamedTuple):
    """`lists`: labelled, unlabelled, val, test -> name ids or None. `left_out`: ids that take no part."""

    lists: dict[str, list[str] | None]
    left_out: set[str]
    notes: list[str]


def decide(
    root: Path,
    lists: Lists,
    ids: Set[str],
    aliases: Mapping[str, str],
    parts: Mapping[str, Sequence[str]],
    masked: Set[str],
) -> Splits:
    """The user's lists where params.yaml names any, else the val and test that the source itself states.

    Args:
        parts: train, val, test -> name ids, as folders, label files or the tool state them.
        masked: name ids with a mask.

    Raises:
        SourceError: as `read`.
    """
    if not given(lists) and parts.keys() & {"val", "test"}:
        return Splits(*own(parts, masked))
    return Splits(read(root, lists, ids, aliases), set(), [])


def own(
    parts: Mapping[str, Sequence[str]], masked: Set[str]
) -> tuple[dict[str, list[str] | None], set[str], list[str]]:
    """A format's own val and test ids -> (lists, ids to leave out, notes).

    Public data sets keep their test labels back. Then the val list is the test set, as it is in papers, and val is drawn
    from the training images by `split.val`: a score on images that also chose the checkpoint would flatter. Val and test
    images without labels are left out altogether: who held them back did not mean them to be trained on, not even unlabelled.
    """
    lists: dict[str, list[str] | None] = dict.fromkeys(LISTS)
    held = {part: [key for key in parts.get(part, ()) if key in masked] for part in ("val", "test")}
    without = {part: set(parts.get(part, ())) - masked for part in ("val", "test")}
    notes = [f"left out: {len(keys)} {part} images without labels" for part, keys in without.items() if keys]
    left_out = without["val"] | without["test"]
    if held["test"]:
        lists |= {"val": held["val"] or None, "test": held["test"]}
    elif held["val"]:
        lists["test"] = held["val"]
        notes.append(f"its {len(held['val'])} val images are the test set; val is drawn from train (split.val)")
    return lists, left_out, notes


def _read(root: Path, file: str | None, part: str, ids: Set[str], aliases: Mapping[str, str]) -> list[str] | None:
    if file is None:
        return None
    path = find(root, file, part)
    return resolve(_lines(path), path, ids, aliases)


def resolve(lines: list[str], path: Path, ids: Set[str], aliases: Mapping[str, str]) -> list[str]:
    """Lines of a list -> name ids. Raises SourceError as `read`; `path` is only named."""
    listed = [_resolve(line, ids, aliases) for line in lines]
    if unknown := [line for line, key in zip(lines, listed, strict=True) if key is None]:
        raise SourceError(f"{path}: {len(unknown)} ids have no image here, the first is {unknown[0]!r}")
    found, seen = [key for key in listed if key is not None], set[str]()
    for key in found:
        if key in seen:
            raise SourceError(f"{path}: {key!r} is listed twice ({len(found) - len(set(found))} repeats in all)")
        seen.add(key)
    return found


def _resolve(line: str, ids: Set[str], aliases: Mapping[str, str]) -> str | None:
    """A name may hold spaces and commas, so the whole line is tried before its first word."""
    for text in dict.fromkeys((line, *re.split(r"[\s,;]+", line, maxsplit=1)[:1])):
        key = text.strip("\"'").replace("\\", "/").removeprefix("./")
        for name in (key, name_id(key)):
            if name in ids:
                return name
            if name in aliases:
                return aliases[name]
    return None


def find(root: Path, file: str, part: str) -> Path:
    """The list's path: in the source, else relative to the project or absolute. Raises SourceError with near names."""
    places = list(dict.fromkeys((root / file, Path(file))))
    for path in places:
        if path.is_file():
            return path
    beside = [p.name for place in places if place.parent.is_dir() for p in place.parent.iterdir() if p.is_file()]
    near = difflib.get_close_matches(places[0].name, sorted(set(beside)))
    hint = f" (there is {', '.join(near)})" if near else ""
    tried = " or ".join(map(str, places))
    raise SourceError(
        f"{tried}: not found{hint}, though params.yaml names it in data.lists.{part}; write it or take it out"
    )


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise SourceError(f"{path}: a list of more than {MAX_BYTES >> 20} MiB; give the ids alone, one a line")
        text = data.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{path}: damaged gzip ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text (byte {error.start}); save the list as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
