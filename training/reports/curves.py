"""Pictures of a training run: curves, and what the pseudo-labels look like."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from pipeline.config import Params
from pipeline.imaging import label_maps
from training import inference
from training.engine.data import Images
from training.methods import registry, selection
from training.models.segmenter import Segmenter
from training.reports import evaluation


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _series(history: Sequence[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], row[key]) for row in history if key in row and not math.isnan(row[key])]
    return [step for step, _ in rows], [value for _, value in rows]


def _losses(history: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(key for row in history for key in row if key.startswith("loss_")))


def curves(history: Sequence[dict[str, float]], classes: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses, val mIoU, kept ratio / precision / threshold, and kept ratio per class, over steps."""
    figure, axes = _grid(2, 2, 11, 7)
    panels: list[tuple[str, list[tuple[str, str]]]] = [
        ("loss", [(key, key.removeprefix("loss_").replace("_", " ")) for key in _losses(history)]),
        ("val mIoU of the teacher (%)", [("val_miou", "val mIoU")]),
        (
            "pseudo-labels",
            [("kept", "kept ratio"), ("precision", "precision (hidden labels)"), ("threshold", "threshold")],
        ),
        ("kept ratio by predicted class", [(f"kept_{c['id']}", c["name"]) for c in classes]),
    ]
    for axis, (title, lines) in zip(axes.flat, panels, strict=True):
        drawn = False
        for key, name in lines:
            steps, values = _series(history, key)
            if steps:
                color = None
                if key.startswith("kept_"):
                    color = [v / 255 for v in classes[int(key.removeprefix("kept_"))]["color"]]
                axis.plot(steps, values, label=name, marker="o" if key == "val_miou" else None, color=color)
                drawn = True
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if drawn:
            # So many names would hide the lines.
            beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(lines) > 5 else {}
            axis.legend(fontsize=8, **beside)
        else:
            axis.text(0.5, 0.5, "not used by this method", ha="center", transform=axis.transAxes)
    evaluation.save(figure, path)


@torch.inference_mode()
def previews(
    model: Segmenter,
    images: Images,
    method: registry.Method,
    params: Params,
    classes: Sequence[dict[str, Any]],
    bar: float,
    path: Path,
) -> None:
    """Per row an unlabelled image: photo, pseudo-label, the score that `method` judges by, and what it keeps at `bar`.

    Without a bar (a supervised run) every pixel counts as kept: there is no selection to show.
    """
    chooser = registry.fixed(method, bar if not math.isnan(bar) else -math.inf)
    rows = max(1, len(images))
    figure, axes = _grid(rows, 4, 12, 2.3 * rows)
    palette = [tuple(c["color"]) for c in classes]
    for row in axes:
        for axis in row:
            axis.set_axis_off()
    for row, index in zip(axes, range(len(images)), strict=False):
        image_HWC = images[index].image_HWC
        height, width = image_HWC.shape[:2]
        logits = inference.logits_of(model, image_HWC, params.input.stride)
        chosen = selection.select(chooser, logits[None], torch.ones(1, height, width, dtype=torch.bool), 0)
        label = chosen.label_BHW[0].to(torch.uint8).numpy()
        kept = chosen.keep_BHW[0].numpy()
        shown = [
            (image_HWC.numpy(), "image"),
            (label_maps.overlay(image_HWC.numpy(), label, palette, 0.6), "pseudo-label"),
            (chosen.score_BHW[0].clamp(0, 1).numpy(), "score, 0 to 1"),
            (label_maps.overlay(image_HWC.numpy(), label, palette, 0.6) * kept[..., None], "kept"),
        ]
        for axis, (picture, title) in zip(row, shown, strict=True):
            axis.imshow(picture, cmap="magma", vmin=0, vmax=1) if picture.ndim == 2 else axis.imshow(picture)
            axis.set_title(title if index == 0 else "", fontsize=9)
    evaluation.save(figure, path)
