"""Methods against each other: a grid of DVC experiments over seeds, one table and one figure.

`make compare`, or `marginalia compare --methods fixmatch,s4mc --seeds 0,1,2 -S train.steps=400`. Each run is an
experiment (`dvc exp show` lists them) in a copy of the workspace; those that exist already are not run again.

`ceiling` among the methods trains on the hidden labels of the unlabelled images: what a method gains is then also shown as
the share that it closes of the headroom between labels alone and the ceiling. It is run by default where the split has
hidden labels.
"""

import csv
import io
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from pipeline import console, paths, stage
from pipeline.storage import atomic, manifest
from training import gains
from training.reports import evaluation

SCORES, TRAINED = paths.SCORES.as_posix(), paths.TRAIN_SCORES.as_posix()
METHODS = ("supervised", "ceiling", "fixmatch", "unimatch", "s4mc", "corrmatch", "s4mc+corrmatch")


class CompareError(RuntimeError):
    """DVC could not run or show the experiments; carries what it said."""


@dataclass(frozen=True)
class Run:
    """One finished experiment. miou on test in percent, kept and precision in 0..1 (NaN: no pseudo-labels)."""

    method: str
    seed: int
    miou: float
    kept: float
    precision: float
    seconds_per_step: float


class ComparedMethod(gains.Gain):
    """A line of table.csv: a method's gain, and means over its seeds of what was kept and how long a step took.

    Attributes:
        kept, precision: at the end of training, in 0..1; NaN without pseudo-labels.
    """

    kept: float
    precision: float
    seconds_per_step: float


def name_of(method: str, seed: int, settings: Sequence[str], params: bytes) -> str:
    """A name that DVC takes for an experiment (letters, digits, dashes), with a short hash of all other settings."""
    tail = atomic.sha256(params + "\0".join(settings).encode())[:6]
    return f"compare-{method.replace('+', '-and-')}-seed{seed}-{tail}"


