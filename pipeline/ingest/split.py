"""Stage split: manifest -> labelled, unlabelled, val and test by group, proven free of leaks.

- The source's id lists win. A name in two lists, or a listed group on both sides of an evaluation border, is refused.
- Images with a mask that no list names fill the missing lists by whole groups: test, then val, then labelled (at most
  `split.labelled` images; the others go in as unlabelled, with hidden labels). Where a labelled list is given, they
  become unlabelled, unless an unlabelled list is given too: then unused.
- Each group draws a number in 0..1 by a hash of `split.seed` and its name: below `split.test` it is test, within
  `split.val` above that it is val, else it trains. So a new group never moves another one, and no training place turns
  into a test place; in return the shares are of groups and only approximate. Two exceptions keep few groups useful: the
  group with the highest draw always trains, and a part that nobody drew gets the lowest group that is left; so test
  leaves one for val where it drew all but that. Those a later group can replace, which is warned about.
- Images without a mask are unlabelled; later archives are, too.
- An unlabelled image whose mask was imported (labels.yaml) is labelled, whatever list or dump it is from. Such masks
  have no say in the drawing: a new label never moves a group to val or test. One in place of the source's own has the
  say that its forerunner had: were its group to drop out, the last of the others would train, be it val's or test's.
- An unlisted image whose group is in val or test is unused: it would leak the place into training. So is one of a later
  dump whose folders could be those of several groups, one of which is.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pipeline import config, paths
from pipeline import console as progress
from pipeline.formats.names.known_groups import KnownGroups
from pipeline.ingest import dump_registry
from pipeline.stage import Result
from pipeline.storage import atomic, manifest
from pipeline.storage.manifest import Row

SIDES = {"labelled": "train", "unlabelled": "train", "val": "val", "test": "test"}
Lists = Mapping[str, Sequence[str] | None]


class LeakError(ValueError):
    """The same image or group stands on two sides of an evaluation border; the message names both and what to do."""


def assign(rows: Sequence[Row], lists: Lists, params: config.Split) -> tuple[list[Row], dict[str, str]]:
    """Rows with their split, and for each unused one ("dump/name") the reason. The rules are the module's.

    Raises:
        LeakError: a name stands in two lists.
    """
    listed = _listed_parts(lists)
    base = [row for row in rows if row.dump == dump_registry.BASE]
    split = {row.name: listed[row.name] for row in base if row.name in listed}
    used_groups = {row.group for row in base if row.name in split}

    # Only masks of the source's own decide which groups are drawn; the imported ones come and go.
    own = [row for row in base if row.mask_shard is not None and (row.mask_import is None or row.mask_replaced)]
    free = [row for row in own if row.name not in split and row.group not in used_groups]
    split |= _draw_groups(free, lists, params)

    held = {row.group: split[row.name] for row in base if split.get(row.name) in ("val", "test")}
    known = KnownGroups(row.group for row in base if row.group != row.name)
    out: list[Row] = []
    unused: dict[str, str] = {}
    for row in rows:
        part = split.get(row.name) if row.dump == dump_registry.BASE else None
        reason = _reason_unused(row, held, lists, known) if part is None else None
        if reason is not None:
            part = "unused"
            unused[f"{row.dump}/{row.name}"] = reason
        elif part in (None, "unlabelled"):
            part = "unlabelled" if row.mask_import is None else "labelled"
        out.append(replace(row, split=part))
    return out, unused


def _listed_parts(lists: Lists) -> dict[str, str]:
    """Name id -> the part whose list names it. Raises LeakError where two do."""
    part_of: dict[str, str] = {}
    for part in SIDES:
        for name in lists.get(part) or ():
            if part_of.setdefault(name, part) != part:
                raise LeakError(
                    f"image {name!r} is in the lists {part_of[name]} and {part}: remove it from one of them"
                )
    return part_of


def _reason_unused(row: Row, held: Mapping[str, str], lists: Lists, known: KnownGroups) -> str | None:
    """Why an image that neither a list nor the draw placed may not train; None where it may, unlabelled."""
    if row.group in held:
        return f"its group {row.group!r} is in {held[row.group]}"
    if row.dump == dump_registry.BASE:
        return "no list names it" if lists.get("unlabelled") is not None else None
    if row.group not in known:
        for group in known.find(row.name).candidates:
            if group in held:
                return (
                    f"its folders could be those of {group!r}, which is in {held[group]}; name them as the source does"
                )
    return None


def draw(group: str, seed: int) -> float:
    """The group's own number in 0..1, whatever other groups there are."""
    return int(atomic.sha256(f"{seed} {group}".encode())[:13], 16) / 16**13


