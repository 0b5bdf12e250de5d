"""What labelling the suggested images is worth: a simulated team, whose hidden masks answer, against random choice.

Run in a project whose split exists and whose unlabelled images have hidden masks (`dvc repro split`):
    python benchmarks/label_loop.py --out label_loop.json [--seeds 0 1 2] [--rounds 6] [--strategies chosen random]
Each seed draws its first images; both strategies share them and their model. A round trains on the labels there are,
supervised, from the encoder's own weights; scores the test split at working size (`--long-side`, not the images' own);
and lets `ranking.choose`, or chance, name the next images. The settings are params.yaml's but for what the options say.
Finished trainings are kept in the file and not repeated; the curve is drawn beside it. On one core a round of 150 steps
takes about two minutes.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import seeds
from pipeline import config, paths
from pipeline.ingest import split
from pipeline.labels import ranking
from pipeline.storage import atomic, manifest
from pipeline.storage.predictions import PredictionPool
from training import inference, predict
from training.engine.data import Images
from training.models import segmenter
from training.reports import evaluation
from training.split_data import SplitData

Rows = Sequence[manifest.Row]
SHORT = 16  # hex digits of an id kept in the file


def chosen(seen: PredictionPool, frequency_K: Any, count: int, seed: int) -> list[int]:
    return [choice.index for choice in ranking.choose(seen, frequency_K, count)]


def doubtful(seen: PredictionPool, frequency_K: Any, count: int, seed: int) -> list[int]:
    """The most doubtful ones, however alike."""
    return ranking.shortlist(seen, frequency_K, count)[:count]


def random(seen: PredictionPool, frequency_K: Any, count: int, seed: int) -> list[int]:
    free = np.flatnonzero(seen.split == "unlabelled")
    order = sorted(free, key=lambda i: str(seen.id[i]))
    draw = np.random.default_rng([seed, int((seen.split == "labelled").sum())])
    return [int(i) for i in draw.choice(order, min(count, len(order)), replace=False)]


STRATEGIES: dict[str, Callable[[PredictionPool, Any, int, int], list[int]]] = {
    "chosen": chosen, "random": random, "doubtful": doubtful,
}  # fmt: skip


class Loop:
    """One project's images and settings; `turn` is one round of it."""

    def __init__(self, params: config.Params, rows: Rows, summary: dict[str, Any], add: int) -> None:
        self.params, self.summary, self.add = params, summary, add
        self.free = {r.id: r for r in rows if r.split in predict.POOL_SPLITS and r.mask_shard is not None}
        test = [row for row in rows if row.split == "test"]
        self.test = Images(test, params.input, ignore=summary["ignore"], max_pixels=params.ingest.max_pixels)

    def first(self, seed: int, count: int) -> list[str]:
        return sorted(np.random.default_rng(seed).choice(sorted(self.free), count, replace=False).tolist())

    def turn(self, seed: int, labelled: Sequence[str], strategies: Sequence[str], name: str) -> dict[str, Any]:
        """Train on `labelled`, score, and what each strategy would label next (ids)."""
        classes, ignore, policy = self.summary["classes"], self.summary["ignore"], self.params.input
        known = [replace(self.free[id], split="labelled") for id in labelled]
        hashes = dict.fromkeys(("split_hash", "data_hash"), "")
        data = SplitData.read(known, {"classes": classes, "ignore": ignore, **hashes})
        settings = self.params.train.model_copy(update={"seed": seed})
        model, _ = seeds.fit(self.params.model_copy(update={"train": settings}), data, name)
        found = seeds.told(seeds.measure(model, self.test, classes, ignore, policy.stride), classes)
        seen = self.survey(model, known)
        counts_K = split.pixels(known, len(classes), self.params.ingest.max_pixels)[0]
        share_K = counts_K / counts_K.sum()
        following = {s: [str(seen.id[i]) for i in STRATEGIES[s](seen, share_K, self.add, seed)] for s in strategies}
        return found | {"labelled": list(labelled), "next": following}

    def survey(self, model: segmenter.Segmenter, known: Rows) -> PredictionPool:
        policy, ids = self.params.input, {row.id for row in known}
        rest = [replace(row, split="unlabelled") for id, row in self.free.items() if id not in ids]
        batches = inference.plan_batches([*known, *rest], policy, self.params.evaluate.batch)
        columns = predict.survey(model, batches, policy, self.params.ingest.max_pixels)
        return PredictionPool(**columns, classes=np.array([c["name"] for c in self.summary["classes"]]))


