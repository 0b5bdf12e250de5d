"""Methods against each other over seeds, same data, same steps: scores of the teacher after the last step.

Run in a project whose split exists (after `make demo`):
    python benchmarks/seeds.py [--runs supervised ceiling fixmatch s4mc s4mc:s4mc.alpha_end=0.2] [--seeds 0 1 2]
        [--on val] [--out FILE] [--start champions/ID/student.safetensors]
The settings are params.yaml's; a run changes train.method, train.seed and what follows its colon, and nothing else. With
--start all begin with those weights, as a retraining does: s4mc against fixmatch, say.
Gains are over labels alone of the same seed; `ceiling` learns the hidden labels of the unlabelled images, and the share is
that of its gain. Choose settings with --on val, and look at test once.
With --out, finished runs are kept in the file and not repeated. On 2 cores a demo run takes 5 to 8 minutes.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import config, console, paths
from pipeline.champions import metrics as scores
from pipeline.storage import atomic, manifest
from training import gains, inference, metrics, train
from training.engine import trainer
from training.engine.data import Images
from training.models import segmenter
from training.split_data import SplitData

# What is shown as a mean over seeds -> its heading.
SHOWN = {"kept": "kept", "precision": "right", "cpu_seconds": "cpu s"}


def variant(params: config.Params, run: str, seed: int) -> config.Params:
    """`s4mc:s4mc.alpha_end=0.2,steps=400` -> params with these train settings, checked like params.yaml's."""
    method, _, rest = run.partition(":")
    changes = dict(pair.split("=", 1) for pair in rest.split(",") if pair)
    overlay = config.nested({"method": method, "seed": seed, **changes})
    settings = config.merge(params.train.model_dump(), overlay)
    return params.model_copy(update={"train": config.Train.model_validate(settings)})


def fit(
    params: config.Params, data: SplitData, name: str, start: Path | None = None
) -> tuple[segmenter.Segmenter, list[dict[str, float]]]:
    """Train once, from the weights in `start` if given; the teacher of the last step in eval mode, and the history."""
    ready = train.prepare(params, data, start)
    with tempfile.TemporaryDirectory() as work, console.bar(name, params.train.steps) as bar:
        fit = trainer.Trainer(ready.task, params.train, work=Path(work), on_log=lambda event: bar.reach(event.step))
        result = fit.train()
    model = ready.task.model
    assert isinstance(model, segmenter.Segmenter)
    model.load_state_dict(result.teacher)
    return model.eval(), result.history


def measure(model: segmenter.Segmenter, images: Images, classes: list[dict[str, Any]], ignore: int, stride: int) -> Any:
    """K x K counts over `images` at working size."""
    total = np.zeros((len(classes),) * 2, np.int64)
    for sample in (images[i] for i in range(len(images))):
        label = inference.logits_of(model, sample.image_HWC, stride).argmax(0).cpu()
        total += metrics.confusion(sample.label_HW.long(), label, len(classes), ignore).numpy()
    return total


def told(total: Any, classes: list[dict[str, Any]]) -> dict[str, Any]:
    """mIoU and IoU per class in percent."""
    iou = {c["name"]: round(100 * float(v), 2) for c, v in zip(classes, scores.iou(total), strict=True)}
    return {"miou": round(float(scores.miou(total)), 3), "iou": iou}


def score(
    params: config.Params, judged: list[manifest.Row], data: SplitData, name: str, start: Path | None
) -> dict[str, Any]:
    """Train once; scores on the rows `judged` at working size in percent, and what the pseudo-labels did at the end."""
    began, cpu_began = time.monotonic(), time.process_time()
    model, history = fit(params, data, name, start)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began

    images = Images(judged, params.input, ignore=data.ignore, max_pixels=params.ingest.max_pixels)
    last = history[-1]
    found = {"kept": last.get("kept"), "precision": last.get("precision"), "val_miou": last["val_miou"]}
    return {
        **told(measure(model, images, data.classes, data.ignore, params.input.stride), data.classes),
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds_per_step": round(seconds / params.train.steps, 3),
        **{k: None if v is None or math.isnan(v) else round(v, 4) for k, v in found.items()},
    }


def show(results: dict[str, dict[str, Any]], runs: list[str], seeds: list[int], judged_on: str) -> None:
    scores = {run: {seed: results[f"{run} {seed}"]["miou"] for seed in seeds} for run in runs}
    comparison = gains.compare(scores, gains.BASELINE if gains.BASELINE in scores else runs[0])

    columns = ("run", *(f"seed {s}" for s in seeds), "mean", "sd", "gain", "/ sd", "share", *SHOWN.values())
    title = f"{judged_on} mIoU (%), teacher, last step; the last {len(SHOWN)} columns are means over seeds"
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for row in comparison.rows:
        of = [results[f"{row.method} {seed}"] for seed in seeds]
        means = ["-" if of[0][k] is None else f"{statistics.mean(r[k] for r in of):.2f}" for k in SHOWN]
        values = [f"{scores[row.method][seed]:.2f}" for seed in seeds]
        # "/ sd" is the gain over the scatter pooled over all runs, "share" that of the headroom closed.
        of_seeds = (row.miou, row.scatter, row.gain, row.gain_to_scatter, row.share)
        table.add_row(row.method, *values, *("-" if v is None else f"{v:.2f}" for v in of_seeds), *means)
    table.caption = f"gain over {comparison.baseline}; {comparison.verdict}"
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["supervised", "ceiling", "fixmatch", "s4mc"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--on", choices=("val", "test"), default="test", help="the images that judge")
    parser.add_argument("--start", type=Path, help="a student's weights; default: the encoder's own")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    params = config.load()
    rows = manifest.read(paths.SPLIT_MANIFEST)
    data = SplitData.read(rows, atomic.read_json(paths.SPLIT_SUMMARY))
    kept = atomic.read_json(arguments.out) if arguments.out and arguments.out.exists() else {}
    about = {
        "train": params.train.model_dump(mode="json", exclude={"method", "seed"}), "split_hash": data.split_hash,
        "on": arguments.on, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "start": atomic.sha256(arguments.start) if arguments.start else None,
    }  # fmt: skip
    if kept and kept["about"] != about:
        parser.error(f"{arguments.out} holds runs of other settings or data; name another file, or remove it")
    judged = [row for row in rows if row.split == arguments.on]
    results = kept["runs"] if kept else {}
    for seed in arguments.seeds:
        for run in arguments.runs:
            if (name := f"{run} {seed}") not in results:
                results[name] = score(variant(params, run, seed), judged, data, name, arguments.start)
            if arguments.out:
                atomic.write_json(arguments.out, {"about": about, "runs": results})
    show(results, arguments.runs, arguments.seeds, arguments.on)


if __name__ == "__main__":
    main()