def dvc(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CompareError(f"dvc {' '.join(arguments)}: " + "\n".join(said[-12:]))
    return done.stdout


def parse(shown: str) -> dict[str, Run]:
    """`dvc exp show --json` -> finished comparison runs by experiment name; others are passed over."""
    found = {}
    for base in json.loads(shown):
        for experiment in base.get("experiments") or []:
            state = experiment["revs"][0]
            metrics = (state.get("data") or {}).get("metrics") or {}
            try:
                scores, trained = metrics[SCORES]["data"], metrics[TRAINED]["data"]
            except KeyError:
                continue
            if not (experiment.get("name") or "").startswith("compare-"):
                continue
            found[experiment["name"]] = Run(
                trained["method"], trained["seed"], float(scores["miou"]), _number(trained.get("kept")),
                _number(trained.get("precision")), trained["seconds"] / trained["steps"],
            )  # fmt: skip
    return found


def _number(value: Any) -> float:
    """DVC leaves a metric that is null out of what it shows."""
    return math.nan if value is None else float(value)


def hidden_labels(path: Path = paths.SPLIT_MANIFEST) -> bool:
    """Whether some unlabelled image of the split, if there is one yet, has a mask all the same."""
    if not path.exists():
        return False
    return any(row.split == "unlabelled" and row.mask_shard is not None for row in manifest.read(path))


def hold_together(runs: Sequence[Run], methods: Sequence[str]) -> gains.Comparison:
    """Gains over labels alone, or over the first of `methods` where labels alone were not run."""
    scores: dict[str, dict[int, float]] = {}
    for method in methods:
        if of := {run.seed: run.miou for run in runs if run.method == method}:
            scores[method] = of
    return gains.compare(scores, gains.BASELINE if gains.BASELINE in scores else next(iter(scores)))


def summarise(runs: Sequence[Run], comparison: gains.Comparison) -> list[ComparedMethod]:
    """One row a method."""
    rows = []
    for gain in comparison.rows:
        of = [run for run in runs if run.method == gain.method]
        row = ComparedMethod(
            **gain.model_dump(),
            kept=statistics.mean(run.kept for run in of),
            precision=statistics.mean(run.precision for run in of),
            seconds_per_step=statistics.mean(run.seconds_per_step for run in of),
        )
        rows.append(row)
    return rows


def draw(runs: Sequence[Run], rows: Sequence[ComparedMethod], path: Path) -> None:
    """Left: each seed as a dot, the mean as a bar. Right: share of pixels kept against their precision, at the end."""
    figure = Figure(figsize=(11, 4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)

    # What there is to gain: from labels alone to the ceiling.
    means = {row.method: row.miou for row in rows}
    if gains.BASELINE in means and gains.CEILING in means:
        left.axhspan(means[gains.BASELINE], means[gains.CEILING], color="0.93", zorder=0)

    for i, row in enumerate(rows):
        values = [run.miou for run in runs if run.method == row.method]
        left.hlines(row.miou, i - 0.3, i + 0.3, color=f"C{i}", linewidth=3)
        left.plot([i] * len(values), values, "o", color=f"C{i}", alpha=0.7)
        if not math.isnan(row.kept):
            right.plot(row.kept, row.precision, "o", color=f"C{i}", label=row.method)
    left.set_xticks(range(len(rows)), [row.method for row in rows], rotation=20)
    left.set_ylabel("test mIoU (%)")
    left.grid(axis="y", alpha=0.3)
    right.set_xlabel("pixels kept at the end")
    right.set_ylabel("their precision")
    right.grid(alpha=0.3)
    if right.has_data():
        right.legend(fontsize=8)
    evaluation.save(figure, path)


def write(runs: Sequence[Run], comparison: gains.Comparison, out: Path = paths.COMPARISON) -> list[ComparedMethod]:
    """table.csv, runs.csv and compare.png under `out`; returns the table's rows."""
    rows = summarise(runs, comparison)
    out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {
        "table.csv": [row.model_dump() for row in rows],
        "runs.csv": [vars(run) for run in runs],
    }
    for name, lines in tables.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]) if lines else ["method"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        atomic.write_text(out / name, text.getvalue())
    draw(runs, rows, out / "compare.png")
    return rows


# Column of the table -> key of a row, digits.
COLUMNS = {
    "mIoU": ("miou", 2),
    "sd": ("scatter", 2),
    "gain": ("gain", 2),
    "/ sd": ("gain_to_scatter", 1),
    "closed": ("share", 2),
    "kept": ("kept", 2),
    "right": ("precision", 2),
    "s/step": ("seconds_per_step", 2),
}


def table(rows: Sequence[ComparedMethod], comparison: gains.Comparison, out: Path) -> Table:
    shown = Table(
        title="test mIoU (%), teacher, last step; pixels kept and right at the end",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    shown.add_column("method", no_wrap=True)
    for column in ("seeds", *COLUMNS):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [_cell(getattr(row, key), digits) for key, digits in COLUMNS.values()]
        shown.add_row(row.method, str(row.seeds), *cells)
    shown.caption = (
        f"gain over {comparison.baseline}; / sd: in scatters of seeds; closed: share of the headroom\n"
        f"{comparison.verdict}; {out}/compare.png, runs.csv, table.csv"
    )
    return shown


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def default_methods() -> list[str]:
    """METHODS, without the ceiling where the split has no hidden labels to train it on."""
    if hidden_labels():
        return list(METHODS)
    stage.warn(f"without the ceiling: {paths.SPLIT} shows no hidden labels of unlabelled images")
    return [method for method in METHODS if method != gains.CEILING]


def run(methods: Sequence[str], seeds: Sequence[int], settings: Sequence[str] = ()) -> stage.Result:
    """Run what is missing of the grid, and write reports/compare/.

    Args:
        settings: of every run, as DVC takes them: "train.steps=400".

    Raises:
        CompareError: DVC could not run an experiment, or one has no scores.
    """
    params = paths.PARAMS.read_bytes()
    grid = {name_of(m, s, settings, params): (m, s) for s in seeds for m in methods}
    there = set(dvc("exp", "list", "--name-only").split())
    with console.bar("compare", len(grid)) as bar:
        for name, (method, seed) in grid.items():
            if name not in there:
                wanted = [f"train.method={method}", f"train.seed={seed}", *settings]
                dvc("exp", "run", "--temp", "-n", name, *(v for s in wanted for v in ("-S", s)), "evaluate")
            bar.advance()

    found = parse(dvc("exp", "show", "--json"))
    if missing := [name for name in grid if name not in found]:
        raise CompareError(f"no scores in {', '.join(missing)}; `dvc exp remove` them and run this again")
    runs = [found[name] for name in grid]
    comparison = hold_together(runs, methods)
    rows = write(runs, comparison)
    # NaN is not JSON.
    plain = [{key: None if value != value else value for key, value in row.model_dump().items()} for row in rows]
    return stage.Result((table(rows, comparison, paths.COMPARISON),), record=plain)
