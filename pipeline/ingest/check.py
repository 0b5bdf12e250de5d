"""Stage ingest: one archive -> shards, rows and a quarantine list. Bad files are named, never fatal to the good ones.

What happens to a bad mask depends on what its image is for. An image listed as labelled, val or test is refused with
its mask, because training or scoring without it would silently change the set. Any other image stays as an unlabelled
one and only the mask is quarantined (`"kept": true`).

Image files are stored as they came, byte for byte; `pipeline.imaging.decode.decode` applies the same rules at every reading.
Masks are stored as index PNG, upright as the decoded image. A mask of a photo that EXIF turns by 90 degrees (5 to 8) may
have been drawn on the stored picture: where its sides are those of the stored picture and not of the upright one, it is
turned with it. Where both have the same sides (a square photo, a half turn, a mirror) they cannot be told apart, and the
mask is taken as upright, because that is how browsers and label tools show a photo. Both are counted.
"""

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pipeline import config, paths
from pipeline import console as progress
from pipeline.formats.common.source import name_id
from pipeline.imaging import decode, label_maps, perceptual_hash
from pipeline.ingest import dump_registry
from pipeline.stage import Result
from pipeline.storage import atomic, manifest, parallel, shards

NEEDS_MASK = ("labelled", "val", "test")
TURNED, UPRIGHT = "masks turned with their photo", "masks taken as upright, their photo is turned"
# Below this many images threads do it: decoders run outside the interpreter's lock, so two threads keep two cores busy,
# and the start of worker processes costs what a thousand small images do.
FEW = 2048


@dataclass(frozen=True, slots=True)
class Task:
    """One image of the archive, its mask if it has one, and the rules for both."""

    archive: Path
    name: str
    image: shards.Member
    mask: shards.Member | None
    needs_mask: bool
    classes: int
    palette: tuple[tuple[int, int, int], ...]
    max_pixels: int
    max_bytes: int
    mask_refusal: tuple[str, str] | None = None  # why the source could not make its mask: code, reason


class Checked(NamedTuple):
    """What a worker found out. `image` is None when the image is refused; `mask_png` is the mask to store."""

    image: tuple[str, str, int, int, str] | None  # id, format, height, width, phash
    mask_png: bytes | None
    refusal: tuple[str, str] | None  # code, reason
    mask_digest: str | None = None
    turned: str | None = None  # what was decided about a mask whose photo EXIF turns


def check_mask(
    data: bytes, shape: tuple[int, int], classes: int, max_pixels: int, orientation: int = 1
) -> tuple[NDArray[np.uint8], str | None]:
    """Mask bytes -> (class ids, H x W uint8, 255 = ignore; what was decided about its turn, if anything).

    `orientation` is that of the image, whose upright size is `shape`.

    Raises:
        images.Refused: as `label_maps.decode_mask`; "mask-size", "mask-class-id" or "mask-all-ignore".
    """
    ids_HW = label_maps.decode_mask(data, max_pixels=max_pixels)
    stored = orientation >= 5 and ids_HW.shape != shape and ids_HW.shape == shape[::-1]
    if ids_HW.shape != shape and not stored:
        raise decode.Refused(
            "mask-size",
            f"the mask is {ids_HW.shape[1]} x {ids_HW.shape[0]}, the image {shape[1]} x {shape[0]}; export it again",
        )
    void_HW = (ids_HW == 255) | (ids_HW == 65535)
    found, counts = np.unique(ids_HW[~void_HW].astype(np.int64), return_counts=True)
    if (alien := found >= classes).any():
        listed = ", ".join(f"{i} ({n} px)" for i, n in list(zip(found[alien], counts[alien], strict=True))[:5])
        reason = f"ids outside 0..{classes - 1}: {listed}; map them to a class or to 255 (ignore)"
        raise decode.Refused("mask-class-id", reason)
    if void_HW.all():
        raise decode.Refused(
            "mask-all-ignore", "every pixel is ignored (255 or 65535): nothing to learn; drop the mask"
        )
    label_HW = np.where(void_HW, 255, ids_HW).astype(np.uint8)
    if stored:
        return decode.orient(label_HW, orientation), TURNED
    unclear = orientation > 1 and (orientation < 5 or shape[0] == shape[1])
    return label_HW, UPRIGHT if unclear else None


def check(task: Task) -> Checked:
    """Decode, hash and judge one image and its mask; never raises for bad content."""
    try:
        if task.image.length > task.max_bytes:
            raise decode.Refused(
                "too-many-bytes", f"{task.image.length} bytes; the limit is {task.max_bytes} (ingest.max_file_mb)"
            )
        data = shards.read(task.archive, task.image.offset, task.image.length)
        kind = decode.sniff(data)
        image_HWC, orientation = decode.decode_turned(data, max_pixels=task.max_pixels)
    except decode.Refused as error:
        return Checked(None, None, (error.code, str(error)))
    height, width = image_HWC.shape[:2]
    hashed = perceptual_hash.dhash(image_HWC)
    phash = "" if hashed is None else f"{hashed:016x}"
    found = (manifest.image_id(image_HWC), kind.lower(), height, width, phash)
    try:
        if task.mask_refusal:
            raise decode.Refused(*task.mask_refusal)
        if task.mask is None:
            if task.needs_mask:
                raise decode.Refused("mask-missing", "listed as labelled, val or test, but no file under masks/")
            return Checked(found, None, None)
        data = shards.read(task.archive, task.mask.offset, task.mask.length)
        mask_HW, turned = check_mask(data, (height, width), task.classes, task.max_pixels, orientation)
    except decode.Refused as error:
        return Checked(None if task.needs_mask else found, None, (error.code, str(error)))
    return Checked(
        found, label_maps.encode_png(mask_HW, list(task.palette)), None, manifest.mask_digest(mask_HW), turned
    )


