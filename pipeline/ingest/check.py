"""Stage ingest: one archive -> shards, rows and a quarantine list. Bad files are named, never fatal to the good ones.

What happens to a bad mask depends on what its image is for. An image listed as labelled, val or test is refused with
its mask, because training or scoring without it would silently change the set. Any other image stays as an unlabelled
one and only the mask is quarantined (`"kept": true`).

Image files are stored as they came, byte for byte; `pipeline.imaging.decode.decode` applies the same rules at every reading.
Masks are stored as index PNG, upright as the decoded image (`pipeline.ingest.image_check`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline import config, paths
from pipeline import console as progress
from pipeline.formats.common.source import name_id
from pipeline.formats.names.skipped import Skipped
from pipeline.ingest import dump_registry
from pipeline.ingest.groups import Groups
from pipeline.ingest.image_check import (
    TURNED,
    UPRIGHT,
    Checked,
    CheckedImage,
    CheckedMask,
    CheckRules,
    CheckTask,
    check_image,
)
from pipeline.ingest.quarantine import QuarantineEntry, write_quarantine
from pipeline.stage import Result
from pipeline.storage import atomic, manifest, parallel, shards

# Below this many images threads do it: decoders run outside the interpreter's lock, so two threads keep two cores busy,
# and the start of worker processes costs what a thousand small images do.
FEW = 2048


@dataclass
class Contents:
    """An archive's images and masks by name id, and what in it is no image or mask of ours."""

    dump: str
    images: dict[str, shards.Member] = field(default_factory=dict)
    masks: dict[str, shards.Member] = field(default_factory=dict)
    refused: list[QuarantineEntry] = field(default_factory=list)

    def refuse(self, name: str, code: str, reason: str) -> None:
        self.refused.append(QuarantineEntry(dump=self.dump, name=name, code=code, reason=reason))

    def add(self, member: shards.Member) -> None:
        folder, _, path = member.name.partition("/")
        place = {"images": self.images, "masks": self.masks}.get(folder)
        key = name_id(path)
        if place is None or not path:
            self.refuse(member.name, "unexpected-place", "expected images/... or masks/...")
        elif key in place:
            self.refuse(member.name, "duplicate-name", f"same name id as {place[key].name}; rename one of them")
        else:
            place[key] = member


def plan(
    archive: Path, dump: str, source: Mapping[str, Any], params: config.Ingest
) -> tuple[list[CheckTask], list[QuarantineEntry]]:
    """Pair the archive's images with their masks; (tasks in archive order, entries of what is no image of ours)."""
    is_base = dump == dump_registry.BASE
    lists = source["lists"] if is_base else {}
    contents = Contents(dump)

    # What pull could not use.
    mask_refusals = {}
    for name, code, reason in source.get("refused", []) if is_base else []:
        if name.startswith("masks/"):
            mask_refusals[name_id(name.partition("/")[2])] = (code, reason)
        else:
            contents.refuse(name, code, reason)

    for member in shards.members(archive):
        contents.add(member)
    for key in mask_refusals.keys() - contents.images.keys():
        contents.refuse(f"masks/{key}", *mask_refusals[key])
    for key in contents.masks.keys() - contents.images.keys():
        contents.refuse(contents.masks[key].name, "mask-without-image", "no image has this name id")

    rules = CheckRules(
        archive=archive,
        palette=tuple(tuple(entry["color"]) for entry in source["classes"]),
        max_pixels=params.max_pixels,
        max_bytes=params.max_file_mb << 20,
    )
    needed = {key for part in manifest.NEEDS_MASK for key in lists.get(part) or ()}
    tasks = [
        CheckTask(rules, key, image, contents.masks.get(key), key in needed, mask_refusals.get(key))
        for key, image in contents.images.items()
    ]
    return tasks, sorted(contents.refused, key=lambda entry: entry.name)


def verify(archive: Path, dump: str, entry: dump_registry.DumpEntry) -> None:
    """Raises ValueError where the archive does not hold the files that were registered; base has no hash to compare."""
    if entry.sha256 is None or (found := manifest.content_hash(archive)) == entry.sha256:
        return
    raise ValueError(
        f"{archive}: its files are not those registered as dump {dump!r} (content hash {found[:12]}, "
        f"{dump_registry.FILE} says {entry.sha256[:12]}); delete the file and add the original delivery again with "
        "`marginalia add-dump`, which puts it back. If the new files are meant, register them under a name of their own"
    )


