"""`marginalia headroom`: can more images pay at all? Scores with a quarter, a half and all of the labels, as a curve.

Unlabelled images stand in for labels that one does not have. Where twice the labels bring nothing, they can bring nothing
either, and better labels, other classes or a larger network are what is missing. Judged on val, never on test.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from pipeline import console, paths, stage
from pipeline.config import Params
from pipeline.storage import atomic, manifest
from pipeline.storage.manifest import Row
from training import gains, train, warm_start
from training.engine import checkpoint, trainer
from training.reports import evaluation
from training.split_data import SplitData

SHARES = {"quarter": 0.25, "half": 0.5, "all": 1.0}
FEWEST = 8  # a quarter of fewer is one image


class LearningCurve(BaseModel):
    """Scores over shares of the labels; what stands in curve.json.

    Attributes:
        labels: share -> number of labelled images.
        scores: share -> seed -> mIoU on val in percent.
    """

    model_config = ConfigDict(frozen=True)

    split_hash: str
    steps: int
    labels: dict[str, int]
    scores: dict[str, dict[int, float]]

    @property
    def comparison(self) -> gains.Comparison:
        """Gains over half of the labels; all of them are the ceiling, so the headroom is what the last doubling brought."""
        return gains.compare(self.scores, baseline="half", ceiling="all")

    @property
    def next_doubling(self) -> float:
        """mIoU that twice the labels would bring where the curve goes on flattening (or rising evenly) as it did; >= 0."""
        means = {row.method: row.miou for row in self.comparison.rows}
        first, last = means["half"] - means["quarter"], means["all"] - means["half"]
        if last <= 0:
            return 0.0
        return last * min(1.0, last / first) if first > 0 else last

    @property
    def verdict(self) -> str:
        """Whether more images can pay, in one sentence."""
        held = self.comparison
        found = f"from {self.labels['half']} to {self.labels['all']} labels: {held.headroom or 0.0:+.2f} mIoU"
        match held.has_headroom:
            case None:
                return f"{found}; one seed has no scatter to hold it against, give --seed 0 --seed 1"
            case False:
                return f"{found}, scatter of seeds {held.scatter or 0.0:.2f}: no headroom here, more images hardly pay"
        return (
            f"{found}, scatter of seeds {held.scatter:.2f}: more images can pay; about {self.next_doubling:+.1f} for "
            f"{2 * self.labels['all']} labels, and less for unlabelled images"
        )


def subset(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """A share of the rows, drawn by the seed; the smaller share of one seed lies in the larger."""
    drawn = np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))]
    return [rows[i] for i in sorted(drawn)]


def score(params: Params, data: SplitData, name: str) -> float:
    """Train on the labels of `data` alone, from the encoder's own weights; mIoU on val in percent after the last step."""
    ready = train.prepare(params, data, None)
    identity = {**ready.task.identity, "labelled": warm_start.short_ids({row.id for row in data.labelled})}
    task = replace(ready.task, identity=identity)
    with console.bar(name, params.train.steps) as bar:
        result = trainer.Trainer(task, params.train, on_log=lambda event: bar.reach(event.step)).train()
    checkpoint.discard(checkpoint.folder(identity))
    return result.history[-1]["val_miou"]


def measure(params: Params, seeds: Sequence[int], out: Path = paths.HEADROOM) -> LearningCurve:
    """Train with each share of the labels and each seed; finished trainings are kept in `out` and not repeated.

    Raises:
        ValueError: too few labelled images, or none in val.
    """
    data = SplitData.read(manifest.read(paths.SPLIT_MANIFEST), atomic.read_json(paths.SPLIT_SUMMARY))
    if len(data.labelled) < FEWEST:
        raise ValueError(f"headroom halves the labels twice; {len(data.labelled)} are too few, label {FEWEST} or more")
    if not data.val:
        raise ValueError("headroom is judged on val, which is empty: set split.val, or data.lists.val, in params.yaml")

    settings = params.train.model_copy(update={"method": "supervised"})
    about = {
        "params": {
            **params.model_dump(mode="json", include={"model", "input"}),
            "train": settings.model_dump(mode="json"),
        },
        "split": data.split_hash,
    }
    path = out / "runs.json"
    known = atomic.read_json(path) if path.exists() else {}
    finished = known["scores"] if known.get("about") == about else {}

    labels, scores = dict[str, int](), {name: dict[int, float]() for name in SHARES}
    for seed in seeds:
        seeded = params.model_copy(update={"train": settings.model_copy(update={"seed": seed})})
        for name, share in SHARES.items():
            rows = subset(data.labelled, share, seed)
            labels[name] = len(rows)
            key = f"{name} {seed}"
            if key not in finished:
                finished[key] = score(seeded, replace(data, labelled=rows), f"{len(rows)} labels, seed {seed}")
                atomic.write_json(path, {"about": about, "scores": finished})
            scores[name][seed] = finished[key]
    return LearningCurve(split_hash=data.split_hash, steps=settings.steps, labels=labels, scores=scores)


def draw(curve: LearningCurve, path: Path) -> None:
    """mIoU over the number of labels: a dot a training, a line through the means, and the next doubling as dashes."""
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    means = {row.method: row.miou for row in curve.comparison.rows}
    counts = [curve.labels[name] for name in SHARES]

    for name, by_seed in curve.scores.items():
        axes.plot([curve.labels[name]] * len(by_seed), list(by_seed.values()), "o", color="C0", alpha=0.5)
    axes.plot(counts, [means[name] for name in SHARES], color="C0")
    last = means["all"]
    axes.plot(
        [counts[-1], 2 * counts[-1]], [last, last + curve.next_doubling], "--", color="C0", label="if it goes on so"
    )

    axes.set_xscale("log", base=2)
    ticks = [*counts, 2 * counts[-1]]
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.set(xlabel="labelled images", ylabel="val mIoU (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    evaluation.save(figure, path)


def table(curve: LearningCurve) -> Table:
    seeds = list(curve.scores["all"])
    columns = ("labels", "images", *(f"seed {seed}" for seed in seeds), "mean", "gain over half")
    shown = Table(*columns, title=f"val mIoU (%), labels alone, {curve.steps} steps", box=box.SIMPLE_HEAD)
    for row in curve.comparison.rows:
        values = [f"{curve.scores[row.method][seed]:.2f}" for seed in seeds]
        gain = "-" if row.gain is None else f"{row.gain:+.2f}"
        shown.add_row(row.method, str(curve.labels[row.method]), *values, f"{row.miou:.2f}", gain)
    return shown


def run(params: Params, seeds: Sequence[int], out: Path = paths.HEADROOM) -> stage.Result:
    """Measure, and write curve.json and curve.png under `out`."""
    curve = measure(params, seeds, out)
    record = {**curve.model_dump(mode="json"), "verdict": curve.verdict}
    atomic.write_json(out / "curve.json", record)
    draw(curve, out / "curve.png")
    return stage.Result((table(curve), f"{curve.verdict}; {out}/curve.png, curve.json"), record=record)
