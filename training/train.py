"""Stage `train`: split manifest -> student weights, curves and previews."""

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from pipeline import config, console, paths
from pipeline.champions import metrics as scores
from pipeline.config import Params
from pipeline.stage import Result, warn
from pipeline.storage import atomic, manifest
from pipeline.storage.manifest import Row
from training import inference, metrics, warm_start
from training.engine import checkpoint, distributed, trainer
from training.engine.data import Batches, Images
from training.methods import registry, s4mc
from training.methods.pseudo_labels import relabel
from training.models import segmenter
from training.reports import curves

# They look at weights and cannot change a run's: editing them must not cost a half-finished run. One that is missing here
# costs no more than that.
ONLOOKERS = frozenset(
    {
        "compare",
        "confident_learning",
        "evaluate",
        "gains",
        "headroom",
        "predict",
        "reports/curves",
        "reports/evaluation",
        "suspects",
    }
)


@dataclass(frozen=True)
class Data:
    """Rows of the split manifest by use, and what the split says about them."""

    labelled: Sequence[Row]
    unlabelled: Sequence[Row]
    val: Sequence[Row]
    classes: list[dict[str, Any]]
    ignore: int
    split_hash: str
    data_hash: str
    label_hash: str | None
    judged: frozenset[str]

    @classmethod
    def read(cls, rows: Sequence[Row], summary: dict[str, Any]) -> "Data":
        def use(name: str) -> list[Row]:
            return [row for row in rows if row.split == name]

        return cls(
            use("labelled"), use("unlabelled"), use("val"),
            summary["classes"], summary["ignore"], summary["split_hash"], summary["data_hash"],
            summary.get("label_hash"), frozenset(row.id for row in rows if row.split in ("val", "test")),
        )  # fmt: skip

    def with_hidden_labels(self) -> "Data":
        """The unlabelled images that have a mask all the same are labelled; raises ValueError where none has one."""
        hidden = [row for row in self.unlabelled if row.mask_shard is not None]
        if not hidden:
            raise ValueError(
                "method ceiling trains on the hidden labels of unlabelled images, and none has a mask; list some of the "
                "labelled images under data.lists.unlabelled, or choose another method"
            )
        bare = [row for row in self.unlabelled if row.mask_shard is None]
        return replace(self, labelled=[*self.labelled, *hidden], unlabelled=bare)


def validator(
    images: Images,
    n_classes: int,
    stride: int,
    ignore: int,
    limit: int = 128,
    us: distributed.Ranks = distributed.ALONE,
) -> Any:
    """teacher -> mIoU in percent over (at most `limit`) val images at working size; NaN without val images.

    Ranks score every world-th image each and add their counts: no image twice, none left out.
    """

    @torch.inference_mode()
    def validate(model: nn.Module) -> float:
        if not len(images):
            return math.nan
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        total = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=device)
        chosen = np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int)
        for i in chosen[us.rank :: us.world]:
            sample = images[int(i)]
            label = inference.logits_of(model, sample.image_HWC, stride).argmax(0)
            total += metrics.confusion(sample.label_HW.long().to(device), label, n_classes, ignore)
        model.train(was_training)
        return float(scores.miou(us.add(total).cpu().numpy()))

    return validate


def code_hash(architecture: str = "") -> str:
    """Digest of the source that trains and of the user's own network: a killed run is not continued by other code."""
    room = Path(__file__).parent
    sources = sorted(
        path for path in room.rglob("*.py") if path.relative_to(room).with_suffix("").as_posix() not in ONLOOKERS
    )
    # How an image is decoded and resized changes the numbers as much as the step does.
    sources += sorted((room.parent / "pipeline/imaging").rglob("*.py"))
    if ":" in architecture:
        sources.append(Path(architecture.partition(":")[0].replace(".", "/") + ".py"))
    return atomic.sha256(b"".join(path.read_bytes() for path in sources if path.exists()))


