"""Stage `train`: split manifest -> student weights and what was measured on the way."""

import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from pipeline import paths
from pipeline.config import Params
from pipeline.records.training import GivenLabels, TrainingRecord, TrainingSummary
from pipeline.stage import Result, note, warn
from pipeline.storage import atomic, manifest
from pipeline.storage.manifest import Row
from training import inference, warm_start
from training.engine import checkpoint, distributed, source_identity, trainer
from training.engine.data import Batches, Images
from training.engine.live_log import LiveLog
from training.engine.rare_crops import rare_crops
from training.engine.validation import Validator
from training.methods import pseudo_labels, registry, s4mc
from training.methods.pseudo_labels import Given
from training.models import segmenter
from training.split_data import SplitData


@dataclass(frozen=True)
class Prepared:
    """Everything that the trainer needs, and what the outputs say about it.

    start_at: weights that the training begins with, if any. seen: short ids of the images that it learns from.
    given: what was measured of pseudo-labels from outside; None: none were given.
    """

    task: trainer.Task
    start_at: Path | None
    seen: str
    precision_on: str
    given: GivenLabels | None


def prepare(
    params: Params, data: SplitData, start_at: Path | None, us: distributed.Ranks = distributed.ALONE
) -> Prepared:
    """Networks, samples and method for `data`; wires, decides nothing but what measures the pseudo-labels."""
    settings, n_classes = params.train, len(data.classes)
    if settings.method == "ceiling":
        data = data.with_hidden_labels()
    labelled = images_of(data.labelled, params, data.ignore)
    pool = images_of(data.pool(), params, data.ignore)

    torch.manual_seed(settings.seed)
    model = segmenter.build(params.model, n_classes)
    seen = {row.id for row in (*data.labelled, *data.unlabelled)}
    if start_at is not None:
        seen |= warm_start.load_into(model, start_at, data.classes, data.judged)

    method = registry.build(
        settings,
        n_classes=n_classes,
        total=settings.steps - settings.warmup_steps,
        epoch_steps=max(1, math.ceil(len(pool) / (settings.batch_unlabelled * us.world))),
        table_K=class_table(labelled, n_classes, data.ignore) if registry.needs_table(settings) else None,
    )
    given = None
    if settings.pseudo_labels is not None:
        given = pseudo_labels.given(settings.pseudo_labels, images_of(data.unlabelled, params, data.ignore), n_classes)
        if us.rank == 0:
            tell(given, settings.pseudo_labels)

    sizes = settings.batch_labelled, settings.batch_unlabelled
    task = trainer.Task(
        model,
        method,
        Batches(labelled, pool, sizes, settings.seed, us.rank, us.world, given.images if given else None),
        n_classes=n_classes,
        ignore=data.ignore,
        identity=identity_of(params, data, start_at, us.world, given.digest if given else None),
        validate=Validator(images_of(data.val, params, data.ignore), n_classes, params.input.stride, data.ignore, us),
        stride=params.input.stride,
        rare=rare_crops(settings.rare_crops, labels_of(labelled), n_classes) if settings.rare_crops else None,
    )
    precision_on = "hidden labels" if data.has_hidden_labels else "labels it trains on"
    return Prepared(task, start_at, warm_start.short_ids(seen), precision_on, given.measured if given else None)


def tell(given: Given, folder: Path) -> None:
    """What the masks of `folder` are worth, before the first step."""
    found = given.measured
    if given.refused:
        warn(f"{found.refused} pseudo-labels are not used, the first: {given.refused[0]}")
    right = "nothing to measure them against: no unlabelled image has a hidden label"
    if found.precision is not None and found.weighted_precision is not None:
        right = f"{found.precision:.1%} of the labels are right, {found.weighted_precision:.1%} by confidence"
    note(f"pseudo-labels of {folder}: {found.images} images, {found.coverage:.1%} of their pixels; {right}")


def images_of(rows: Sequence[Row], params: Params, ignore: int) -> Images:
    return Images(rows, params.input, ignore=ignore, max_pixels=params.ingest.max_pixels)


def identity_of(
    params: Params, data: SplitData, start_at: Path | None, world: int, given: str | None = None
) -> dict[str, Any]:
    """Everything that shapes a run: a checkpoint with another identity is not continued. given: digest of pseudo-labels."""
    return {
        "params": params.model_dump(mode="json", include={"model", "input", "train"}),
        "split": data.split_hash,
        "data": data.data_hash,
        "labels": data.label_hash,
        "start": atomic.sha256(start_at) if start_at is not None else None,
        "world": world,
        "given": given,
        "code": source_identity.digest(params.model.architecture),
        "torch": torch.__version__,
    }


def class_table(images: Images, n_classes: int, ignore: int) -> Tensor:
    """S4MC's neighbour table from the labelled masks alone (preset ref_a)."""
    return s4mc.neighbour_table(labels_of(images), n_classes, ignore=ignore).float()


def labels_of(images: Images) -> Iterator[Tensor]:
    """label_HW of each image, int32 with ignore, at working size."""
    return (images[i].label_HW for i in range(len(images)))


