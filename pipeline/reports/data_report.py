"""Stage data_report: what the data is, one static page that works offline: reports/data.html.

It shows what is there: a report that a later stage has not written yet is named with what to run.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config, paths
from pipeline.ingest import dump_registry, split
from pipeline.ingest.quarantine import QuarantineEntry, read_quarantine
from pipeline.reports import page, sections
from pipeline.reports.pictures import ReportPictures
from pipeline.stage import Result
from pipeline.storage import atomic, manifest

HASHES = ("data_hash", "split_hash", "test_hash")
BUDGET = 4_000_000  # characters of pictures; the words are far below the rest of 5 MB
REFUSED, PAIRS, NEXT, SUSPECTS = 24, 12, 12, 12  # pictures of each kind at most
CONTENTS = {
    "warnings": "Warnings",
    "splits": "Splits",
    "classes": "Classes",
    "dumps": "Dumps",
    "drift": "Drift",
    "label-next": "Label next",
    "suspects": "Suspect labels",
    "quarantine": "Quarantine",
    "duplicates": "Duplicates",
    "sizes": "Sizes",
    "groups": "Groups",
}


class ReportError(ValueError):
    """There is no data to report on; the message says what to run."""


@dataclass(frozen=True)
class Project:
    """What the stages left in a project folder; None where a later stage has not run."""

    root: Path
    summary: dict[str, Any]
    rows: list[manifest.Row]
    quarantine: list[QuarantineEntry]
    dumps: dict[str, dict[str, Any]]
    lists: dict[str, Any]
    drift: dict[str, Any]
    ranked: list[dict[str, str]] | None
    suspects: list[dict[str, str]] | None


def read_project(root: Path) -> Project:
    """Raises as `build`."""
    summary = _read_json(root / paths.SPLIT_SUMMARY)
    if summary is None:
        raise ReportError(f"{root / paths.SPLIT_SUMMARY}: not found; run `dvc repro split`")
    registry = dump_registry.read_dumps(root / dump_registry.FILE)
    return Project(
        root=root,
        summary=summary,
        rows=manifest.read(root / paths.SPLIT_MANIFEST),
        quarantine=_read_quarantine(root / paths.QUARANTINE),
        dumps={name: entry.model_dump() for name, entry in registry.dumps.items()},
        lists=(_read_json(root / paths.SOURCE) or {}).get("lists") or {},
        drift={path.name: _read_json(root / path) for path in (paths.SCREEN, paths.DRIFT)},
        ranked=_read_csv(root / paths.RANKING),
        suspects=_read_csv(root / paths.SUSPECT_LABELS),
    )


def _read_json(path: Path) -> Any:
    return atomic.read_json(path) if path.exists() else None


def _read_quarantine(path: Path) -> list[QuarantineEntry]:
    return read_quarantine(path) if path.exists() else []


def _read_csv(path: Path) -> list[dict[str, str]] | None:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.exists() else None


def build(root: Path = Path()) -> str:
    """The page of the project in `root`.

    Raises:
        ReportError: data/split is not there. manifest.ManifestError, registry.RegistryError: a table is damaged.
    """
    project = read_project(root)
    summary = project.summary
    pictures = ReportPictures(
        root,
        budget=BUDGET,
        palette=[entry["color"] for entry in summary["classes"]],
        archives={name: root / entry["archive"] for name, entry in project.dumps.items()},
    )
    refused = [item for item in project.quarantine if not item.is_duplicate][:REFUSED]
    pictures.load_refused([(item.dump, item.name) for item in refused])
    copies = [item for item in project.quarantine if item.is_duplicate]
    originals = {sections.like(item.reason) or "" for item in copies}
    pictures.load_ingested({item.key for item in copies} | originals)

    values = {
        "images": len(project.rows),
        "hashes": [(key.replace("_", " "), summary[key]) for key in HASHES if key in summary],
        "contents": list(CONTENTS.items()),
        "warnings": split.warnings(summary, project.lists, project.rows),
        "splits": sections.splits(summary),
        "classes": sections.classes(summary),
        "dumps": sections.dumps(project.dumps, project.rows, project.quarantine),
        "drift": sections.drift(project.drift),
        # What comes first has its pictures first, while the budget lasts.
        "label_next": sections.label_next(project.ranked, pictures.prelabelled, NEXT),
        "suspects": sections.suspects(project.suspects, pictures.strip, SUSPECTS),
        "quarantine": sections.quarantine(project.quarantine, pictures.refused, REFUSED),
        "duplicates": sections.duplicates(project.quarantine, pictures.ingested, PAIRS),
        "sizes": sections.sizes(project.rows),
        "groups": sections.groups(project.rows),
    }
    return page.render("data.html.jinja", values)


def run(_params: config.Params) -> Result:
    """The stage: data/ and the reports on it -> reports/data.html."""
    text = build()
    atomic.write_text(paths.DATA_REPORT, text)
    return Result((f"{paths.DATA_REPORT}: {len(text) / 1e6:.1f} MB, opens in any browser, offline",))