def play(
    loop: Loop, seed: int, first: int, rounds: int, strategies: Sequence[str], runs: dict[str, Any], keep: Any
) -> None:
    """All rounds of one seed; `runs` gains "SEED STRATEGY COUNT" (and "SEED first COUNT", which all share)."""

    def done(key: str, labelled: Callable[[], Sequence[str]], wanted: Sequence[str]) -> dict[str, Any]:
        if key not in runs:
            whole = loop.turn(seed, labelled(), wanted, key)
            shorten = {name: [id[:SHORT] for id in ids] for name, ids in whole["next"].items()}
            runs[key] = whole | {"labelled": [id[:SHORT] for id in whole["labelled"]], "next": shorten}
            keep()
        return dict(runs[key])

    whole = {id[:SHORT]: id for id in loop.free}
    begin = done(f"{seed} first {first}", lambda: loop.first(seed, first), list(STRATEGIES))
    for strategy in strategies:
        now = begin
        for number in range(1, rounds + 1):
            ids = [*now["labelled"], *now["next"][strategy]]
            now = done(
                f"{seed} {strategy} {first + number * loop.add}", lambda ids=ids: [whole[i] for i in ids], [strategy]
            )


def curve(runs: dict[str, Any], strategy: str, seeds_: Sequence[int], counts: Sequence[int]) -> list[list[float]]:
    """mIoU per seed and count."""
    named = lambda count: "first" if count == counts[0] else strategy  # noqa: E731
    return [[runs[f"{seed} {named(count)} {count}"]["miou"] for count in counts] for seed in seeds_]


def show(
    runs: dict[str, Any], strategies: Sequence[str], seeds_: Sequence[int], counts: Sequence[int], title: str
) -> None:
    table = Table("labelled images", *map(str, counts), "mean", title=f"{title}, mean over {len(seeds_)} seeds (sd)")
    for strategy in strategies:
        by_count = list(zip(*curve(runs, strategy, seeds_, counts), strict=True))
        spread = [f" ({statistics.stdev(v):.2f})" if len(v) > 1 else "" for v in by_count]
        cells = [f"{statistics.mean(v):.2f}{s}" for v, s in zip(by_count, spread, strict=True)]
        later = statistics.mean(statistics.mean(v) for v in by_count[1:] or by_count)
        table.add_row(strategy, *cells, f"{later:.2f}")
    Console(width=max(100, 24 + 14 * len(counts))).print(table)


def draw(
    runs: dict[str, Any], strategies: Sequence[str], seeds_: Sequence[int], counts: Sequence[int], title: str, out: Path
) -> None:
    """Mean over seeds as a line, every seed as a thin one."""
    of = {strategy: curve(runs, strategy, seeds_, counts) for strategy in strategies}
    means = {name: (counts, np.mean(values, axis=0)) for name, values in of.items()}
    figure = evaluation.curves_figure(means, "labelled images", "test mIoU (%)", title)
    axes = figure.axes[0]
    for line, values in zip(list(axes.lines), of.values(), strict=True):
        for row in values:
            axes.plot(counts, row, color=line.get_color(), lw=0.7, alpha=0.5)
    evaluation.save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON; the curve is drawn beside it as PNG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=["chosen", "random"])
    parser.add_argument("--first", type=int, default=20)
    parser.add_argument("--add", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--long-side", type=int, default=256)
    arguments = parser.parse_args()
    params = config.load()
    changes = {
        "method": "supervised",
        "steps": arguments.steps,
        "batch_labelled": 4,
        "crop": (128, 160),
        "warmup_steps": 0,
    }
    changes |= {"val_every": arguments.steps, "checkpoint_every": arguments.steps}
    settings = config.Train.model_validate(params.train.model_dump() | changes)
    view = config.Input(long_side=arguments.long_side, stride=params.input.stride)
    params = params.model_copy(update={"train": settings, "input": view})
    summary = atomic.read_json(paths.SPLIT_SUMMARY)
    loop = Loop(params, manifest.read(paths.SPLIT_MANIFEST), summary, arguments.add)
    about = {
        "train": settings.model_dump(mode="json", exclude={"seed"}), "input": view.model_dump(), "first": arguments.first,
        "add": arguments.add, "model": params.model.model_dump(), "split_hash": summary["split_hash"],
        "candidates": len(loop.free), "test_images": len(loop.test), "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    kept = atomic.read_json(arguments.out) if arguments.out.exists() else {}
    runs = kept["runs"] if kept.get("about") == about else {}
    last = arguments.first + arguments.rounds * arguments.add
    if last > len(loop.free):
        parser.error(f"{last} labels are wanted at the end, and {len(loop.free)} training images have masks")
    for seed in arguments.seeds:
        play(
            loop, seed, arguments.first, arguments.rounds, arguments.strategies, runs,
            lambda: atomic.write_json(arguments.out, {"about": about, "runs": runs}),
        )  # fmt: skip
    counts = list(range(arguments.first, last + 1, arguments.add))
    title = f"test mIoU (%) at long side {arguments.long_side}, {arguments.steps} steps"
    show(runs, arguments.strategies, arguments.seeds, counts, title)
    draw(runs, arguments.strategies, arguments.seeds, counts, title, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
