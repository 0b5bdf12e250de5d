"""The model card in Markdown: what a model is, how it was made, how good it is, and where it must not be trusted."""

from collections.abc import Mapping
from typing import Any

from pipeline import paths
from pipeline.records.scores import Scores
from training.reports.evaluation import percent

HASHES = {"data": "data_hash", "split": "split_hash", "weights": "weights", "commit": "commit"}
WEAK = 50.0  # IoU in percent, below which a class is named as a limit


def card(scores: Scores, meta: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        meta: the student's own description. summary: the split's.
    """
    sections = {
        "Made from": made_from(scores, meta, summary),
        "Takes and gives": takes_and_gives(meta),
        f"Scores on {scores.test_images} test images that no choice ever saw (test set {scores.test_hash[:12]})": [
            *totals(scores),
            "",
            *class_table(scores),
        ],
        "Limits": limits(scores),
    }
    names = ", ".join(c["name"] for c in meta["classes"])
    lines = ["# Model card", "", f"Semantic segmentation into {len(meta['classes'])} classes: {names}."]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def made_from(scores: Scores, meta: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    network = meta["params"]["model"]
    counts = ", ".join(f"{n} {name}" for name, n in summary["counts"].items())
    hashes = ", ".join(f"{key} {getattr(scores, name)[:12]}" for key, name in HASHES.items())
    return [
        f"- network: {network['architecture']} on {network['encoder']}, output stride {network['output_stride']}",
        f"- method: {scores.method}, {scores.steps} steps, seed {scores.seed}",
        f"- images: {counts}",
        f"- {hashes}",
    ]


def takes_and_gives(meta: Mapping[str, Any]) -> list[str]:
    policy = meta["params"]["input"]
    return [
        f"- takes an RGB image of any size; scaled down so that the longer side is at most {policy['long_side']} px, "
        f"padded to multiples of {policy['stride']}",
        f"- gives a class id per pixel of the original image and a confidence (0..255 = 0..1); id {meta['ignore']}, "
        "ignore, never occurs",
    ]


def totals(scores: Scores) -> list[str]:
    low, high = scores.miou_ci or (None, None)
    return [
        f"- mIoU {percent(scores.miou)}, 95% interval over images {percent(low)} to {percent(high)}; "
        f"over all classes, absent ones as 0: {percent(scores.miou_all)}",
        f"- boundary IoU ({scores.boundary_px} px) {percent(scores.boundary_iou)}; pixel accuracy "
        f"{percent(100 * scores.pixel_accuracy)}%; expected calibration error {scores.ece:.4f}",
        f"- last step's weights; the best on val would give mIoU {percent(scores.best.miou)}",
        f"- rule: {scores.absent_rule}",
    ]


def class_table(scores: Scores) -> list[str]:
    lines = ["| class | IoU | 95% interval | precision | recall | test pixels |", "|---|---|---|---|---|---|"]
    for name, row in scores.per_class.items():
        low, high = row.ci or (None, None)
        cells = [
            name,
            percent(row.iou),
            f"{percent(low)} .. {percent(high)}",
            percent(row.precision),
            percent(row.recall),
        ]
        lines.append(f"| {' | '.join(cells)} | {row.pixels} |")
    return lines


def limits(scores: Scores) -> list[str]:
    weak = [name for name, row in scores.per_class.items() if row.iou is not None and row.iou < WEAK]
    lines = [
        "The interval covers the choice of test images only, not the training seed; images of one group (site, video) "
        "resemble each other, so it is too narrow where the test split has few groups.",
        f"Scores hold for images like the test set; `{paths.DRIFT}` says how far a new dump is from it.",
    ]
    if scores.absent:
        lines.append(f"Not measured, absent from the test set: {', '.join(scores.absent)}.")
    if weak:
        lines.append(f"IoU below 50: {', '.join(weak)}; do not rely on these without a look.")
    return [f"- {line}" for line in lines]