@dataclass(frozen=True)
class Prepared:
    """Everything that the engine needs, and what the outputs say about it."""

    model: segmenter.Segmenter
    method: registry.Method
    batches: Batches
    validate: Any
    identity: dict[str, Any]
    seen: str
    precision_on: str
    offline: (
        int | None
    )  # images with labels of `training.methods.pseudo_labels`; None: not asked for, or no champion to ask


def prepare(params: Params, data: Data, start_at: Path | None, us: distributed.Ranks = distributed.ALONE) -> Prepared:
    """Networks, samples and method for `data`; wires, decides nothing but what measures the pseudo-labels."""
    settings, n_classes = params.train, len(data.classes)
    if settings.method == "ceiling":
        data = data.with_hidden_labels()

    def read(rows: Sequence[Row]) -> Images:
        return Images(rows, params.input, ignore=data.ignore, max_pixels=params.ingest.max_pixels)

    labelled = read(data.labelled)
    # Labelled images are fed as unlabelled ones too, so that a pool of zero unlabelled images is still a pool. Their
    # masks measure the pseudo-labels only where no unlabelled image has a hidden one: the network has learnt them.
    hidden = any(row.mask_shard is not None for row in data.unlabelled)
    blank = {"mask_shard": None, "mask_offset": None, "mask_length": None}
    pool = read([*data.unlabelled, *(replace(row, **blank) if hidden else row for row in data.labelled)])
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
    identity = {
        "params": params.model_dump(mode="json", include={"model", "input", "train"}),
        "split": data.split_hash,
        "data": data.data_hash,
        "labels": data.label_hash,
        "start": atomic.sha256(start_at) if start_at is not None else None,
        "world": us.world,
        "code": code_hash(params.model.architecture),
        "torch": torch.__version__,
    }
    sizes = settings.batch_labelled, settings.batch_unlabelled
    offline = None
    if settings.offline is not None and start_at is not None:
        model.to(inference.device())
        offline = relabel(
            model, pool, len(data.unlabelled), least=settings.offline, ignore=data.ignore, stride=params.input.stride,
            kept=checkpoint.folder(identity) / "offline.npz" if us.rank == 0 else None,
        )  # fmt: skip
    batches = Batches(labelled, pool, sizes, settings.seed, us.rank, us.world, offline)
    validate = validator(read(data.val), n_classes, params.input.stride, data.ignore, us=us)
    precision_on = "hidden labels" if hidden else "labels it trains on"
    made = None if offline is None else len(offline)
    return Prepared(model, method, batches, validate, identity, warm_start.short_ids(seen), precision_on, made)


def class_table(images: Images, n_classes: int, ignore: int) -> Tensor:
    """S4MC's neighbour table from the labelled masks alone (preset ref_a)."""
    labels = (images[i].label_HW for i in range(len(images)))
    return s4mc.neighbour_table(labels, n_classes, ignore=ignore).float()


def describe(
    params: Params, data: Data, result: trainer.Result, seconds: float, start_at: Path | None, ready: Prepared
) -> dict[str, Any]:
    last = result.history[-1]
    return {
        "method": params.train.method, "preset": params.train.s4mc.preset, "steps": params.train.steps,
        "seed": params.train.seed, "best_step": result.best_step, "val_miou": _number(last.get("val_miou")),
        "kept": _number(last.get("kept")), "precision": _number(last.get("precision")), "precision_on": ready.precision_on,
        "labelled": len(ready.batches.labelled), "unlabelled": len(data.unlabelled), "offline": ready.offline,
        "seconds": round(seconds, 1), "warm_start": str(start_at) if start_at else None,
        "torch": torch.__version__, "machine": platform.machine(),
        "device": str(trainer.pick_device()), "split_hash": data.split_hash, "data_hash": data.data_hash,
    }  # fmt: skip


def lineage(params: Params, summary: dict[str, Any]) -> dict[str, Any]:
    """What a champion's history tells of a training: its settings and data. Missing values become None."""
    return {
        "params": params.model_dump(mode="json", include={"model", "input", "train"}),
        **{key: summary.get(key) for key in ("dumps", "counts", "label_hash")},
    }


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)


