"""A table with one row for each case: medians of two works timed in turn, median and quartiles of their ratio."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.support.timing import Timed, machine
from pipeline.storage import atomic


def row(name: str, timed: Mapping[str, Timed], **more: Any) -> dict[str, Any]:
    """The first work against the second, round by round."""
    ours, base = timed.values()
    ratio = Timed(tuple(a / b for a, b in zip(ours.seconds, base.seconds, strict=True)))
    facts = {"ours_ms": 1e3 * ours.median, "base_ms": 1e3 * base.median, "rounds": len(ours.seconds)}
    return {"name": name, **facts, "ratio": ratio.median, "ratio_quartiles": list(ratio.quartiles), **more}


def report(
    title: str, rows: Sequence[dict[str, Any]], columns: Mapping[str, Callable[[dict[str, Any]], str]], out: Path | None
) -> None:
    """Print the table; write title, rows and machine as JSON to `out` if it is given."""
    here = machine()
    here["versions"] |= {name: version(name) for name in ("pillow", "bentoml", "starlette", "uvicorn")}
    table = Table(title=title, caption=f"{here['cpu']}, {here['cores']} cores")
    for name in columns:
        table.add_column(name, justify="right" if table.columns else "left")
    for item in rows:
        table.add_row(*(show(item) for show in columns.values()))
    Console(width=120).print(table)
    if out is not None:
        atomic.write_json(out, {"title": title, "rows": list(rows), "machine": here})
