"""Take corrected labels back: checked record by record, packed into one archive, then named in labels.yaml.

A record that cannot be used is refused with its reason and stops no other. What is in force already is left out, so the
same file imported twice changes nothing, and a task that is exported every week adds only what is new in it. The
registry is written last and atomically, under a lock, as for dumps.
"""

import getpass
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from pipeline import config, paths
from pipeline.formats.names import skipped
from pipeline.formats.names.skipped import Skipped
from pipeline.labels import parse, registry
from pipeline.labels.collector import Collector, Prelabels, Refusal, TakenLabel
from pipeline.stage import Exit, Result
from pipeline.storage import atomic, dvc, manifest, shards


class Imported(NamedTuple):
    """What became of a delivery. `name` is None where nothing in it was new; `unchanged` counts what is in force already.
    `forgiven`: (rule, name and image) of the labels whose names are not quite those of their images. `passed_over`: (kind,
    which) of what the taken labels leave out."""

    name: str | None
    tool: str
    taken: int
    unchanged: int
    refused: list[Refusal]
    forgiven: Sequence[Skipped] = ()
    passed_over: Sequence[Skipped] = ()


def add(
    path: Path,
    *,
    params: config.Params,
    root: Path = Path(),
    tool: str = "auto",
    by: str | None = None,
    accept_unchanged: bool = False,
) -> Imported:
    """Register the labels of a CVAT xml or zip, a Label Studio or COCO json, or a folder of masks.

    Args:
        root: the project's folder; its last `dvc repro` says which images there are and which are for val and test.
        by: who gave the labels; default: who runs this.
        accept_unchanged: also take masks that are just the pre-label; else only Label Studio's, where submitting is an
            act of its own.

    Raises:
        SourceError: the delivery as a whole cannot be read.
        labels.LabelsError, manifest.ManifestError: the project is not in order; nothing was changed.
    """
    rows = manifest.read(root / paths.SPLIT_MANIFEST)  # before all else: it says what to run where nothing was run yet
    classes = atomic.read_json(root / paths.SOURCE)["classes"]
    names = [entry["name"] for entry in classes]
    palette = [tuple(entry["color"]) for entry in classes]
    registry.places(registry.read_labels(root / registry.FILE), names, root)  # a broken registry stops the work at once
    max_pixels = params.ingest.max_pixels

    home = root / registry.HOME
    home.mkdir(parents=True, exist_ok=True)
    atomic.sweep(home, ".importing-*")
    with tempfile.TemporaryDirectory(prefix=".importing-", dir=home) as folder:
        spool = Path(folder) / "spool.tar"
        with (
            parse.unpacked(path, params.ingest, Path(folder)) as opened,
            shards.replacing_tar(spool) as put,
        ):
            tool = parse.detect(opened) if tool == "auto" else tool
            prelabels = None if accept_unchanged or tool == "labelstudio" else Prelabels(root, max_pixels)
            collector = Collector(rows, palette, prelabels, put)
            collector.add_all(parse.read(opened, tool, classes, params.data, max_pixels))

        delivery = Delivery(path, tool, by or _user(), spool, collector.taken)
        own = {row.id: row.mask_digest for row in rows if row.split == "labelled" and row.mask_import is None}
        (root / paths.LABELS_LOCK).parent.mkdir(parents=True, exist_ok=True)
        with atomic.locked(root / paths.LABELS_LOCK):
            name, count = _register(root, delivery, names, own)
        unchanged = len(collector.taken) - count
        return Imported(name, tool, count, unchanged, collector.refused, collector.forgiven, collector.passed_over)


def _user() -> str:
    with suppress(OSError, KeyError):  # a container's user may have no name
        return getpass.getuser()
    return "unknown"


@dataclass(frozen=True)
class Delivery:
    """A checked delivery: where it came from, who gave it, and its masks in `spool` as IMAGE-ID.png."""

    path: Path
    tool: str
    by: str
    spool: Path
    labels: Mapping[str, TakenLabel]