@dataclass
class IngestWriter:
    """Images and masks into shards, one row each. `home` is where the folder will lie when it is complete."""

    home: Path
    dump: str
    source_name: str
    groups: Groups
    images: shards.Shards
    masks: shards.Shards
    rows: list[manifest.Row] = field(default_factory=list)
    turned: Counter[str] = field(default_factory=Counter)

    def add(self, task: CheckTask, image: CheckedImage, mask: CheckedMask | None) -> None:
        """Store one image that passed, with its mask if that did."""
        key = f"{len(self.rows):08d}"
        data = shards.read(task.rules.archive, task.image.offset, task.image.length)
        shard, offset, length = self.images.add(f"{key}.{image.kind}", data)
        row = manifest.Row(
            id=image.id,
            name=task.name,
            source=self.source_name if self.dump == dump_registry.BASE else "dump",
            dump=self.dump,
            group=self.groups.of(task.name, self.dump),
            width=image.width,
            height=image.height,
            shard=(self.home / shard).as_posix(),
            offset=offset,
            length=length,
            mask_shard=None,
            mask_offset=None,
            mask_length=None,
            phash=image.phash,
        )
        self.rows.append(row if mask is None else self._with_mask(row, mask, f"{key}.png"))

    def _with_mask(self, row: manifest.Row, mask: CheckedMask, name: str) -> manifest.Row:
        shard, offset, length = self.masks.add(name, mask.png)
        if mask.turned:
            self.turned[mask.turned] += 1
        place = (self.home / shard).as_posix()
        return replace(row, mask_shard=place, mask_offset=offset, mask_length=length, mask_digest=mask.digest)


def ingest(
    archive: Path,
    dump: str,
    source: dict[str, Any],
    params: config.Ingest,
    workers: config.Scale,
) -> Counter[str]:
    """Write data/ingested/DUMP from one archive; returns counts for the summary. The folder appears complete or not."""
    tasks, refused = plan(archive.resolve(), dump, source, params)  # workers may stand in another folder
    home = paths.INGESTED / dump
    limit = params.shard_mb << 20
    results = parallel.ordered(check_image, tasks, workers, threads=len(tasks) < FEW)
    with (
        atomic.replacing_folder(home) as folder,
        shards.Shards(folder, "images", limit) as image_shards,
        shards.Shards(folder, "masks", limit) as mask_shards,
        progress.bar(f"ingest {dump}", len(tasks)) as bar,
    ):
        writer = IngestWriter(home, dump, source["source"], Groups(source), image_shards, mask_shards)
        for task, checked in _surviving(results, archive):
            bar.advance()
            if checked.refusal:
                code, reason = checked.refusal
                kept = checked.image is not None
                refused.append(QuarantineEntry(dump=dump, name=task.name, code=code, reason=reason, kept=kept))
            if checked.image is not None:
                writer.add(task, checked.image, checked.mask)
        image_shards.close()
        mask_shards.close()
        manifest.write(folder / paths.ROWS_NAME, writer.rows)
        write_quarantine(folder / paths.QUARANTINE_NAME, refused)

    codes = Counter(f"{entry.code}{' (image kept, unlabelled)' if entry.kept else ''}" for entry in refused)
    with_mask = sum(row.mask_shard is not None for row in writer.rows)
    said = Counter(
        {f"{what}, the first: {first}": count for what, (count, first) in _firsts(writer.groups.recognised).items()}
    )
    return Counter({"images": len(writer.rows), "with mask": with_mask}) + writer.turned + said + codes


def _firsts(found: Iterable[Skipped]) -> dict[str, tuple[int, str]]:
    """Kind -> how many, and the first."""
    firsts: dict[str, tuple[int, str]] = {}
    for kind, name in found:
        count, first = firsts.get(kind, (0, name))
        firsts[kind] = (count + 1, first)
    return firsts


def _surviving(results: Iterator[tuple[CheckTask, Checked]], archive: Path) -> Iterator[tuple[CheckTask, Checked]]:
    done = "none"
    try:
        for task, result in results:
            done = task.name
            yield task, result
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"{archive}: a decoder process died shortly after image {done!r}; remove the image that follows it "
            "and report it, or lower scale.workers if memory ran out"
        ) from error


def run(params: config.Params, dump: str) -> Result:
    """The stage: the archive of one dump of dumps.yaml -> data/ingested/DUMP/."""
    entry = dump_registry.find(dump_registry.read_dumps(), dump)
    archive = Path(entry.archive)
    verify(archive, dump, entry)
    counts = ingest(archive, dump, atomic.read_json(paths.SOURCE), params.ingest, params.scale)

    table = Table(title=f"ingest {dump}")
    table.add_column("outcome")
    table.add_column("files", justify="right")
    for outcome, count in counts.items():
        table.add_row(outcome, str(count))
    if counts.keys() <= {"images", "with mask", TURNED, UPRIGHT}:
        return Result((table,))
    return Result((table, f"every refused file with its reason: {paths.INGESTED / dump / paths.QUARANTINE_NAME}"))
