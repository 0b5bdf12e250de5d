"""Take corrected labels back: checked record by record, packed into one archive, then named in labels.yaml.

A record that cannot be used is refused with its reason and stops no other. What is in force already is left out, so the
same file imported twice changes nothing, and a task that is exported every week adds only what is new in it. The
registry is written last and atomically, under a lock, as for dumps.
"""

import getpass
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from pipeline import config, paths
from pipeline.imaging import decode, label_maps
from pipeline.labels import exporter, parse, registry
from pipeline.stage import Exit, Result
from pipeline.storage import atomic, dvc, manifest, shards

OPEN = ("labelled", "unlabelled")  # splits whose labels may change


class Refusal(NamedTuple):
    """A record that was not taken."""

    name: str
    code: str
    reason: str


class Imported(NamedTuple):
    """What became of a delivery. `name` is None where nothing in it was new; `unchanged` counts what is in force already."""

    name: str | None
    tool: str
    taken: int
    unchanged: int
    refused: list[Refusal]


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
    names = [c["name"] for c in classes]
    registry.places(
        registry.read(root / registry.FILE), names, root
    )  # a broken registry stops the work before it begins
    home = root / registry.HOME
    home.mkdir(parents=True, exist_ok=True)
    atomic.sweep(home, ".importing-*")
    digests: dict[str, str] = {}
    about: dict[str, dict[str, str]] = {}
    refused: list[Refusal] = []
    finder, palette = parse.Finder(rows), [tuple(c["color"]) for c in classes]
    with tempfile.TemporaryDirectory(prefix=".importing-", dir=home) as folder:
        spool = Path(folder) / "spool.tar"
        with (
            parse.unpacked(path, params.ingest, Path(folder)) as opened,
            shards.replacing_tar(spool) as put,
        ):
            tool = parse.detect(opened) if tool == "auto" else tool
            handed = {} if accept_unchanged or tool == "labelstudio" else exporter.handed_out(root)
            prelabels = {} if accept_unchanged or tool == "labelstudio" else exporter.prelabels(root)
            for record in parse.read(opened, tool, classes, params.data, params.ingest.max_pixels):
                try:
                    row = finder.find(record)
                    _may_change(row, digests)
                    mask_HW = record.draw(row)
                    if (mask_HW == label_maps.IGNORE).all():
                        raise decode.Refused("mask-all-ignore", "every pixel is ignored: nothing to learn from it")
                    digest = manifest.mask_digest(mask_HW)
                    if row.split == "unlabelled" and (
                        digest in handed.get(row.id, ())
                        or (row.id in prelabels and digest == _digest(root, prelabels[row.id], params))
                    ):
                        raise decode.Refused(
                            "unchanged-pre-label", "just as it was handed out; --accept-unchanged takes it as correct"
                        )
                except decode.Refused as error:
                    refused.append(Refusal(record.name, error.code, str(error)))
                    continue
                put(f"{row.id}.png", label_maps.encode_png(mask_HW, palette))
                digests[row.id] = digest
                about[row.id] = {"digest": digest, "name": record.name, "image": f"{row.dump}/{row.name}"}
        (root / paths.LABELS_LOCK).parent.mkdir(parents=True, exist_ok=True)
        with atomic.locked(root / paths.LABELS_LOCK):
            own = {r.id: r.mask_digest for r in rows if r.split == "labelled" and r.mask_import is None}
            return _register(root, path, tool, by or _user(), names, spool, digests, about, refused, own)


def _may_change(row: manifest.Row, taken: dict[str, str]) -> None:
    if row.id in taken:
        raise decode.Refused("labels-twice", f"this delivery has labels for {row.dump}/{row.name} already")
    if row.split in ("val", "test"):
        raise decode.Refused(
            "held-out",
            f"{row.dump}/{row.name} is in {row.split}, which must not change under the gate; correct it in the source itself",
        )
    if row.split not in OPEN:
        raise decode.Refused("unused", f"{row.dump}/{row.name} takes no part: {paths.SPLIT_SUMMARY} says why")


def _digest(root: Path, member: shards.Member, params: config.Params) -> str:
    data = shards.read(root / paths.PRELABELS, member.offset, member.length)
    return manifest.mask_digest(label_maps.decode_mask(data, max_pixels=params.ingest.max_pixels).astype("uint8"))


def _user() -> str:
    with suppress(OSError, KeyError):  # a container's user may have no name
        return getpass.getuser()
    return "unknown"


def _register(
    root: Path,
    path: Path,
    tool: str,
    by: str,
    classes: Sequence[str],
    spool: Path,
    digests: dict[str, str],
    about: dict[str, dict[str, str]],
    refused: list[Refusal],
    own: dict[str, str | None],
) -> Imported:
    """`own`: digests of the source's own masks that training sees."""
    known = registry.read(root / registry.FILE)
    force = own | {id_: place.digest for id_, place in registry.places(known, classes, root).items()}
    new = {id_: digest for id_, digest in digests.items() if force.get(id_) != digest}
    outcome = Imported(None, tool, len(new), len(digests) - len(new), refused)
    if not new:
        return outcome
    name, added = _free_name(path, known, root), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    archive = registry.HOME / f"{name}.tar"
    origin = registry.provenance(
        classes, {id_: about[id_] for id_ in sorted(new)}, tool=tool, by=by, added=added, file=path.name
    )
    lie = {member.name: member for member in shards.members(spool)}
    with shards.replacing_tar(root / archive) as put:
        put(registry.PROVENANCE, origin)
        for id_ in sorted(new):
            put(f"{id_}.png", shards.read(spool, *lie[f"{id_}.png"][1:]))
    entry = registry.Entry(
        archive=archive.as_posix(), sha256=registry.content_hash(new), images=len(new), added=added, tool=tool, by=by
    )
    registry.write(registry.Registry(labels={**known.labels, name: entry}), root / registry.FILE)
    return outcome._replace(name=name)


def _free_name(path: Path, known: registry.Registry, root: Path) -> str:
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
    problem = dvc.track([Path(entry.archive) for entry in registry.read().labels.values()])
    return [f"not versioned by DVC: {problem}"] if problem else []


def _shown(path: Path, result: Imported) -> list[Table | str]:
    """One table of what was taken and what was not, the refused ones by name, and what to do next."""
    table = Table("outcome", "images", title=f"{result.tool}: {path}")
    table.add_row("labels taken", str(result.taken))
    table.add_row("in force already", str(result.unchanged))
    for code, count in Counter(item.code for item in result.refused).most_common():
        table.add_row(f"refused: {code}", str(count))
    lines = [f"{item.name}: {item.code}: {item.reason}" for item in result.refused]
    if result.name:
        archive = f"{registry.HOME}/{result.name}.tar.dvc"
        lines.append(f"next: `dvc repro` trains with {result.name!r}; commit {registry.FILE} and {archive}")
    elif result.unchanged:
        lines.append(f"nothing new: {path} says what is in force already")
    return [table, *lines]