def _register(
    root: Path, delivery: Delivery, classes: Sequence[str], own: Mapping[str, str | None]
) -> tuple[str | None, int]:
    """Name and size of the import that holds what is new; None and 0 where nothing is.

    `own`: digests of the source's own masks that training sees.
    """
    known = registry.read_labels(root / registry.FILE)
    imported = {image: place.digest for image, place in registry.places(known, classes, root).items()}
    in_force = {**own, **imported}
    new = {image: label for image, label in sorted(delivery.labels.items()) if in_force.get(image) != label.digest}
    if not new:
        return None, 0

    name = _free_name(delivery.path, known, root)
    added = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    archive = registry.HOME / f"{name}.tar"
    _write_archive(root / archive, delivery, classes, new, added)
    entry = registry.LabelEntry(
        archive=archive.as_posix(),
        sha256=registry.content_hash({image: label.digest for image, label in new.items()}),
        images=len(new),
        added=added,
        tool=delivery.tool,
        by=delivery.by,
    )
    registry.write_labels(registry.LabelRegistry(labels={**known.labels, name: entry}), root / registry.FILE)
    return name, len(new)


def _write_archive(
    archive: Path, delivery: Delivery, classes: Sequence[str], new: Mapping[str, TakenLabel], added: str
) -> None:
    about = {image: asdict(label) for image, label in new.items()}
    origin = registry.provenance(
        classes, about, tool=delivery.tool, by=delivery.by, added=added, file=delivery.path.name
    )
    members = {member.name: member for member in shards.members(delivery.spool)}
    with shards.replacing_tar(archive) as put:
        put(registry.PROVENANCE, origin)
        for image in new:
            member = members[f"{image}.png"]
            put(member.name, shards.read(delivery.spool, member.offset, member.length))


def _free_name(path: Path, known: registry.LabelRegistry, root: Path) -> str:
    """The file's own name in a safe form, numbered if it is taken, be it only by an archive that no registry names."""
    stem = re.sub(r"[^a-z0-9_-]+", "-", path.resolve().stem.lower()).strip("-_")[:56] or "labels"
    number = 1
    while (name := stem if number == 1 else f"{stem}-{number}") in known.labels or (
        root / registry.HOME / f"{name}.tar"
    ).exists():
        number += 1
    return name


def run(
    params: config.Params, path: Path, *, tool: str = "auto", by: str | None = None, accept_unchanged: bool = False
) -> Result:
    """`marginalia import-labels`: as `add`, and what is registered comes under DVC's care; fails where nothing was usable."""
    added = add(path, params=params, tool=tool, by=by, accept_unchanged=accept_unchanged)
    record = added._asdict() | {"refused": [item._asdict() for item in added.refused]}
    if not (added.name or added.unchanged):
        return Result(_shown(path, added), (), (f"{path}: no usable label",), Exit.FAILED, record)
    return Result(_shown(path, added), _version(), record=record)


def _version() -> list[str]:
    """`dvc add` what is registered and not tracked yet; a warning where that cannot be done."""
    problem = dvc.track([Path(entry.archive) for entry in registry.read_labels().labels.values()])
    return [f"not versioned by DVC: {problem}"] if problem else []


def _shown(path: Path, result: Imported) -> list[Table | str]:
    """One table of what was taken and what was not, the refused ones by name, and what to do next."""
    table = Table("outcome", "images", title=f"{result.tool}: {path}")
    table.add_row("labels taken", str(result.taken))
    table.add_row("in force already", str(result.unchanged))
    for rule, line in skipped.counted(result.forgiven):
        table.add_row(f"matched by {rule}", escape(line))
    for kind, line in skipped.rows(result.passed_over):
        table.add_row(escape(kind), escape(line))
    for code, count in Counter(item.code for item in result.refused).most_common():
        table.add_row(f"refused: {code}", str(count))
    lines = [f"{item.name}: {item.code}: {item.reason}" for item in result.refused]
    if result.name:
        archive = f"{registry.HOME}/{result.name}.tar.dvc"
        lines.append(f"next: `dvc repro` trains with {result.name!r}; commit {registry.FILE} and {archive}")
    elif result.unchanged:
        lines.append(f"nothing new: {path} says what is in force already")
    return [table, *lines]
