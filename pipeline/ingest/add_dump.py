"""Register a later delivery of unlabelled images: checked, copied into one plain archive, then named in dumps.yaml.

The registry is written last and atomically, under a lock: a delivery that is refused, or a process that dies on the
way, leaves it as it was. A delivery with the same files as a registered one, in whatever order, form or under whatever
names, is recognised by its content and changes nothing.
"""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from pipeline import config, paths
from pipeline import console as progress
from pipeline.formats.common.source import name_id
from pipeline.formats.names import image_files
from pipeline.formats.names import skipped as passed_over
from pipeline.formats.names.skipped import Skipped
from pipeline.imaging import decode
from pipeline.ingest import dump_layout, dump_registry, remote, webdataset
from pipeline.ingest.groups import Groups
from pipeline.stage import Result
from pipeline.storage import archives, atomic, dvc, manifest, shards

RESERVE = 1 << 30  # bytes of disk left alone
_SUFFIX = re.compile(r"(\.tar)?\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz|zst)$", re.IGNORECASE)


class Added(NamedTuple):
    """What became of a delivery. `same_as` names the registered dump it equals, in which case nothing was changed.

    `skipped` pairs the names of files that were not taken with the reason. `restored`: that dump's archive was gone
    from the disk and has been written again. `recognised`: (what, image and group) where folders are not those of the group.
    """

    name: str
    images: int
    sha256: str
    archive: Path
    skipped: list[tuple[str, str]]
    same_as: str | None
    warm_start: str | None
    restored: bool = False
    recognised: Sequence[Skipped] = ()


def add(
    path: str | Path,
    *,
    name: str | None = None,
    root: Path = Path(),
    params: config.Params,
    seen: Callable[[float], None] = lambda share: None,
) -> Added:
    """Register a delivery of unlabelled images as the next dump.

    Args:
        path: the delivery, in any form that `pipeline.ingest.webdataset` reads.
            Folders that only wrap it are dropped from the names; masks are not read (`pipeline.ingest.dump_layout`).
        name: the dump's name; without it, the file's own name in a safe form, numbered if it is taken.
        root: the project's folder, with dumps.yaml.
        params: caps in `ingest`.
        seen: called with the share of the delivery that has been read, 0..1.

    Raises:
        archives.DumpRefused: the delivery is hostile, damaged, too large or holds no image; nothing was changed.
        registry.RegistryError: dumps.yaml is unusable, or `name` is malformed or taken by other content, be it in
            dumps.yaml or as a file in data/dumps that the registry does not know (any more).
    """
    dump_registry.read_dumps(root / dump_registry.FILE)  # a broken registry stops the work before it begins
    if name is not None and not dump_registry.NAME.fullmatch(name):
        raise dump_registry.RegistryError(f"dump name {name!r}: use a-z, 0-9, '_' and '-', at most 64 characters")
    home = root / paths.DUMPS
    home.mkdir(parents=True, exist_ok=True)
    copies = 2 + remote.is_url(str(path))  # the spool, the sorted archive, and what is fetched exist side by side
    free = max(0, shutil.disk_usage(home).free - RESERVE) // copies
    total = min(int(params.ingest.dump_max_gb * 2**30), free)
    limits = archives.ArchiveLimits(
        total, params.ingest.max_file_mb << 20, params.ingest.dump_max_files, params.ingest.dump_max_ratio
    )
    atomic.sweep(home, ".adding-*")
    with tempfile.TemporaryDirectory(prefix=".adding-", dir=home) as folder:
        spool, skipped = Path(folder) / "spool.tar", list[tuple[str, str]]()
        tile = params.data.tile if params.data.source == "geotiff" else None
        spooled = _spool(webdataset.members(path, limits, Path(folder), seen), spool, tile, skipped)
        groups = _groups(root)
        taken = _arranged(spooled, skipped, groups)
        if not taken:
            reasons = Counter(reason for _, reason in skipped).most_common(1)
            raise archives.DumpRefused(
                f"{remote.shown(str(path))}: no image in it ({reasons[0][0] if reasons else 'it is empty'})"
            )
        content = manifest.set_hash(item.digest for item in taken.values())
        ready = Path(folder) / "ready.tar"
        lie = {member.name: member for member in shards.members(spool)}
        places = [(name, lie[taken[name].spooled]) for name in sorted(taken)]
        shards.write_tar(ready, ((name, shards.read(spool, m.offset, m.length)) for name, m in places))
        with atomic.locked(home / ".lock"):
            added = _register(path, name, root, content, len(taken), ready, skipped)
            return added._replace(recognised=groups.recognised)


