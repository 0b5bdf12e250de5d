"""Student weights and the test split to scores: dataset-level, at each image's original resolution, as it is served.

Each image is answered as a request would be (`training.inference`), brought back to its original size by `resize.restore` and
counted against the mask as it was delivered, exactly once, whatever the number of processes.
"""

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from torch import nn

from pipeline import config, paths, stage
from pipeline import console as progress
from pipeline.champions import metrics as scores
from pipeline.champions import store
from pipeline.imaging import resize
from pipeline.records.scores import ClassScores, Scores, SplitScores
from pipeline.storage import atomic, manifest
from training import inference, metrics, warm_start
from training.metrics import Result
from training.models import segmenter
from training.reports import evaluation, model_card

SEED = 0


class EvaluateError(ValueError):
    """Weights and data do not belong together, or there is nothing to score; the message says what to do."""


def commit(folder: Path = Path()) -> str:
    """The commit of the code that runs, or "unknown" outside a git checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


@dataclass(frozen=True)
class Counting:
    """How images are read and their pixels counted. distance: width of the boundary region, in pixels."""

    policy: config.Input
    classes: int
    ignore: int
    distance: int
    max_pixels: int


def score(model: nn.Module, batches: Sequence[list[manifest.Row]], how: Counting, what: str = "evaluate") -> Result:
    """Run and count every image of `batches` once, at its original resolution. Errors as `read` and
    `metrics.confusion`.
    """
    where = next(model.parameters()).device
    rows: list[manifest.Row] = []
    tallies: list[metrics.Tally] = []
    with progress.bar(what, sum(map(len, batches))) as bar:
        for samples in inference.stream(batches, how.policy, how.max_pixels, mask=True):
            labels, confidences = inference.segment(model, samples, where)
            for sample, label, confidence in zip(samples, labels, confidences, strict=True):
                assert sample.truth_HW is not None
                sized = resize.restore(label, sample.fit), resize.restore(confidence, sample.fit)
                try:
                    counted = metrics.tally(
                        sample.truth_HW, *sized, k=how.classes, ignore=how.ignore, distance=how.distance
                    )
                except metrics.LabelError as error:
                    raise EvaluateError(f"image {sample.row.name!r}: {error}") from error
                rows.append(sample.row)
                tallies.append(counted)
            bar.advance(len(samples))
    return Result(tuple(rows), tuple(tallies))


def class_table(
    result: Result, names: Sequence[str], evaluate: config.Evaluate
) -> tuple[dict[str, ClassScores], tuple[float, float] | None]:
    """The scores of each class, and the 95 % interval of mIoU over images."""
    drawn = 100 * scores.bootstrap(result.confusion_NKK, samples=evaluate.bootstrap, seed=SEED)
    total = result.total.confusion_KK
    inter, truth, predicted = scores.marginals(total)
    columns = {"iou": 100 * scores.iou(total)}
    for key, below in (("precision", predicted), ("recall", truth)):
        columns[key] = 100 * np.divide(inter, below, out=np.full_like(inter, np.nan), where=below > 0)
    table = {}
    for c, name in enumerate(names):
        spread = scores.interval(drawn[:, c], 0.95)
        values = {key: None if np.isnan(column[c]) else float(column[c]) for key, column in columns.items()}
        table[name] = ClassScores(**values, ci=_ends(spread), pixels=int(truth[c]))
    return table, _ends(scores.interval(scores.mean_present(drawn), 0.95))


def _ends(spread: scores.Interval | None) -> tuple[float, float] | None:
    return None if spread is None else (spread.low, spread.high)


def check(meta: dict[str, Any], summary: dict[str, Any], weights: Path, *, same_split: bool = True) -> None:
    """Raises EvaluateError when the weights were made for other classes, or (unless told otherwise) another split."""
    ours, theirs = ([(c["id"], c["name"]) for c in side["classes"]] for side in (meta, summary))
    if ours != theirs or meta["ignore"] != summary["ignore"]:
        raise EvaluateError(f"{weights}: trained for classes {ours}, the data has {theirs}; train again (`dvc repro`)")
    if same_split and meta["split_hash"] != summary["split_hash"]:
        raise EvaluateError(
            f"{weights}: trained on split {meta['split_hash'][:12]}, {paths.SPLIT} is {summary['split_hash'][:12]}; "
            "test images may have been trained on: train again (`dvc repro`)"
        )


@dataclass(frozen=True)
class Scoring:
    """Everything one network left: its scores on the test split, and what was counted on each image."""

    scores: SplitScores
    result: Result


def evaluate(weights: Path, params: config.Params, *, split: Path = paths.SPLIT, same_split: bool = True) -> Scoring:
    """Score one weights file on the test split."""
    model, meta = segmenter.load(weights, inference.device())
    summary = atomic.read_json(split / "summary.json")
    check(meta, summary, weights, same_split=same_split)
    policy = config.Input.model_validate(meta["params"]["input"])
    result = score_split(model, meta, "test", params, split=split)
    if not result.rows:
        raise EvaluateError("the test split has no image: raise split.test, or name test images in the source's lists")
    if not result.confusion_NKK.any():
        raise EvaluateError("every pixel of the test masks is ignore: nothing can be scored; check the masks")
    names = [c["name"] for c in meta["classes"]]
    table, spread = class_table(result, names, params.evaluate)
    scored = SplitScores(
        **metrics.summary(result.total).model_dump(),
        miou_ci=spread,
        per_class=table,
        absent=[name for name in names if table[name].iou is None],
        absent_rule=scores.ABSENT_RULE,
        boundary_px=params.evaluate.boundary_px,
        test_images=len(result.rows),
        test_hash=summary["test_hash"],
        split_hash=summary["split_hash"],
        data_hash=summary["data_hash"],
        stride=policy.stride,
        crop=f"whole image, longer side <= {policy.long_side} px",
        commit=commit(),
        weights=atomic.sha256(weights),
        method=meta["method"],
        steps=meta["steps"],
        seed=meta["seed"],
    )
    return Scoring(scored, result)


def score_split(
    model: nn.Module, meta: dict[str, Any], name: str, params: config.Params, *, split: Path = paths.SPLIT
) -> Result:
    """Count one split ("test" or "val") with a loaded network; an empty split gives an empty result."""
    policy = config.Input.model_validate(meta["params"]["input"])
    rows = [row for row in manifest.read(split / "manifest.parquet") if row.split == name]
    how = Counting(
        policy,
        classes=len(meta["classes"]),
        ignore=meta["ignore"],
        distance=params.evaluate.boundary_px,
        max_pixels=params.ingest.max_pixels,
    )
    return score(model, inference.plan_batches(rows, policy, params.evaluate.batch), how, f"score {name}")


def write_confusions(path: Path, scoring: Scoring) -> None:
    """Per-image counts for the gate: confusion N x K x K, ids, groups, classes, test_hash, weights. No pickled
    objects.
    """
    result = scoring.result
    with atomic.replacing(path) as file:
        np.savez_compressed(
            file,
            confusion=result.confusion_NKK,
            ids=np.array([row.id for row in result.rows]),
            groups=np.array([row.group or "" for row in result.rows]),
            classes=np.array(list(scoring.scores.per_class)),
            test_hash=np.array(scoring.scores.test_hash),
            weights=np.array(scoring.scores.weights),
        )


def _val_miou(weights: Path, params: config.Params) -> float | None:
    model, meta = segmenter.load(weights, inference.device())
    result = score_split(model, meta, "val", params)
    return metrics.summary(result.total).miou if result.rows else None


def _table(value: Scores) -> Table:
    low, high = map(evaluation.percent, value.miou_ci or (None, None))
    title = f"test mIoU {evaluation.percent(value.miou)} [{low}, {high}] on {value.test_images} images"
    table = Table("class", "IoU", "95% interval", "precision", "recall", "pixels", title=title)
    for name, row in value.per_class.items():
        iou, precision, recall = (evaluation.percent(v) for v in (row.iou, row.precision, row.recall))
        spread = " .. ".join(map(evaluation.percent, row.ci or (None, None)))
        table.add_row(name, iou, spread, precision, recall, f"{row.pixels:,}")
    overall, edge, best = (evaluation.percent(v) for v in (value.miou_all, value.boundary_iou, value.best.miou))
    table.caption = (
        f"mIoU over all classes {overall}, boundary IoU {edge}, pixel accuracy {value.pixel_accuracy:.4f}, "
        f"calibration error {value.ece:.4f}; best on val: test mIoU {best}"
    )
    return table


def run(params: config.Params) -> stage.Result:
    """The stage: models/student and data/split -> reports/."""
    last_file, best_file = paths.STUDENT_WEIGHTS, paths.BEST_WEIGHTS
    last = evaluate(last_file, params)
    last_val = _val_miou(last_file, params)
    if not best_file.exists() or atomic.sha256(best_file) == last.scores.weights:
        value = Scores.of(last.scores, last.scores, last_val, last_val)
    else:
        best = evaluate(best_file, params)
        value = Scores.of(last.scores, best.scores, last_val, _val_miou(best_file, params))

    write_confusions(paths.CONFUSIONS, last)
    model, meta = segmenter.load(last_file, inference.device())
    evaluation.write(paths.EVALUATION, value, last.result, previews(model, meta, last.result, params), meta)
    atomic.write_text(paths.MODEL_CARD, model_card.card(value, meta, atomic.read_json(paths.SPLIT_SUMMARY)))
    record = value.model_dump(mode="json")
    atomic.write_json(paths.SCORES, record)
    return stage.Result((_table(value),), record=record)


def previews(
    model: nn.Module, meta: dict[str, Any], result: Result, params: config.Params
) -> Iterator[tuple[inference.Sample, NDArray[np.uint8], float]]:
    """infer.Sample, label map at original size and accuracy of the images to draw: the worst half, then some spread
    over the rest.
    """
    right = np.array([np.trace(t.confusion_KK) / max(1, t.confusion_KK.sum()) for t in result.tallies])
    order, n = np.argsort(right, kind="stable"), min(params.evaluate.previews, len(result.rows))
    worst = list(order[: (n + 1) // 2])
    others = order[len(worst) :]
    chosen = worst + list(others[np.linspace(0, len(others) - 1, n - len(worst)).astype(int)] if n > len(worst) else [])
    policy = config.Input.model_validate(meta["params"]["input"])
    where = next(model.parameters()).device
    for i in chosen:
        sample = inference.read(result.rows[i], policy, params.ingest.max_pixels, mask=True)
        label, _ = inference.segment(model, [sample], where)
        yield sample, resize.restore(label[0], sample.fit), float(right[i])


def rescore_champion(params: config.Params, home: Path = paths.CHAMPIONS) -> stage.Result:
    """Score the champion on today's test split, so that the gate can compare again after the test set changed."""
    champion = store.read_champion(home)
    if champion is None:
        raise EvaluateError(f"{home}/champion.json: there is no champion to score yet")
    folder = home / champion.id
    weights = folder / "student.safetensors"
    rows = manifest.read(paths.SPLIT_MANIFEST)
    warm_start.refuse_seen(weights, segmenter.read_meta(weights), (row.id for row in rows if row.split == "test"))
    scoring = evaluate(folder / "student.safetensors", params, same_split=False)
    record = Scores.of(scoring.scores, scoring.scores, None, None).model_dump(mode="json")
    write_confusions(folder / "confusions.npz", scoring)
    atomic.write_json(folder / "scores.json", record)
    return stage.Result((f"scored again: {folder}",), record=record)