def describe(
    params: Params, data: SplitData, ready: Prepared, result: trainer.Result, seconds: float
) -> TrainingSummary:
    last = result.history[-1]
    return TrainingSummary(
        method=params.train.method,
        preset=params.train.s4mc.preset,
        steps=params.train.steps,
        seed=params.train.seed,
        best_step=result.best_step,
        val_miou=_number(last.get("val_miou")),
        kept=_number(last.get("kept")),
        precision=_number(last.get("precision")),
        precision_on=ready.precision_on,
        labelled=len(ready.task.batches.labelled),
        unlabelled=len(data.unlabelled),
        pseudo_labels=ready.given,
        seconds=round(seconds, 1),
        warm_start=str(ready.start_at) if ready.start_at else None,
        torch=torch.__version__,
        machine=platform.machine(),
        device=str(inference.device()),
        split_hash=data.split_hash,
        data_hash=data.data_hash,
    )


def with_lineage(training: TrainingSummary, params: Params, split: dict[str, Any]) -> TrainingRecord:
    """The training with its settings and data, for a champion's history. split: the split's summary."""
    return TrainingRecord(
        **training.model_dump(),
        params=params.model_dump(mode="json", include={"model", "input", "train"}),
        dumps=split.get("dumps"),
        counts=split.get("counts"),
        label_hash=split.get("label_hash"),
    )


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)


def stage(params: Params) -> Result | None:
    """The stage: train, write weights and reports, print one table. Of several processes only the first writes."""
    group = distributed.connect()
    split = atomic.read_json(paths.SPLIT_SUMMARY)
    data = SplitData.read(manifest.read(paths.SPLIT_MANIFEST), split)
    began = time.monotonic()
    ready = prepare(params, data, warm_start.champion(), group.ranks)
    if group.ranks.rank:
        trainer.Trainer(ready.task, params.train, group=group).train()
        return None

    for other in checkpoint.unfinished(ready.task.identity):
        warn(str(other))
    with LiveLog(f"train {params.train.method}", params.train.steps, data.classes) as live:
        result = trainer.Trainer(ready.task, params.train, group=group, on_log=live).train()

    training = describe(params, data, ready, result, time.monotonic() - began)
    save_students(params, data, ready, result, training)
    atomic.write_json(paths.TRAINING, with_lineage(training, params, split).model_dump(mode="json"))
    # Beside the history, where DVC reads it as a metric.
    atomic.write_json(paths.TRAIN_SCORES, training.model_dump(mode="json"))
    atomic.write_text(paths.HISTORY, history_lines(result.history))
    checkpoint.discard(checkpoint.folder(ready.task.identity))
    return Result((table(training),), record=training.model_dump(mode="json"))


def save_students(
    params: Params, data: SplitData, ready: Prepared, result: trainer.Result, training: TrainingSummary
) -> None:
    """The last teacher and, if there was a validation, the best one, each with its description."""
    shared = {
        **training.model_dump(mode="json"),
        "classes": data.classes,
        "ignore": data.ignore,
        "params": params.model_dump(mode="json", include={"model", "input"}),
        "trained_on": ready.seen,
        **input_scaling(ready.task.model),
    }
    segmenter.save(paths.STUDENT_WEIGHTS, result.teacher, {**shared, "weights": "teacher, last step"})
    if result.best is not None:
        best = {**shared, "weights": f"teacher, step {result.best_step}, best on val"}
        segmenter.save(paths.BEST_WEIGHTS, result.best, best)


def input_scaling(model: nn.Module) -> dict[str, Any]:
    """How the network scales its input, for its description: weights beside which it was noted may be gone later."""
    if not isinstance(model, segmenter.Segmenter):
        return {}
    mean, std = model.scaling
    return {"input_scaling": {"mean": list(mean), "std": list(std)}}


def history_lines(history: Sequence[dict[str, float]]) -> str:
    """A line of JSON for each logged step, in the order of the terms; JSON has no NaN, so what was not measured is left out."""
    rows = ({key: value for key, value in row.items() if math.isfinite(value)} for row in history)
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(training: TrainingSummary) -> Table:
    columns = ("labelled", "unlabelled", "steps", "val_miou", "best_step", "kept", "precision")
    title = f"train: {training.method} ({training.preset}), {training.seconds} s on {training.device}"
    shown = Table(title=title)
    for column in columns:
        shown.add_column(column.replace("_miou", " mIoU").replace("_", " "), justify="right")
    values = [getattr(training, column) for column in columns]
    shown.add_row(*("-" if value is None else str(value) for value in values))
    shown.caption = f"precision of kept pseudo-labels against {training.precision_on}"
    if (given := training.pseudo_labels) is not None:
        right = "-" if given.weighted_precision is None else f"{given.weighted_precision:.3f}"
        shown.caption += f"; {given.images} pseudo-labels from outside, precision by confidence {right}"
    return shown


def run(params: Params) -> Result | None:
    """The stage, as the command line runs it: where the device's memory is full it says what to lower.

    Raises:
        trainer.Interrupted: SIGTERM; the same command resumes. Under torchrun the exit code is torchrun's own, 1.
    """
    try:
        return stage(params)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"the device's memory is full ({error}). Set train.precision: bf16, train.accumulate: 2, or a smaller "
            "train.crop or batch; presets/ states what its settings need"
        ) from error
