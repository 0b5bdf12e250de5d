"""Stage index: every ingested archive, in order of arrival -> one manifest without exact or near duplicates.

Earlier archives win over later ones. Within an archive the order is: listed for test, for val, as labelled, any other
image with a mask, the rest; then by name. So a test set never loses an image to a training set. Two images that the
source's own lists put into the same one of labelled, val and test are never *near* duplicates of each other: who wrote
the list wanted both. Exact duplicates always go.

Of images that look alike and have no mask, `ingest.near_duplicate_cap` stay. A near copy of an image with a mask, or of
a listed one, never does: a model may be scored on that image, now or under another split.

All rows are looked at anew at every run, so that the manifest depends on the archives alone and not on which of them
came to this machine first; 100,000 take about a second (benchmarks/ratios/ingest.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from pipeline import config, paths
from pipeline.imaging import perceptual_hash
from pipeline.ingest import check, dump_registry
from pipeline.labels import registry as labels
from pipeline.stage import Result
from pipeline.storage import atomic, manifest

RANKED = ("test", "val", "labelled")


def listed_parts(lists: Mapping[str, Sequence[str] | None]) -> dict[str, str]:
    """Name id -> test, val or labelled, as the source's lists say."""
    return {name: part for part in RANKED for name in lists.get(part) or ()}


class _Kept(NamedTuple):
    """What a later image is compared with: its place, its list, and whether a model may be scored on it."""

    key: str
    part: str | None
    scored: bool


def deduplicate(
    archives: Sequence[Sequence[manifest.Row]],
    lists: Mapping[str, Sequence[str] | None],
    bits: int,
    cap: int = 1,
) -> tuple[list[manifest.Row], list[dict[str, Any]]]:
    """Rows of every archive in order of arrival -> (rows kept, quarantine records of the dropped ones).

    Args:
        archives: rows per archive; the first is the base archive, to which `lists` belong.
        lists: the source's id lists.
        bits: largest Hamming distance of two difference hashes that still makes a near duplicate.
        cap: at most so many images without a mask stay where each is near the next one.
    """
    part_of = listed_parts(lists)
    near = perceptual_hash.neighbours((_value(row) for rows in archives for row in rows), bits)
    seen: dict[str, manifest.Row] = {}
    at: dict[int, list[_Kept]] = {}
    kept, dropped = [], []
    for number, rows in enumerate(archives):
        parts = {row.name: part_of.get(row.name) if number == 0 else None for row in rows}

        def rank(row: manifest.Row, parts: dict[str, str | None] = parts) -> tuple[int, str]:
            part = parts[row.name]
            return (RANKED.index(part) if part else 3 if row.mask_shard else 4), row.name

        survivors = []
        for row in sorted(rows, key=rank):
            if (earlier := seen.get(row.id)) is not None:
                reason = f"same pixels as {earlier.dump}/{earlier.name}"
                dropped.append(check.record(row.dump, row.name, "duplicate", reason))
                continue
            value, part = _value(row), parts[row.name]
            scored = part is not None or row.mask_shard is not None
            if value in near:
                alike = [k for v in near[value] for k in at.get(v, ()) if k.part != part or part is None]
                if len(alike) >= (1 if scored or any(k.scored for k in alike) else cap):
                    dropped.append(check.record(row.dump, row.name, "near-duplicate", _look_alike(alike, bits, cap)))
                    continue
                at.setdefault(value, []).append(_Kept(f"{row.dump}/{row.name}", part, scored))
            seen[row.id] = row
            survivors.append(row)
        kept += sorted(survivors, key=lambda row: row.name)
    return kept, dropped


def _value(row: manifest.Row) -> int | None:
    return int(row.phash, 16) if row.phash else None


def _look_alike(alike: Sequence[_Kept], bits: int, cap: int) -> str:
    first = next((k for k in alike if k.scored), alike[0])
    more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
    rule = "ingest.near_duplicate_bits" + ("" if first.scored or cap == 1 else ", ingest.near_duplicate_cap")
    return f"looks like {first.key}{more} (difference hash within {bits} bits; {rule})"


def run(params: config.Params) -> Result:
    """The stage: data/ingested/ of every dump, and imported labels -> data/manifest.parquet and data/quarantine.json."""
    names = list(dump_registry.read().dumps)
    homes = [paths.INGESTED / name for name in names]
    archives = [manifest.read(home / paths.ROWS_NAME) for home in homes]
    refused = [item for home in homes for item in atomic.read_json(home / paths.QUARANTINE_NAME)]
    source = atomic.read_json(paths.SOURCE)
    imported = labels.places(labels.read(), [c["name"] for c in source["classes"]])

    settings = params.ingest
    rows, dropped = deduplicate(archives, source["lists"], settings.near_duplicate_bits, settings.near_duplicate_cap)
    rows = labels.attach(rows, imported)
    manifest.write(paths.MANIFEST, rows)
    atomic.write_json(paths.QUARANTINE, refused + dropped)

    shown: list[Table | str] = [_table(names, archives, rows, refused, dropped)]
    if imported:
        used = sum(row.mask_import is not None for row in rows)
        shown.append(
            f"{used} masks from {paths.LABEL_REGISTRY}; {len(imported) - used} more are of images that are not kept"
        )
    if refused or dropped:
        shown.append(f"{len(refused) + len(dropped)} entries with their reasons: {paths.QUARANTINE}")
    return Result(shown)


def _table(
    names: Sequence[str],
    archives: Sequence[Sequence[manifest.Row]],
    rows: Sequence[manifest.Row],
    refused: Sequence[Mapping[str, Any]],
    dropped: Sequence[Mapping[str, Any]],
) -> Table:
    table = Table(title=f"index: {len(rows)} images")
    for column in ("dump", "ingested", "duplicate", "near-duplicate", "kept", "refused files"):
        table.add_column(column, justify="left" if column == "dump" else "right")
    kept = Counter(row.dump for row in rows)
    codes = Counter((item["dump"], item["code"]) for item in dropped)
    out = Counter(item["dump"] for item in refused if not item["kept"])
    for name, archive in zip(names, archives, strict=True):
        cells = (len(archive), codes[name, "duplicate"], codes[name, "near-duplicate"], kept[name], out[name])
        table.add_row(name, *map(str, cells))
    return table
