"""Stage data_report: what the data is, one static page that works offline: reports/data.html.

It shows what is there: a report that a later stage has not written yet is named with what to run.
"""

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import config
from pipeline.ingest import dump_registry, split
from pipeline.reports import sections as data_sections
from pipeline.reports.markup import joined, page, tag
from pipeline.reports.thumbnails import STRIP, Album, originals
from pipeline.storage import atomic, manifest

OUT = Path("reports/data.html")
HASHES = ("data_hash", "split_hash", "test_hash")
BUDGET = 4_000_000  # characters of pictures; the words are far below the rest of 5 MB
REFUSED, PAIRS, NEXT, SUSPECTS = 24, 12, 12, 12  # pictures of each kind at most


class ReportError(ValueError):
    """There is no data to report on; the message says what to run."""


def _json(path: Path) -> Any:
    return atomic.read_json(path) if path.exists() else None


def _csv(path: Path) -> list[dict[str, str]] | None:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.exists() else None


def _ingested(root: Path, wanted: set[str]) -> dict[str, manifest.Row]:
    """Rows of what was ingested, duplicates too, by "dump/name"."""
    found: dict[str, manifest.Row] = {}
    for dump in sorted({key.partition("/")[0] for key in wanted}):
        file = root / "data/ingested" / dump / "rows.parquet"
        rows = manifest.read(file) if file.exists() else []
        found |= {key: row for row in rows if (key := f"{dump}/{row.name}") in wanted}
    return found


def _refused(root: Path, entries: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The files that were refused, by "dump/name", from their archives."""
    found: dict[str, bytes] = {}
    for dump in {item["dump"] for item in items} & entries.keys():
        names = [item["name"] for item in items if item["dump"] == dump]
        there = originals(root / entries[dump]["archive"], names)
        found |= {f"{dump}/{name}": data for name, data in there.items()}
    return found


def build(root: Path = Path()) -> str:
    """The page of the project in `root`.

    Raises:
        ReportError: data/split is not there. manifest.ManifestError, registry.RegistryError: a table is damaged.
    """
    summary = _json(root / "data/split/summary.json")
    if summary is None:
        raise ReportError(f"{root / 'data/split/summary.json'}: not found; run `dvc repro split`")
    rows = manifest.read(root / "data/split/manifest.parquet")
    dropped = _json(root / "data/quarantine.json") or []
    entries = {name: entry.model_dump() for name, entry in dump_registry.read(root / dump_registry.FILE).dumps.items()}
    lists = (_json(root / "data/pulled/source.json") or {}).get("lists") or {}
    album, next_home = Album(BUDGET), root / "reports/label_next"
    palette = [c["color"] for c in summary["classes"]]

    copies = [item for item in dropped if "duplicate" in item["code"]]
    names = {f"{item['dump']}/{item['name']}" for item in copies} | {
        data_sections.like(item["reason"]) or "" for item in copies
    }
    known = _ingested(root, names)
    refused = [item for item in dropped if "duplicate" not in item["code"]][:REFUSED]
    bytes_of = _refused(root, entries, refused)
    ranked = _csv(root / "reports/rank.csv")
    places = {
        file.relative_to(next_home / "images").with_suffix("").as_posix(): file
        for file in (next_home / "images").rglob("*.*")
    }

    def prelabelled(name: str) -> str:
        """Of "dump/name", which the folder calls that only where two dumps have the name."""
        key = next((key for key in (name, name.partition("/")[2]) if key in places), None)
        return album.overlaid(places[key], next_home / "masks" / f"{key}.png", palette) if key else ""

    sections = [
        data_sections.warnings(split.warnings(summary, lists, rows)),
        data_sections.splits(summary),
        data_sections.classes(summary),
        data_sections.dumps(entries, rows, dropped),
        data_sections.drift({name: _json(root / "reports" / name) for name in ("screen.json", "drift.json")}),
        data_sections.label_next(ranked, prelabelled, NEXT),
        data_sections.suspects(
            _csv(root / "reports/suspect_labels.csv"), lambda name: album.of_file(root / name, STRIP), SUSPECTS
        ),
        data_sections.quarantine(dropped, lambda name: album.of_bytes(bytes_of.get(name, b"")), REFUSED),
        data_sections.duplicates(dropped, lambda name: album.of_row(known.get(name), root), PAIRS),
        data_sections.sizes(rows),
        data_sections.groups(rows),
    ]
    titles = {
        "warnings": "Warnings", "splits": "Splits", "classes": "Classes", "dumps": "Dumps", "drift": "Drift",
        "label-next": "Label next", "suspects": "Suspect labels", "quarantine": "Quarantine", "duplicates": "Duplicates",
        "sizes": "Sizes", "groups": "Groups",
    }  # fmt: skip
    links = [tag("li", tag("a", title, href=f"#{id}")) for id, title in titles.items()]
    told = (f"{key.replace('_', ' ')} {summary[key][:12]}" for key in HASHES if key in summary)
    title = tag("h1", f"Data: {len(rows)} images, {len(palette)} classes")
    head = tag("header", title, tag("p", "; ".join(told), class_="quiet"))
    contents = tag("nav", tag("ul", *links), aria_label="Sections")
    return page("Marginalia: data report", head, contents, tag("main", joined(sections)))


def main() -> int:
    try:
        config.load()
        text = build()
    except (ValueError, OSError) as error:  # damaged files included
        Console(stderr=True).print(f"data-report: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    atomic.write_text(OUT, text)
    Console().print(f"{OUT}: {len(text) / 1e6:.1f} MB, opens in any browser, offline", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
