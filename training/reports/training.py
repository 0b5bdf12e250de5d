"""Stage `train_report`: a training's curves, and what its pseudo-labels look like. Drawing is kept out of the training,
so that a change to a picture costs no new one."""

import json
import math
from typing import Any

from pipeline import paths
from pipeline.config import Params
from pipeline.storage import atomic, manifest
from training.engine.data import Images
from training.methods import registry, s4mc
from training.models import segmenter
from training.reports import curves

SHOWN = 6  # unlabelled images


def run(params: Params) -> None:
    """Draw `paths.CURVES` and `paths.PSEUDO_LABELS` from the student and the history of its training."""
    summary = atomic.read_json(paths.SPLIT_SUMMARY)
    history = [json.loads(line) for line in paths.HISTORY.read_text(encoding="utf-8").splitlines()]
    curves.curves(history, summary["classes"], paths.CURVES)

    rows = manifest.read(paths.SPLIT_MANIFEST)
    unlabelled = [row for row in rows if row.split == "unlabelled"]
    some = unlabelled[:: max(1, len(unlabelled) // SHOWN)][:SHOWN]
    labelled = [row for row in rows if row.split == "labelled"]
    model, _ = segmenter.load(paths.STUDENT_WEIGHTS)
    curves.previews(
        model, _images(some, params, summary), _method(labelled, params, summary), params, summary["classes"],
        history[-1].get("threshold", math.nan), paths.PSEUDO_LABELS,
    )  # fmt: skip


def _method(labelled: list[manifest.Row], params: Params, summary: dict[str, Any]) -> registry.Method:
    """The training's method, as far as it judges pixels: the threshold's schedule does not matter, its last value is known."""
    n_classes, table_K = len(summary["classes"]), None
    if registry.needs_table(params.train):
        images = _images(labelled, params, summary)
        labels = (images[i].label_HW for i in range(len(images)))
        table_K = s4mc.neighbour_table(labels, n_classes, ignore=summary["ignore"]).float()
    return registry.build(params.train, n_classes=n_classes, total=1, epoch_steps=1, table_K=table_K)


def _images(rows: list[manifest.Row], params: Params, summary: dict[str, Any]) -> Images:
    return Images(rows, params.input, ignore=summary["ignore"], max_pixels=params.ingest.max_pixels)