class Spooled(NamedTuple):
    """An image of the delivery: its member in the spool, its name in the delivery, SHA-256 of its bytes."""

    spooled: str
    name: str
    digest: str


def _spool(
    members: Iterator[archives.ArchiveMember], spool: Path, tile: int | None, skipped: list[tuple[str, str]]
) -> list[Spooled]:
    """Copy the images among the members to a tar, in order of arrival. `tile`: the side that GeoTIFFs are cut to."""
    found: list[Spooled] = []
    with shards.replacing_tar(spool) as write:
        for member in members:
            if reason := _not_ours(member):
                skipped.append((member.name, reason))
                continue
            assert member.data is not None
            try:
                pieces = _pieces(member.name, member.data, tile, spool.parent)
            except decode.Refused as error:
                skipped.append((member.name, f"{error.code}: {error}"))
                continue
            for name, data in pieces:
                place = f"{len(found):08d}"
                write(place, data)
                found.append(Spooled(place, name, atomic.sha256(data)))
    return found


def _pieces(name: str, data: bytes, tile: int | None, folder: Path) -> list[tuple[str, bytes]]:
    """The image as it came; in a project of tiles a GeoTIFF's tiles, cut as the source's were.

    Raises:
        images.Refused: as `geotiff.tiles`.
    """
    if tile is None or not name.lower().endswith((".tif", ".tiff")):
        return [(name, data)]
    from pipeline.formats import geotiff

    file = folder / "image.tif"
    file.write_bytes(data)
    return [(f"{name_id(name)}/{piece}", png) for piece, png in geotiff.tiles(file, tile)]


def _groups(root: Path) -> Groups:
    """The source's groups; none before its first pull."""
    source = root / paths.SOURCE
    return Groups(atomic.read_json(source) if source.exists() else {"groups": None})


def _arranged(spooled: list[Spooled], skipped: list[tuple[str, str]], groups: Groups) -> dict[str, Spooled]:
    """`images/...` name -> image, without masks and wrapping folders (`pipeline.ingest.dump_layout`).

    A folder around everything that is a group of the source stays: it is the place that all images show.
    """
    masks = dump_layout.masks_among([item.name for item in spooled])
    skipped.extend(masks.items())
    kept = [item for item in spooled if item.name not in masks]
    inside = dump_layout.without_wrapping(item.name for item in kept)
    paths_ = {name: short if groups.known(short) == groups.known(name) else name for name, short in inside.items()}
    names = dump_layout.unique(paths_[item.name] for item in kept)
    for name in names:
        groups.of(name_id(name.removeprefix("images/")), "dump")  # notes what it takes for what
    return dict(zip(names, kept, strict=True))


def _not_ours(member: archives.ArchiveMember) -> str | None:
    if reason := webdataset.unread(member.name):
        return reason
    if member.data is None:
        return "larger than ingest.max_file_mb"
    if reason := image_files.kind_of(member.name, member.data[:256]):
        return "archive inside the archive, not opened" if _SUFFIX.search(member.name) else reason
    return None


