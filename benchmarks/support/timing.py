"""Time several works in turn, so that a busy machine slows all of them alike; report medians, spread and the ratio."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timed:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high


def alternate(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timed]:
    """One unmeasured round, then `rounds` (>= 5) measured ones, the works taking turns."""
    assert rounds >= 5
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timed(tuple(values)) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("numpy", "torch")} | {"python": platform.python_version()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "card": card, "versions": versions, "commit": commit or "none yet"}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def finish(row: str, what: str, timed: Mapping[str, Timed], *, bar: float, stretch: float, out: Path | None) -> None:
    """Print the table of medians and of each work's ratio to the last one; write JSON with `--out`.

    The ratio of a round is of two works timed next to each other; its median and quartiles are what is reported.
    """
    *_, base = timed.values()
    table = Table("work", "median", "quartiles", "ratio", "its quartiles", title=f"{row}: {what}")
    results = {}
    for name, item in timed.items():
        ratio = Timed(tuple(a / b for a, b in zip(item.seconds, base.seconds, strict=True)))
        results[name] = {
            "median_s": item.median, "quartiles_s": item.quartiles, "ratio": ratio.median,
            "ratio_quartiles": ratio.quartiles, "rounds_s": item.seconds,
        }  # fmt: skip
        low, high = item.quartiles
        cells = f"{1e3 * item.median:.2f} ms", f"{1e3 * low:.2f} .. {1e3 * high:.2f}", f"{ratio.median:.4f}"
        table.add_row(name, *cells, "{:.4f} .. {:.4f}".format(*ratio.quartiles))
    first = next(iter(results.values()))["ratio"]
    verdict = "stretch met" if first <= stretch else "bar met" if first <= bar else "ABOVE THE BAR"
    table.caption = f"bar {bar:g}, stretch {stretch:g}: {verdict}"
    Console().print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        value = {"row": row, "what": what, "bar": bar, "stretch": stretch, "results": results, "machine": machine()}
        out.write_text(json.dumps(value, indent=2) + "\n")