def _draw_groups(free: Sequence[Row], lists: Lists, params: config.Split) -> dict[str, str]:
    """Unlisted images with masks -> test, val and labelled by whole groups."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in sorted(free, key=lambda row: row.name):
        groups[row.group].append(row.name)

    order = sorted(groups, key=lambda group: (draw(group, params.seed), group))
    shares = {part: getattr(params, part) for part in ("test", "val") if lists.get(part) is None}

    split: dict[str, str] = {}
    edge = 0.0
    waiting = sum(share > 0 for share in shares.values())
    for part, share in shares.items():
        edge += share
        waiting -= share > 0
        below = sum(draw(group, params.seed) < edge for group in order[:-1])
        spare = max(len(order) - 1 - waiting, min(1, len(order) - 1))
        count = min(max(below, 1), spare) if share > 0 and order else 0
        for group in order[:count]:
            split |= dict.fromkeys(groups[group], part)
        order = order[count:]

    if lists.get("labelled") is None:
        rest = [name for group in order for name in groups[group]]
        split |= dict.fromkeys(rest[: params.labelled], "labelled")
        split |= dict.fromkeys(rest[len(rest) if params.labelled is None else params.labelled :], "unlabelled")
    return split


def verify(rows: Sequence[Row]) -> None:
    """Refuse a split that leaks.

    Raises:
        LeakError: an image id in two places; a group on two sides of train, val and test; a labelled, val or test row
            without a mask.
    """
    place: dict[str, Row] = {}
    side: dict[str, Row] = {}
    for row in rows:
        if row.split == "unused":
            continue
        if (other := place.setdefault(row.id, row)) is not row:
            raise LeakError(
                f"{row.dump}/{row.name} ({row.split}) and {other.dump}/{other.name} ({other.split}) "
                "are the same image: remove one"
            )
        first = side.setdefault(row.group, row)
        if SIDES[first.split] != SIDES[row.split]:
            raise LeakError(
                f"group {row.group!r} is in {first.split} ({first.name}) and in {row.split} ({row.name}): "
                "put the whole group on one side, or set data.group to what really belongs together"
            )
        if row.split in manifest.NEEDS_MASK and row.mask_shard is None:
            raise LeakError(f"{row.dump}/{row.name} is in {row.split} but has no mask: add one or take it off the list")


def pixels(
    rows: Sequence[Row], classes: int, max_pixels: int, advance: Callable[[], None] = lambda: None
) -> tuple[NDArray[np.int64], list[str]]:
    """Pixels per class (K,) of one split's masks, and for each row "id digest of the decoded mask".

    `advance()` is called after each image.

    Raises:
        manifest.ManifestError: a mask is unreadable, or holds an id outside 0..K-1 and 255; names the image.
    """
    total_K = np.zeros(classes, np.int64)
    parts = []
    for row in rows:
        mask_HW = manifest.open_mask(row, max_pixels)
        if mask_HW is None:
            raise manifest.ManifestError(f"{row.dump}/{row.name}: no mask; run `dvc repro` again")
        counts = np.bincount(mask_HW.ravel(), minlength=256)
        if counts[classes:255].any():
            alien = classes + int(np.flatnonzero(counts[classes:255])[0])
            raise manifest.ManifestError(f"{row.dump}/{row.name}: class id {alien}; there are {classes} classes")
        total_K += counts[:classes]
        parts.append(f"{row.id} {manifest.mask_digest(mask_HW)}")
        advance()
    return total_K, parts


def summarise(
    rows: Sequence[Row],
    unused: Mapping[str, str],
    source: Mapping[str, Any],
    max_pixels: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """summary.json: counts, groups, pixels and missing classes per split, and the hashes that name the split.

    `label_hash` names the images and masks that training sees, labelled and val; `test_hash` those that it must not.
    """
    names = [c["name"] for c in source["classes"]]
    parts = {part: [row for row in rows if row.split == part] for part in manifest.SPLITS}
    counted = {part: pixels(parts[part], len(names), max_pixels, advance) for part in manifest.NEEDS_MASK}
    by_class = {part: dict(zip(names, total_K.tolist(), strict=True)) for part, (total_K, _) in counted.items()}
    return {
        "classes": source["classes"],
        "ignore": source["ignore"],
        "counts": {part: len(members) for part, members in parts.items()},
        "dumps": dict(Counter(row.dump for row in rows if row.split != "unused")),
        "groups": {part: sorted({row.group for row in members}) for part, members in parts.items() if part != "unused"},
        "pixels": by_class,
        "missing": {part: [name for name, n in by_class[part].items() if n == 0] for part in by_class},
        "hidden_labels": sum(row.mask_shard is not None for row in parts["unlabelled"]),
        "unused": dict(unused),
        "split_hash": manifest.set_hash(f"{row.id} {row.split}" for row in rows),
        "test_hash": manifest.set_hash(counted["test"][1]),
        "label_hash": manifest.set_hash(counted["labelled"][1] + counted["val"][1]),
        "data_hash": manifest.set_hash(row.id for row in rows),
    }


def demand_parts(counts: Mapping[str, int], unused: Mapping[str, str], lists: Lists, params: config.Split) -> None:
    """Stop before hours of training where a part that it needs is empty. Raises ValueError that says what to do.

    A part whose share is 0 and that no list names is left out on purpose.
    """
    if not counts["labelled"]:
        evaluated = [f"{len(ids)} are listed for {part}" for part in ("val", "test") if (ids := lists.get(part))]
        listed = (
            f" ({' and '.join(evaluated)}; a source's own val set is the test set where it has no other)"
            if evaluated
            else ""
        )
        raise ValueError(
            f"no labelled image is left to train on{listed}: give more images a mask, lower split.val and split.test, or "
            "name each part in data.lists"
        )
    for part in ("val", "test"):
        wanted = lists.get(part) is not None or getattr(params, part) > 0
        if wanted and not counts[part]:
            idle = f"; {len(unused)} images are unused, {next(iter(unused.values()))}" if unused else ""
            raise ValueError(
                f"no {part} image: {counts['labelled']} labelled images are left to draw from by group{idle}. Label more "
                f"images or groups, name some in data.lists.{part}, or set data.group to what really belongs together"
            )


def warnings(summary: Mapping[str, Any], lists: Lists, rows: Sequence[Row]) -> list[str]:
    """What a user should know before training: classes that never occur, listed images that are not there."""
    found = []
    for part, names in summary["missing"].items():
        if names and summary["counts"][part]:
            what = "it cannot be learnt" if part == "labelled" else "its score is undefined and left out of the mean"
            found.append(f"class {', '.join(names)}: no pixel in {part}; {what}")
    known = {row.name for row in rows if row.dump == dump_registry.BASE}
    for part in SIDES:
        if gone := [name for name in lists.get(part) or () if name not in known]:
            found.append(
                f"{len(gone)} of {len(lists[part] or ())} images listed for {part} are not in the manifest, "
                f"the first is {gone[0]!r}: {paths.QUARANTINE} says why"
            )
    for part in ("labelled", "val", "test"):
        if not summary["counts"][part]:
            found.append(f"no {part} image at all")
    for part in ("val", "test"):
        if lists.get(part) is None and len(groups := summary["groups"][part]) == 1:
            found.append(
                f"{part} is the group {groups[0]!r} alone: with so few groups a later one may take its place; "
                f"data.lists.{part} keeps it"
            )
    return found


def run(params: config.Params) -> Result:
    """The stage: data/manifest.parquet -> data/split/.

    Raises:
        LeakError: as `assign` and `verify`. As `demand_parts`.
    """
    source = atomic.read_json(paths.SOURCE)
    before = manifest.read(paths.MANIFEST)
    rows, unused = assign(before, source["lists"], params.split)
    verify(rows)
    with progress.bar("count pixels", sum(row.split in manifest.NEEDS_MASK for row in rows)) as bar:
        summary = summarise(rows, unused, source, params.ingest.max_pixels, bar.advance)
    demand_parts(summary["counts"], summary["unused"], source["lists"], params.split)

    manifest.write(paths.SPLIT_MANIFEST, rows)
    atomic.write_json(paths.SPLIT_SUMMARY, summary)
    shown: list[Table | str] = [_table(summary)]
    if summary["hidden_labels"]:
        shown.append(
            f"{summary['hidden_labels']} unlabelled images have hidden labels: for diagnostics, and for train.method: ceiling"
        )
    return Result(shown, warnings(summary, source["lists"], before))


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table(title=f"split {summary['split_hash'][:12]}")
    for column in ("", *manifest.SPLITS):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("images", *(str(summary["counts"][part]) for part in manifest.SPLITS))
    groups = (str(len(summary["groups"][part])) if part in summary["groups"] else "" for part in manifest.SPLITS)
    table.add_row("groups", *groups, end_section=True)
    totals = {part: max(1, sum(by_class.values())) for part, by_class in summary["pixels"].items()}
    for name in (c["name"] for c in summary["classes"]):
        share = {part: f"{100 * summary['pixels'][part][name] / total:.2f} %" for part, total in totals.items()}
        table.add_row(name, *(share.get(part, "") for part in manifest.SPLITS))
    return table