def _register(
    path: str | Path,
    name: str | None,
    root: Path,
    content: str,
    count: int,
    ready: Path,
    skipped: list[tuple[str, str]],
) -> Added:
    known = dump_registry.read_dumps(root / dump_registry.FILE)
    for other, entry in known.dumps.items():
        if entry.sha256 == content:
            place = root / entry.archive
            if restored := not place.exists():
                _move(ready, place)
            return Added(other, count, content, Path(entry.archive), skipped, other, known.warm_start, restored)
    chosen = name or _free_name(path, known, root, content)
    if chosen in known.dumps:
        raise dump_registry.RegistryError(f"dump {chosen!r} is registered with other content; choose another name")
    archive = paths.DUMPS / f"{chosen}.tar"
    if not _available(root / archive, content):
        raise dump_registry.RegistryError(
            f"{archive} is there already with other content, though {dump_registry.FILE} does not name it; "
            "choose another name, or move that file away"
        )
    _move(ready, root / archive)
    champion = root / paths.CHAMPION
    warm = str(atomic.read_json(champion)["id"]) if champion.exists() else known.warm_start
    entry = dump_registry.DumpEntry(
        archive=archive.as_posix(), sha256=content, images=count, added=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    )
    dump_registry.write_dumps(
        dump_registry.DumpRegistry(warm_start=warm, dumps={**known.dumps, chosen: entry}), root / dump_registry.FILE
    )
    return Added(chosen, count, content, archive, skipped, None, warm)


def _move(ready: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    ready.replace(place)
    atomic.sync_folder(place.parent)


def _available(archive: Path, content: str) -> bool:
    """Whether `archive` may be written: it is absent, or holds the same files, as after a run that died before the
    registry was written."""
    if not archive.exists():
        return True
    try:
        return manifest.content_hash(archive) == content
    except ValueError:  # not an archive of ours: not ours to overwrite either
        return False


def _free_name(path: str | Path, known: dump_registry.DumpRegistry, root: Path, content: str) -> str:
    own = remote.name(str(path)) if remote.is_url(str(path)) else Path(path).resolve().name
    stem = re.sub(r"[^a-z0-9_]+", "-", _SUFFIX.sub("", own).lower()).strip("-_")[:56] or "dump"
    number = 1
    while True:
        candidate = stem if number == 1 else f"{stem}-{number}"
        if candidate not in known.dumps and _available(root / paths.DUMPS / f"{candidate}.tar", content):
            return candidate
        number += 1


def run(params: config.Params, path: str, name: str | None = None) -> Result:
    """`marginalia add-dump`: register the delivery, and put what it needs under DVC's care."""
    with progress.bar("read %", 100) as bar:
        done = 0

        def seen(share: float) -> None:
            nonlocal done
            bar.advance(int(100 * share) - done)
            done = int(100 * share)

        added = add(path, name=name, params=params, seen=seen)
    record = added._asdict() | {"archive": added.archive.as_posix()}
    return Result(_shown(added, remote.shown(path)), _version(), record=record)


def _version() -> list[str]:
    """`dvc add` what is registered and not tracked yet; a warning where that cannot be done."""
    known = dump_registry.read_dumps()
    keep = [Path(entry.archive) for name, entry in known.dumps.items() if name != dump_registry.BASE]
    if known.warm_start:
        keep.append(paths.CHAMPIONS / known.warm_start)
    problem = dvc.track(keep)
    return [f"not versioned by DVC: {problem}"] if problem else []


def _shown(added: Added, source: str) -> list[Table | str]:
    if added.restored:
        return [
            f"put back: {added.archive} was missing; {source} has the same files as dump {added.same_as!r}, "
            "so its archive was written again and the registry is unchanged"
        ]
    if added.same_as:
        return [f"nothing new: {source} has the same files as dump {added.same_as!r}"]
    table = Table("outcome", "files", title=f"dump {added.name}: {added.archive}")
    table.add_row("images taken", str(added.images))
    for row in passed_over.rows((reason, name) for name, reason in added.skipped):
        table.add_row(*map(escape, row))
    for row in passed_over.counted(added.recognised):
        table.add_row(*map(escape, row))
    start = f"from champion {added.warm_start}" if added.warm_start else "from the encoder's own weights"
    return [table, f"next: `dvc repro` ingests it, trains {start}, and the gate decides"]
