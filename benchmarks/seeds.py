"""Methods against each other over seeds, same data, same steps: test mIoU of the teacher after the last step.

Run in a project whose split exists (after `make demo`): python benchmarks/seeds.py [--methods ...] [--seeds ...] [--out FILE]
The settings are params.yaml's; only train.method and train.seed change. On 2 cores a demo run takes 5 to 8 minutes.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import config, files, manifest, progress
from training import engine, train
from training.data import Images


def score(params: config.Params, rows: list[manifest.Row], data: train.Data) -> float:
    """Train once and return the test mIoU in percent, at working size."""
    ready = train.prepare(params, data, None)
    with tempfile.TemporaryDirectory() as work, progress.bar(f"{params.train.method} {params.train.seed}", 1) as bar:
        result = engine.fit(
            ready.model, ready.batches, ready.method, params.train,
            n_classes=len(data.classes), ignore=data.ignore, identity=ready.identity, validate=ready.validate,
            work=Path(work),
        )  # fmt: skip
        bar.advance()
    ready.model.load_state_dict(result.teacher)
    test = Images(
        [row for row in rows if row.split == "test"],
        params.input,
        ignore=data.ignore,
        max_pixels=params.ingest.max_pixels,
    )
    judge = train.validator(test, len(data.classes), params.input.stride, data.ignore, limit=len(test))
    return float(judge(ready.model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["supervised", "fixmatch", "s4mc"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    params = config.load()
    rows = manifest.read(train.MANIFEST)
    data = train.Data.read(rows, files.read_json(train.SUMMARY))
    found: dict[str, list[float]] = {}
    table = Table("method", *(f"seed {s}" for s in arguments.seeds), "mean", "sd", title="test mIoU (%), last step")
    for method in arguments.methods:
        found[method] = []
        for seed in arguments.seeds:
            changed = params.train.model_copy(update={"method": method, "seed": seed})
            found[method].append(score(params.model_copy(update={"train": changed}), rows, data))
        values = found[method]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        table.add_row(method, *(f"{v:.2f}" for v in values), f"{statistics.mean(values):.2f}", f"{spread:.2f}")
    Console().print(table)
    if arguments.out:
        files.write_json(
            arguments.out,
            {
                "miou": found, "seeds": arguments.seeds, "steps": params.train.steps, "split_hash": data.split_hash,
                "threads": torch.get_num_threads(), "torch": torch.__version__,
            },
        )  # fmt: skip


if __name__ == "__main__":
    main()
