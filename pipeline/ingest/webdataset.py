"""Any form of a delivery -> its files, one at a time under caps: a folder, a zip, a tar, a WebDataset, a URL of those.

A WebDataset is a tar of KEY.jpg with KEY.cls, KEY.json, ... beside it; several of them, its shards, are named by a brace
pattern (`shard-{000000..000009}.tar`) or by the folder that holds nothing else but papers. All shards are one delivery:
keys may repeat, caps count over all, and one that is missing or damaged refuses the whole.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from pipeline.formats.names import image_files
from pipeline.ingest import remote
from pipeline.storage import archives
from pipeline.storage.archives import ArchiveLimits, ArchiveMember, DumpRefused

Step = Callable[[Callable[[float], None]], Iterator[ArchiveMember]]  # seen -> the members of one archive or folder
MAX_SHARDS = 100_000
_SHARD = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
# What data sets keep beside KEY.jpg, as KEY.cls or KEY.seg.png: labels, captions, masks; not read in later dumps.
_BESIDE = re.compile(
    r"\.(cls|cls2|json|jsonl|txt|text|csv|xml|ya?ml|npy|npz|pyd|pth|pickle|pkl|index|id|md"
    r"|(seg|semseg|mask|label|labels|depth|instance|instances|panoptic)\.\w+)$",
    re.IGNORECASE,
)
# What publishers keep beside shards, further to that.
_PAPERS = re.compile(
    r"(^|/)(readme|licen[cs]e|notice|copying|changelog|citation|manifest|_success|checksums?|(md5|sha\d+)sums?)(\.\w+)?$"
    r"|\.(md5|sha\d+|sfv|sig|asc|idx|log|rst|html?|tsv|parquet|arrow|feather|py|sh|pdf|toml|ini|cfg|bib|lst)$",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(.*?)(\d+)(\.[^\d/]*)$")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def members(
    where: str | Path, limits: ArchiveLimits, spool: Path, seen: Callable[[float], None] = lambda share: None
) -> Iterator[ArchiveMember]:
    """Regular files of the delivery.

    Args:
        where: a path, a brace pattern of paths, or a URL of either. `spool`: a folder for what is fetched, one archive
            at a time.
        seen: called with the share of the delivery that has been read, 0..1.

    Raises:
        DumpRefused: as `archives.read`; a shard is missing; the URL cannot be read.
    """
    text = str(where).removeprefix("file://")
    if remote.is_url(text):
        steps = [step for place in braces(text) for step in _remote(place, limits, spool)]
    else:
        steps = [partial(archives.read, path, limits) for path in _local(text)]
    return archives.counted(_joined(steps, seen), remote.shown(text), limits)


def _joined(steps: Sequence[Step], seen: Callable[[float], None]) -> Iterator[ArchiveMember]:
    for number, step in enumerate(steps):
        yield from step(lambda share, number=number: seen((number + share) / len(steps)))  # type: ignore[misc]


def _local(text: str) -> list[Path]:
    """One path, or those of all shards."""
    paths = [Path(place) for place in ([text] if Path(text).exists() else braces(text))]
    if len(paths) > 1 and (gone := [path for path in paths if not path.is_file()]):
        raise DumpRefused(f"{text}: {len(gone)} of {len(paths)} shards are missing, the first is {gone[0].name}")
    if len(paths) == 1 and paths[0].is_dir():
        names = [path.relative_to(paths[0]).as_posix() for path in paths[0].rglob("*") if not path.is_dir()]
        return [paths[0] / name for name in shards_among(names, text)] or paths
    return paths


def _remote(url: str, limits: ArchiveLimits, spool: Path) -> list[Step]:
    place = remote.RemotePlace(url)
    if not place.is_folder():
        return [partial(_fetched, place, None, limits, spool)]
    listed = place.listing(limits)
    paths = {item.name: item.path for item in listed}
    if names := shards_among(list(paths), place.shown):
        return [partial(_fetched, place, paths[name], limits, spool) for name in names]
    return [partial(place.members, listed, limits)]


def _fetched(
    place: remote.RemotePlace, path: str | None, limits: ArchiveLimits, spool: Path, seen: Callable[[float], None]
) -> Iterator[ArchiveMember]:
    file = place.fetch(spool, limits, path)
    try:
        yield from archives.read(file, limits, seen)
    except DumpRefused as error:
        raise DumpRefused(str(error).replace(str(file), f"{place.shown} ({file.name})")) from error
    finally:
        file.unlink()


def braces(pattern: str) -> list[str]:
    """`a-{00..02}.tar` -> a-00.tar, a-01.tar, a-02.tar; `{x,y}` -> x and y; several braces multiply.

    Raises:
        DumpRefused: a range that runs backwards, or more than `MAX_SHARDS` names.
    """
    parts: list[list[str]] = []
    count, end = 1, 0
    for found in _BRACES.finditer(pattern):
        span = _RANGE.fullmatch(found[1])
        if span:
            low, high = int(span[1]), int(span[2])
            if high < low:
                raise DumpRefused(f"{pattern}: {found[0]} runs backwards")
            count *= high - low + 1
        elif "," in found[1]:
            count *= found[1].count(",") + 1
        else:
            continue  # a name with braces of its own
        if count > MAX_SHARDS:
            raise DumpRefused(f"{pattern}: more than {MAX_SHARDS} shards; add them in several dumps")
        choices = [f"{n:0{len(span[1])}d}" for n in range(low, high + 1)] if span else found[1].split(",")
        parts += [[pattern[end : found.start()]], choices]
        end = found.end()
    return ["".join(choice) for choice in product(*parts, [pattern[end:]])]


def unread(name: str) -> str | None:
    """Why a file of a delivery is passed over for its name alone; None where it has to be looked at."""
    parts = name.split("/")
    if image_files.is_system_file(name):
        return "system file"
    if "masks" in parts[:-1]:
        return "masks of a later dump are not read"
    return "label or text beside the images, not read" if _BESIDE.search(parts[-1]) else None


def shards_among(names: Sequence[str], where: str) -> list[str]:
    """The tars of a folder that holds tars and no image of its own, by name; else none of them.

    Raises:
        DumpRefused: numbers with leading zeros leave one out, as when a copy was not finished; or a file beside the tars
            may be an image by another name, or an archive of another kind, which would be lost.
    """
    tars = sorted(name for name in names if _SHARD.search(name))
    if any(name.lower().endswith(archives.EXTENSIONS) for name in names):
        return []
    other = [name for name in names if not (_SHARD.search(name) or _PAPERS.search(name) or unread(name))]
    if tars and other:
        raise DumpRefused(
            f"{where}: {min(other)!a} lies beside tars and is neither one of them nor an image by its name: deliver images "
            "and tars apart (an image needs its extension, as .jpg), or move that file away"
        )
    series: dict[tuple[str, str, int], set[int]] = {}
    for name in tars:
        if (found := _NUMBERED.fullmatch(name)) and found[2].startswith("0"):
            series.setdefault((found[1], found[3], len(found[2])), set())
    for name in tars:
        if (found := _NUMBERED.fullmatch(name)) and (key := (found[1], found[3], len(found[2]))) in series:
            series[key].add(int(found[2]))
    for (head, tail, width), numbers in series.items():
        if gaps := sorted(set(range(min(numbers), max(numbers))) - numbers):
            raise DumpRefused(
                f"{where}: {head}{gaps[0]:0{width}d}{tail} is missing among its neighbours: deliver it, or name the "
                f"shards that are meant, as in {head}{{{min(numbers):0{width}d}..{gaps[0] - 1:0{width}d}}}{tail}"
            )
    return tars