def group_of(name: str, dump: str, source: dict[str, Any]) -> str:
    """Group of an image: the source's own table, else its pattern, else the sub-folder, else the image alone."""
    if dump == dump_registry.BASE and source["groups"] and name in source["groups"]:
        return str(source["groups"][name])
    if (pattern := source.get("group_pattern")) and (match := re.search(pattern, name)) and match[1]:
        return match[1]
    folder = name.rpartition("/")[0]
    return folder or (name if dump == dump_registry.BASE else f"{dump}/{name}")


def plan(
    archive: Path, dump: str, source: dict[str, Any], params: config.Ingest
) -> tuple[list[Task], list[dict[str, Any]]]:
    """Pair the archive's images with their masks; (tasks in archive order, records of what is no image of ours)."""
    lists, known = (source["lists"], source.get("refused", [])) if dump == dump_registry.BASE else ({}, [])
    needed = {key for part in NEEDS_MASK for key in lists.get(part) or ()}
    found: dict[str, dict[str, shards.Member]] = {"images": {}, "masks": {}}
    refused, without_mask = [], {}
    for name, code, reason in known:  # what pull could not use
        if name.startswith("masks/"):
            without_mask[name_id(name.partition("/")[2])] = (code, reason)
        else:
            refused.append(record(dump, name, code, reason))
    for member in shards.members(archive):
        room, _, path = member.name.partition("/")
        key = name_id(path)
        if room not in found or not path:
            refused.append(record(dump, member.name, "unexpected-place", "expected images/... or masks/..."))
        elif key in found[room]:
            other = found[room][key].name
            refused.append(record(dump, member.name, "duplicate-name", f"same name id as {other}; rename one of them"))
        else:
            found[room][key] = member
    for key in without_mask.keys() - found["images"].keys():
        refused.append(record(dump, f"masks/{key}", *without_mask[key]))
    for key in found["masks"].keys() - found["images"].keys():
        refused.append(record(dump, found["masks"][key].name, "mask-without-image", "no image has this name id"))
    palette = tuple(tuple(c["color"]) for c in source["classes"])
    limits = (len(palette), palette, params.max_pixels, params.max_file_mb << 20)
    tasks = [
        Task(archive, key, image, found["masks"].get(key), key in needed, *limits, without_mask.get(key))
        for key, image in found["images"].items()
    ]
    return tasks, sorted(refused, key=lambda item: str(item["name"]))


def record(dump: str, name: str, code: str, reason: str, kept: bool = False) -> dict[str, Any]:
    """One entry of a quarantine list. `kept`: the image stays in the manifest as an unlabelled one."""
    return {"dump": dump, "name": name, "code": code, "reason": reason, "kept": kept}


def verify(archive: Path, dump: str, entry: dump_registry.Entry) -> None:
    """Raises ValueError where the archive does not hold the files that were registered; base has no hash to compare."""
    if entry.sha256 is None or (found := manifest.content_hash(archive)) == entry.sha256:
        return
    raise ValueError(
        f"{archive}: its files are not those registered as dump {dump!r} (content hash {found[:12]}, "
        f"{dump_registry.FILE} says {entry.sha256[:12]}); delete the file and add the original delivery again with "
        "`marginalia add-dump`, which puts it back. If the new files are meant, register them under a name of their own"
    )


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
    rows: list[manifest.Row] = []
    decided: Counter[str] = Counter()
    results = parallel.ordered(check, tasks, workers, threads=len(tasks) < FEW)
    with (
        atomic.replacing_folder(home) as folder,
        shards.Shards(folder, "images", limit) as image_shards,
        shards.Shards(folder, "masks", limit) as mask_shards,
        progress.bar(f"ingest {dump}", len(tasks)) as bar,
    ):
        for task, result in _surviving(results, archive):
            bar.advance()
            decided.update([result.turned] if result.turned else [])
            if result.refusal:
                refused.append(record(dump, task.name, *result.refusal, kept=result.image is not None))
            if result.image is None:
                continue
            id_, kind, height, width, phash = result.image
            key = f"{len(rows):08d}"
            shard, offset, length = image_shards.add(f"{key}.{kind}", shards.read(archive, *task.image[1:]))
            mask: tuple[str | None, int | None, int | None] = (None, None, None)
            if result.mask_png is not None:
                name, start, size = mask_shards.add(f"{key}.png", result.mask_png)
                mask = ((home / name).as_posix(), start, size)
            kept = (id_, task.name, source["source"] if dump == dump_registry.BASE else "dump", dump)
            group, place = group_of(task.name, dump, source), ((home / shard).as_posix(), offset, length)
            row = manifest.Row(*kept, group, width, height, *place, *mask, phash, mask_digest=result.mask_digest)
            rows.append(row)
        image_shards.close()
        mask_shards.close()
        manifest.write(folder / paths.ROWS_NAME, rows)
        atomic.write_json(folder / paths.QUARANTINE_NAME, refused)
    codes = Counter(f"{item['code']}{' (image kept, unlabelled)' if item['kept'] else ''}" for item in refused)
    return Counter({"images": len(rows), "with mask": sum(r.mask_shard is not None for r in rows)}) + decided + codes


def _surviving(results: Iterator[tuple[Task, Checked]], archive: Path) -> Iterator[tuple[Task, Checked]]:
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
    entry = dump_registry.find(dump_registry.read(), dump)
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
