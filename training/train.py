"""Stage `train`: split manifest -> student weights, curves and previews."""

import argparse
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pipeline import config, files, manifest, progress, scores
from pipeline.config import Params
from pipeline.manifest import Row
from training import checkpoint, engine, methods, metrics, models, refine
from training.data import Batches, Images
from training.figures import curves, previews

MANIFEST = Path("data/split/manifest.parquet")
SUMMARY = Path("data/split/summary.json")
REGISTRY = Path("dumps.yaml")
OUT = Path("models/student")
REPORTS = Path("reports/train")


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

    @classmethod
    def read(cls, rows: Sequence[Row], summary: dict[str, Any]) -> "Data":
        def use(name: str) -> list[Row]:
            return [row for row in rows if row.split == name]

        return cls(
            use("labelled"), use("unlabelled"), use("val"),
            summary["classes"], summary["ignore"], summary["split_hash"], summary["data_hash"],
        )  # fmt: skip


def warm_start(registry: Path) -> Path | None:
    """The champion's weights that the dump registry names as starting point; None for a first training.

    Raises:
        ConfigError: the registry names a champion whose weights are not there.
    """
    if not registry.exists():
        return None
    name = (yaml.safe_load(registry.read_text(encoding="utf-8")) or {}).get("warm_start")
    if name is None:
        return None
    path = Path("champions") / str(name) / "student.safetensors"
    if not path.exists():
        raise config.ConfigError(
            f"{registry}: warm_start names champion {name!r}, but {path} does not exist; restore champions/ or set "
            "warm_start: null to train from the encoder's weights"
        )
    return path


def start_from(model: models.Segmenter, path: Path, classes: list[dict[str, Any]]) -> None:
    """Copy a champion's weights into `model`. Raises WeightsError when classes or architecture differ, naming both."""
    meta = models.read_meta(path)
    theirs, ours = ([c["name"] for c in m] for m in (meta["classes"], classes))
    if theirs != ours:
        raise models.WeightsError(
            f"{path} has the classes {theirs}, the data has {ours}; set warm_start: null in {REGISTRY}"
        )
    donor, _ = models.load(path)
    try:
        model.load_state_dict(donor.state_dict())
    except RuntimeError as error:
        raise models.WeightsError(
            f"{path} has another architecture than params.yaml's model section: {error}"
        ) from error


def validator(images: Images, n_classes: int, stride: int, ignore: int, limit: int = 128) -> Any:
    """teacher -> mIoU in percent over (at most `limit`) val images at working size; NaN without val images."""

    @torch.inference_mode()
    def validate(model: nn.Module) -> float:
        if not len(images):
            return math.nan
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        total = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=device)
        for i in np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int):
            sample = images[int(i)]
            height, width = sample.image_HWC.shape[:2]
            image = sample.image_HWC.permute(2, 0, 1)[None].float().to(device)
            pad = (0, -width % stride, 0, -height % stride)
            logits = model(torch.nn.functional.pad(image, pad, mode="replicate"))
            total += metrics.confusion(
                sample.label_HW.long().to(device), logits[0, :, :height, :width].argmax(0), n_classes, ignore
            )
        model.train(was_training)
        return float(scores.miou(total.cpu().numpy()))

    return validate


def class_table(data: Data, images: Images) -> Tensor:
    """S4MC's neighbour table from the labelled masks alone (preset ref_a)."""
    labels = [images[i].label_HW for i in range(len(images))]
    tables = [refine.neighbour_table(label[None], len(data.classes), ignore=data.ignore) for label in labels]
    return torch.stack(tables).mean(0).float()


def run(
    params: Params, data: Data, *, work: Path | None = None, start: Path | None = None, on_log: Any = lambda _: None
) -> engine.Result:
    """Train on `data` and return both networks' weights and the history; wires, decides nothing."""
    settings, n_classes = params.train, len(data.classes)

    def read(rows: Sequence[Row]) -> Images:
        return Images(rows, params.input, ignore=data.ignore, max_pixels=params.ingest.max_pixels)

    labelled, val = read(data.labelled), read(data.val)
    # Labelled images are fed as unlabelled ones too: their masks measure the pseudo-labels' precision where no other
    # hidden labels exist, and a pool of zero unlabelled images is still a pool.
    pool = read([*data.unlabelled, *data.labelled])
    torch.manual_seed(settings.seed)
    model = models.build(params.model, n_classes)
    if start is not None:
        start_from(model, start, data.classes)
    epoch = max(1, math.ceil(len(pool) / settings.batch_unlabelled))
    needs_table = settings.method == "s4mc" and refine.PRESETS[settings.preset].joint == "table"
    method = methods.build(
        settings,
        total=settings.steps - settings.warmup_steps,
        epoch_steps=epoch,
        table_K=class_table(data, labelled) if needs_table else None,
    )
    identity = {
        "params": params.model_dump(mode="json", include={"model", "input", "train"}),
        "split": data.split_hash,
        "data": data.data_hash,
        "start": files.sha256(start) if start is not None else None,
        "torch": torch.__version__,
    }
    batches = Batches(labelled, pool, (settings.batch_labelled, settings.batch_unlabelled), settings.seed)
    return engine.fit(
        model, batches, method, settings,
        n_classes=n_classes, ignore=data.ignore, identity=identity, on_log=on_log,
        validate=validator(val, n_classes, params.input.stride, data.ignore),
        work=work or checkpoint.folder(identity),
    )  # fmt: skip


