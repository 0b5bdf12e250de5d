"""What unlabelled images bring on real photographs: methods against labels alone and the ceiling, on published-style splits.

    python benchmarks/evidence.py --data ../shared/data --work ../evidence --cells cells.txt [--out FILE] [--workers 1]
    python benchmarks/evidence.py --show

A cell is one line `data split run seed steps [on]`: `msrc21 seed0/1_8 s4mc:s4mc.alpha_end=0.2 0 1000`. `run` is as in
benchmarks/seeds.py, or s4mc-paper for the published form; `on` is val (the default: choices are made there) or test (for
the report, once). Each data folder holds images/, masks/, classes.txt, val.txt, test.txt and
splits/SPLIT/{labeled,unlabeled}.txt.

Each data set and split gets a project of its own below --work, made once by the pipeline's own stages. A finished cell is
a row of the output file and is not repeated, so the command can be stopped and given again; with --workers several
processes of one thread each take the cells in order. A cell of 1,000 steps takes 5 minutes of one core for labels alone
and 11 for FixMatch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import seeds
from pipeline import config, paths
from pipeline.storage import atomic, manifest
from training.engine.data import Images
from training.split_data import SplitData

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks/results/evidence.json"


# The published form has a name of its own in the rows, whatever the shipped settings become.
PUBLISHED = {"s4mc-paper": ("s4mc", {"s4mc.preset": "paper", "s4mc.alpha": "0.4", "s4mc.alpha_end": "0.0"})}


class Cell(NamedTuple):
    """One training: `run` is a method, perhaps with settings after a colon; `on` the images that judge it."""

    data: str
    split: str
    run: str
    seed: int
    steps: int
    on: str

    @property
    def method(self) -> str:
        return self.run.partition(":")[0]

    @property
    def settings(self) -> dict[str, str]:
        """The settings that the run changes, as given."""
        pairs = self.run.partition(":")[2].split(",")
        return dict(pair.split("=", 1) for pair in pairs if pair)

    @property
    def trained(self) -> str:
        """The run as `seeds.variant` takes it."""
        method, fixed = PUBLISHED.get(self.method, (self.method, {}))
        return f"{method}:{','.join(f'{name}={value}' for name, value in {**fixed, **self.settings}.items())}"

    @property
    def named(self) -> dict[str, Any]:
        """What tells this cell from others, as columns of its row."""
        kept = self._asdict()
        del kept["run"]
        return {**kept, "method": self.method, "settings": self.settings}


def parse(text: str) -> list[Cell]:
    """The cells of a file, one a line; blank lines and those that begin with # do not count.

    Raises:
        ValueError: a line that is no cell, by its number.
    """
    cells = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) not in (5, 6) or not (words[3].isdigit() and words[4].isdigit()):
            raise ValueError(f"line {number}: {line.strip()!r} is not `data split run seed steps [on]`")
        on = words[5] if len(words) == 6 else "val"
        if on not in ("val", "test"):
            raise ValueError(f"line {number}: a cell is judged on val or test, not on {on!r}")
        cells.append(Cell(words[0], words[1], words[2], int(words[3]), int(words[4]), on))
    return cells


def missing(cells: list[Cell], rows: list[dict[str, Any]]) -> list[Cell]:
    """The cells that have no row yet, in order, each once."""
    return [cell for cell in dict.fromkeys(cells) if not any(cell.named.items() <= row.items() for row in rows)]


def prepare(cell: Cell, data: Path, work: Path) -> Path:
    """The project folder of the cell's data set and split, pulled and split on first use."""
    project = work / cell.data / cell.split
    if (project / paths.SPLIT_SUMMARY).is_file():
        return project
    project.mkdir(parents=True, exist_ok=True)

    lists = f"splits/{cell.split}"
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["data"] |= {"source": "folder", "path": str((data / cell.data).resolve()), "classes": "classes.txt"}
    settings["data"]["lists"] = {
        "labelled": f"{lists}/labeled.txt", "unlabelled": f"{lists}/unlabeled.txt", "val": "val.txt", "test": "test.txt"
    }  # fmt: skip
    settings["ingest"]["near_duplicate_bits"] = None  # the lists decide, not how alike two frames are
    (project / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    for name in ("dumps.yaml", "labels.yaml"):
        shutil.copy(ROOT / name, project / name)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for stage in (["pull"], ["ingest", "base"], ["index"], ["split"]):
        command = [sys.executable, "-m", "marginalia", "stage", *stage]
        subprocess.run(command, cwd=project, env=environment, check=True, stdout=subprocess.DEVNULL)
    return project


def train_and_score(cell: Cell, project: Path) -> dict[str, Any]:
    """The cell's row. Run in a process of its own: it works in the project's folder."""
    os.chdir(project)
    torch.set_num_threads(1)
    params = seeds.variant(config.load(), cell.trained, cell.seed)
    # A schedule has its length; validations on the way are not paid for.
    params = params.model_copy(
        update={"train": params.train.model_copy(update={"steps": cell.steps, "val_every": cell.steps})}
    )
    rows = manifest.read(paths.SPLIT_MANIFEST)
    data = SplitData.read(rows, atomic.read_json(paths.SPLIT_SUMMARY))

    began = time.process_time()
    model, history = seeds.fit(params, data, " ".join(map(str, cell)))
    seconds = time.process_time() - began

    judged = [row for row in rows if row.split == cell.on]
    images = Images(judged, params.input, ignore=data.ignore, max_pixels=params.ingest.max_pixels)
    counts = seeds.measure(model, images, data.classes, data.ignore, params.input.stride)
    last = history[-1]
    return {
        **cell.named,
        "labels": sum(row.split == "labelled" for row in rows),
        **seeds.told(counts, data.classes),
        "cpu_s": round(seconds, 1),
        **{name: last.get(name) for name in ("kept", "precision")},
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's commit, with + where tracked files were changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as they are kept, by data set and split."""
    columns = (
        "data",
        "labels",
        "split",
        "method",
        "settings",
        "seed",
        "steps",
        "on",
        "miou",
        "kept",
        "precision",
        "cpu_s",
    )
    shown = Table(*columns, title="mIoU in percent, EMA teacher of the last step")
    for row in sorted(rows, key=lambda row: (row["data"], row["split"], row["on"], row["steps"], row["miou"])):
        settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        values = {**row, "settings": settings}
        cells = [values.get(name) for name in columns]
        shown.add_row(*("-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in cells))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the data sets")
    parser.add_argument("--work", type=Path, help="where the projects are made")
    parser.add_argument("--cells", type=Path, help="a file of cells, one a line")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the rows that there are, train nothing")
    arguments = parser.parse_args()

    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    if not arguments.show:
        if None in (arguments.data, arguments.work, arguments.cells):
            parser.error("--data, --work and --cells say what to train; or give --show")
        cells = missing(parse(arguments.cells.read_text()), kept["rows"])
        projects = [prepare(cell, arguments.data, arguments.work) for cell in cells]
        # spawn, and one task a process: a training changes the working folder and leaves memory behind.
        with ProcessPoolExecutor(arguments.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
            waiting = [pool.submit(train_and_score, *task) for task in zip(cells, projects, strict=True)]
            for done in as_completed(waiting):
                kept["rows"].append(done.result())
                atomic.write_json(arguments.out, kept)  # after each: a stop costs the cells under way alone
    Console(width=160).print(table(kept["rows"]))


if __name__ == "__main__":
    main()
