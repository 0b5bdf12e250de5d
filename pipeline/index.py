"""Stage index: every ingested archive, in order of arrival -> one manifest without exact or near duplicates.

Earlier archives win over later ones. Within an archive the order is: listed for test, for val, as labelled, any other
image with a mask, the rest; then by name. So a test set never loses an image to a training set. Two images that the
source's own lists put into the same one of labelled, val and test are never *near* duplicates of each other: who wrote
the list wanted both. Exact duplicates always go.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import config, duplicates, files, ingest, labels, manifest, registry

MANIFEST, QUARANTINE = Path("data/manifest.parquet"), Path("data/quarantine.json")
RANKED = ("test", "val", "labelled")


def listed_parts(lists: Mapping[str, Sequence[str] | None]) -> dict[str, str]:
    """Name id -> test, val or labelled, as the source's lists say."""
    return {name: part for part in RANKED for name in lists.get(part) or ()}


def deduplicate(
    archives: Sequence[Sequence[manifest.Row]], lists: Mapping[str, Sequence[str] | None], bits: int
) -> tuple[list[manifest.Row], list[dict[str, Any]]]:
    """Rows of every archive in order of arrival -> (rows kept, quarantine records of the dropped ones).

    Args:
        archives: rows per archive; the first is the base archive, to which `lists` belong.
        lists: the source's id lists.
        bits: largest Hamming distance of two difference hashes that still makes a near duplicate.
    """
    part_of = listed_parts(lists)
    near, seen = _NearByPart(bits), dict[str, manifest.Row]()
    kept, dropped = [], []
    for number, rows in enumerate(archives):
        parts = {row.name: part_of.get(row.name) if number == 0 else None for row in rows}

        def rank(row: manifest.Row, parts: dict[str, str | None] = parts) -> tuple[int, str]:
            part = parts[row.name]
            return (RANKED.index(part) if part else 3 if row.mask_shard else 4), row.name

        survivors = []
        for row in sorted(rows, key=rank):
            earlier = seen.get(row.id)
            if earlier is not None:
                reason = f"same pixels as {earlier.dump}/{earlier.name}"
                dropped.append(ingest.record(row.dump, row.name, "duplicate", reason))
                continue
            value, part = int(row.phash, 16) if row.phash else None, parts[row.name]
            if (other := near.find(value, part)) is not None:
                reason = f"looks like {other} (difference hash within {bits} bits; ingest.near_duplicate_bits)"
                dropped.append(ingest.record(row.dump, row.name, "near-duplicate", reason))
                continue
            seen[row.id] = row
            near.add(value, f"{row.dump}/{row.name}", part)
            survivors.append(row)
        kept += sorted(survivors, key=lambda row: row.name)
    return kept, dropped


class _NearByPart:
    """One near-duplicate index for each list, so that a list's own entries can be left out of a search."""

    def __init__(self, bits: int) -> None:
        self._by_part = {part: duplicates.NearIndex(bits) for part in (*RANKED, None)}

    def find(self, value: int | None, part: str | None) -> str | None:
        found = (index.find(value) for other, index in self._by_part.items() if other != part or part is None)
        return next((key for key in found if key is not None), None)

    def add(self, value: int | None, key: str, part: str | None) -> None:
        self._by_part[part].add(value, key)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.index", description="Join all archives into one manifest."
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    arguments = parser.parse_args(argv)
    console, begun = Console(), time.monotonic()
    try:
        params = config.load(arguments.params)
        names = list(registry.read().dumps)
        homes = [ingest.INGESTED / name for name in names]
        archives = [manifest.read(home / "rows.parquet") for home in homes]
        refused = [item for home in homes for item in files.read_json(home / "quarantine.json")]
        source = files.read_json(ingest.SOURCE)
        lists = source["lists"]
        imported = labels.places(labels.read(), [c["name"] for c in source["classes"]])
        rows, dropped = deduplicate(archives, lists, params.ingest.near_duplicate_bits)
    except (config.ConfigError, ValueError, OSError) as error:
        Console(stderr=True).print(f"index: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    rows = labels.attach(rows, imported)
    manifest.write(MANIFEST, rows)
    files.write_json(QUARANTINE, refused + dropped)
    table = Table(title=f"index: {len(rows)} images, {time.monotonic() - begun:.1f} s")
    for column in ("dump", "ingested", "duplicate", "near-duplicate", "kept", "refused files"):
        table.add_column(column, justify="left" if column == "dump" else "right")
    kept = Counter(row.dump for row in rows)
    codes = Counter((item["dump"], item["code"]) for item in dropped)
    out = Counter(item["dump"] for item in refused if not item["kept"])
    for name, archive in zip(names, archives, strict=True):
        cells = (len(archive), codes[name, "duplicate"], codes[name, "near-duplicate"], kept[name], out[name])
        table.add_row(name, *map(str, cells))
    console.print(table)
    if imported:
        used = sum(row.mask_import is not None for row in rows)
        console.print(f"{used} masks from {labels.FILE}; {len(imported) - used} more are of images that are not kept")
    if refused or dropped:
        console.print(f"{len(refused) + len(dropped)} entries with their reasons: {QUARANTINE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