def describe(params: Params, data: Data, result: engine.Result, seconds: float, start: Path | None) -> dict[str, Any]:
    last = result.history[-1]
    return {
        "method": params.train.method, "preset": params.train.preset, "steps": params.train.steps,
        "seed": params.train.seed, "best_step": result.best_step, "val_miou": _number(last.get("val_miou")),
        "kept": _number(last.get("kept")), "precision": _number(last.get("precision")),
        "labelled": len(data.labelled), "unlabelled": len(data.unlabelled), "seconds": round(seconds, 1),
        "warm_start": str(start) if start else None, "torch": torch.__version__, "machine": platform.machine(),
        "device": str(engine.pick_device()), "split_hash": data.split_hash, "data_hash": data.data_hash,
    }  # fmt: skip


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
    """DVCLive's logger on REPORTS/live. Raises ConfigError in a git repository without a commit, which it cannot handle."""
    from dvclive import Live
    from scmrepo.exceptions import SCMError

    try:
        return Live(str(REPORTS / "live"), report=None, save_dvc_exp=False, dvcyaml=None)
    except SCMError as error:
        raise config.ConfigError(
            f"git: {error}; commit once (`git add -A && git commit -m start`), then run again"
        ) from error


def stage(params: Params) -> None:
    """The stage: train, write weights and reports, print one table."""
    data = Data.read(manifest.read(MANIFEST), files.read_json(SUMMARY))
    start = warm_start(REGISTRY)
    began = time.monotonic()
    with (
        open_live() as live,
        progress.bar(f"train {params.train.method}", params.train.steps) as bar,
    ):
        done = 0

        def log(event: engine.Event) -> None:
            nonlocal done
            bar.advance(event.step - done)
            done = live.step = event.step
            for key, value in _named(event.values, data.classes).items():
                if key != "step" and not math.isnan(value):
                    live.log_metric(key, value)
            live.next_step()

        result = run(params, data, start=start, on_log=log)
    about = describe(params, data, result, time.monotonic() - began, start)
    meta = {
        **about,
        "classes": data.classes,
        "ignore": data.ignore,
        "params": params.model_dump(mode="json", include={"model", "input"}),
    }
    models.save(OUT / "student.safetensors", result.teacher, {**meta, "weights": "teacher, last step"})
    models.save(
        OUT / "best.safetensors", result.best, {**meta, "weights": f"teacher, step {result.best_step}, best on val"}
    )
    files.write_json(OUT / "train.json", about)
    curves(result.history, data.classes, REPORTS / "curves.png")
    model = models.load(OUT / "student.safetensors")[0]
    pool = Images(data.unlabelled[:: max(1, len(data.unlabelled) // 6)][:6], params.input,
                  ignore=data.ignore, max_pixels=params.ingest.max_pixels)  # fmt: skip
    previews(
        model, pool, params, data.classes, result.history[-1].get("threshold", math.nan), REPORTS / "pseudo_labels.png"
    )
    table = Table(
        title=f"train: {params.train.method} ({params.train.preset}), {about['seconds']} s on {about['device']}"
    )
    for column in ("labelled", "unlabelled", "steps", "val mIoU", "best step", "kept", "precision"):
        table.add_column(column, justify="right")
    table.add_row(
        *(str(about[k]) for k in ("labelled", "unlabelled", "steps", "val_miou", "best_step", "kept", "precision"))
    )
    Console().print(table)


def main() -> int:
    """Exit code 75 when interrupted by SIGTERM (the same command resumes), 1 with a message when training cannot go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    problems = Console(stderr=True)
    try:
        stage(config.load(parser.parse_args().params))
    except engine.Interrupted as reason:
        problems.print(f"train: {reason}", style="yellow", markup=False, soft_wrap=True)
        return 75
    except (OSError, ValueError, engine.TrainingStopped) as error:
        problems.print(f"train: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