def _named(values: dict[str, float], classes: list[dict[str, Any]]) -> dict[str, float]:
    """Log values with class names in place of class numbers; DVCLive draws one curve per path."""
    names = {}
    for key, value in values.items():
        kind, _, number = key.rpartition("_")
        if kind in ("kept", "precision") and number.isdigit():
            key = f"{kind}_per_class/{classes[int(number)]['name']}"
        names[key] = value
    return names


def open_live() -> Any:
    """DVCLive's logger on `paths.LIVE`. Raises ConfigError in a git repository without a commit, which it cannot handle."""
    from dvclive import Live
    from scmrepo.exceptions import SCMError

    try:
        return Live(str(paths.LIVE), report=None, save_dvc_exp=False, dvcyaml=None)
    except SCMError as error:
        raise config.ConfigError(
            f"git: {error}; commit once (`git add -A && git commit -m start`), then run again"
        ) from error


def stage(params: Params) -> Result | None:
    """The stage: train, write weights and reports, print one table. Of several processes only the first writes."""
    group = distributed.connect()
    summary = atomic.read_json(paths.SPLIT_SUMMARY)
    data = Data.read(manifest.read(paths.SPLIT_MANIFEST), summary)
    start_at = warm_start.champion()
    began = time.monotonic()
    ready = prepare(params, data, start_at, group.ranks)
    work = checkpoint.folder(ready.identity)
    fit = partial(
        trainer.fit, ready.model, ready.batches, ready.method, params.train,
        n_classes=len(data.classes), ignore=data.ignore, identity=ready.identity, validate=ready.validate,
        stride=params.input.stride, work=work, group=group,
    )  # fmt: skip
    if group.ranks.rank:
        fit()
        return None
    for other in checkpoint.unfinished(ready.identity):
        warn(str(other))
    with open_live() as live, console.bar(f"train {params.train.method}", params.train.steps) as bar:
        done = 0

        def log(event: trainer.Event) -> None:
            nonlocal done
            bar.advance(event.step - done)
            done = live.step = event.step
            for key, value in _named(event.values, data.classes).items():
                if key != "step" and not math.isnan(value):
                    live.log_metric(key, value)
            live.next_step()

        result = fit(on_log=log)
    about = describe(params, data, result, time.monotonic() - began, start_at, ready)
    shared = {
        **about,
        "classes": data.classes,
        "ignore": data.ignore,
        "params": params.model_dump(mode="json", include={"model", "input"}),
        "trained_on": ready.seen,
    }
    segmenter.save(paths.STUDENT_WEIGHTS, result.teacher, {**shared, "weights": "teacher, last step"})
    if result.best is not None:
        best = {**shared, "weights": f"teacher, step {result.best_step}, best on val"}
        segmenter.save(paths.BEST_WEIGHTS, result.best, best)
    atomic.write_json(paths.TRAINING, about | lineage(params, summary))
    atomic.write_json(paths.TRAIN_SCORES, about)  # beside the curves, where DVC reads it as a metric
    curves.curves(result.history, data.classes, paths.CURVES)
    some = Images(
        data.unlabelled[:: max(1, len(data.unlabelled) // 6)][:6],
        params.input,
        ignore=data.ignore,
        max_pixels=params.ingest.max_pixels,
    )
    model = segmenter.load(paths.STUDENT_WEIGHTS)[0]
    bar_at_end = result.history[-1].get("threshold", math.nan)
    curves.previews(model, some, ready.method, params, data.classes, bar_at_end, paths.PSEUDO_LABELS)
    checkpoint.discard(work)
    return Result((table(about),), record=about)


def table(about: dict[str, Any]) -> Table:
    columns = ("labelled", "unlabelled", "offline", "steps", "val_miou", "best_step", "kept", "precision")
    shown = Table(title=f"train: {about['method']} ({about['preset']}), {about['seconds']} s on {about['device']}")
    for column in columns:
        shown.add_column(column.replace("_miou", " mIoU").replace("_", " "), justify="right")
    shown.add_row(*("-" if about[k] is None else str(about[k]) for k in columns))
    shown.caption = f"precision of kept pseudo-labels against {about['precision_on']}"
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
