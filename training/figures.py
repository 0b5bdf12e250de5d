"""Pictures of a training run: curves, and what the pseudo-labels look like."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on servers
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from pipeline import masks
from pipeline.config import Params
from training import refine
from training.data import Images
from training.models import Segmenter


def _series(history: Sequence[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], row[key]) for row in history if key in row and not math.isnan(row[key])]
    return [step for step, _ in rows], [value for _, value in rows]


def curves(history: Sequence[dict[str, float]], classes: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses, val mIoU, kept ratio / precision / threshold, and kept ratio per class, over steps."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    panels: list[tuple[str, list[tuple[str, str]]]] = [
        ("loss", [("loss_supervised", "supervised"), ("loss_unsupervised", "unsupervised")]),
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
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "not used by this method", ha="center", transform=axis.transAxes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.inference_mode()
def previews(
    model: Segmenter, images: Images, params: Params, classes: Sequence[dict[str, Any]], bar: float, path: Path
) -> None:
    """Per row an unlabelled image: photo, pseudo-label, refined margin, and the pixels above the last threshold."""
    rows = max(1, len(images))
    figure, axes = plt.subplots(rows, 4, figsize=(12, 2.5 * rows), layout="constrained", squeeze=False)
    palette = [tuple(c["color"]) for c in classes]
    for row in axes:
        for axis in row:
            axis.set_axis_off()
    for row, index in zip(axes, range(len(images)), strict=False):
        image_HWC = images[index].image_HWC
        height, width = image_HWC.shape[:2]
        stride = params.input.stride
        image = F.pad(
            image_HWC.permute(2, 0, 1)[None].float(), (0, -width % stride, 0, -height % stride), mode="replicate"
        )
        prob = model(image)[:, :, :height, :width].softmax(1)
        sure = refine.margin(refine.refine(prob))[0].clamp(0, 1)
        label = prob.argmax(1)[0].to(torch.uint8).numpy()
        kept = sure.numpy() > (bar if not math.isnan(bar) else 0)
        shown = [
            (image_HWC.numpy(), "image"),
            (masks.overlay(image_HWC.numpy(), label, palette, 0.6), "pseudo-label"),
            (sure.numpy(), "refined margin"),
            (masks.overlay(image_HWC.numpy(), label, palette, 0.6) * kept[..., None], "kept"),
        ]
        for axis, (picture, title) in zip(row, shown, strict=True):
            axis.imshow(picture, cmap="magma", vmin=0, vmax=1) if picture.ndim == 2 else axis.imshow(picture)
            axis.set_title(title if index == 0 else "", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
