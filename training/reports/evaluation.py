"""Pictures and tables of an evaluation. Drawn without a display and without global state."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from pipeline.imaging import label_maps
from pipeline.records.scores import ClassScores, Scores
from pipeline.storage import atomic
from training import metrics
from training.metrics import Result

if TYPE_CHECKING:
    from training.inference import Sample

ROWS_PER_CLASS = 200  # of confusion.csv: DVC's confusion template counts rows, one a pixel would be millions


def save(figure: Figure, path: Path) -> None:
    """PNG, atomically; without the version stamp, so that equal content gives equal bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    atomic.write_bytes(path, buffer.getvalue())


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.add_subplot()


def confusion_figure(confusion_KK: NDArray[np.integer], names: Sequence[str]) -> Figure:
    """Row-normalised confusion in percent; a class without ground truth is an empty row."""
    k = len(names)
    figure, axes = _axes(2.5 + 0.55 * k, 2 + 0.5 * k)
    truth = confusion_KK.sum(1, keepdims=True)
    share = np.divide(100.0 * confusion_KK, truth, out=np.full(confusion_KK.shape, np.nan), where=truth > 0)
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(k), names, rotation=45, ha="right")
    axes.set_yticks(range(k), names)
    axes.set(xlabel="predicted", ylabel="ground truth", title="of each class's pixels, predicted as (%)")
    for (row, column), value in np.ndenumerate(share):
        if value >= 0.5:
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="w" if value > 55 else "k"
            )
    figure.colorbar(picture, ax=axes, shrink=0.8)
    return figure


def class_figure(table: Mapping[str, ClassScores], miou: float) -> Figure:
    """IoU per class with its interval; the dashed line is the mean."""
    names = list(table)
    figure, axes = _axes(7, 1.2 + 0.36 * len(names))
    for place, name in enumerate(names):
        row = table[name]
        if row.iou is None or row.ci is None:
            axes.text(1, place, "absent", va="center", color="0.4")
            continue
        low, high = row.ci
        error = [[max(0.0, row.iou - low)], [max(0.0, high - row.iou)]]
        axes.barh(place, row.iou, xerr=error, color="tab:blue", ecolor="0.2", capsize=3)
        axes.text(101, place, f"{row.iou:.1f}", va="center")
    axes.axvline(miou, ls="--", color="tab:red", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 110), xlabel="IoU (%), bar: 95% bootstrap interval over images", title=f"mIoU {miou:.2f}")
    return figure


def reliability_figure(table_B3: NDArray[np.float64], ece: float) -> Figure:
    """Accuracy against confidence, and how many pixels there are at each."""
    pixels, confidence, accuracy = table_B3.T
    some = pixels > 0
    figure, axes = _axes(5, 4.5)
    axes.plot([0, 1], [0, 1], color="0.7", lw=1)
    axes.bar(confidence[some], (pixels / max(pixels.sum(), 1))[some], width=0.03, color="0.85", label="share of pixels")
    axes.plot(confidence[some], accuracy[some], "o-", label="accuracy")
    axes.set(
        xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=f"expected calibration error {ece:.4f}"
    )
    axes.legend(loc="upper left")
    return figure


def curves_figure(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, title: str = ""
) -> Figure:
    """Named lines, each (xs, ys), on one pair of axes."""
    figure, axes = _axes(7, 4)
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, label=name)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    if series:
        axes.legend()
    return figure


def overlay_figure(
    image_HWC: NDArray[np.uint8], truth_HW: NDArray[np.uint8], label_HW: NDArray[np.uint8],
    classes: Sequence[Mapping[str, Any]], ignore: int, title: str,
) -> Figure:  # fmt: skip
    """Image | ground truth | prediction | errors, side by side, with the colours of the classes that occur."""
    colours = [tuple(c["color"]) for c in classes]
    known = truth_HW != ignore
    wrong = image_HWC // 3
    wrong[known & (truth_HW != label_HW)] = (230, 40, 40)
    wrong[~known] = label_maps.IGNORE_COLOUR
    shown = np.where(known, truth_HW, label_maps.IGNORE).astype(np.uint8)
    panels = {
        "image": image_HWC,
        "ground truth": label_maps.overlay(image_HWC, shown, colours, 0.65),
        "prediction": label_maps.overlay(image_HWC, label_HW, colours, 0.65),
        "errors (red), void (cream)": wrong,
    }
    height, width = image_HWC.shape[:2]
    figure = Figure(figsize=(16, 16 / 4 * min(2.0, height / width) + 0.9), dpi=100, layout="constrained")
    for axes, (name, picture) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
    present = sorted(set(np.unique(truth_HW[known])) | set(np.unique(label_HW)))
    patches = [Patch(color=_rgb(colours[c]), label=classes[c]["name"]) for c in present]
    figure.legend(handles=patches, loc="outside lower center", ncols=max(1, min(len(patches), 10)), fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _rgb(colour: Sequence[int]) -> tuple[float, float, float]:
    """0..255 -> 0..1, as Matplotlib has it."""
    red, green, blue = (part / 255 for part in colour)
    return red, green, blue


def confusion_rows(confusion_KK: NDArray[np.integer], names: Sequence[str]) -> list[tuple[str, str]]:
    """(actual, predicted) rows for DVC's confusion template: 200 for each class that occurs, shared out by largest
    remainder.
    """
    rows = []
    for actual, counts in zip(names, confusion_KK, strict=True):
        if not counts.sum():
            continue
        exact = ROWS_PER_CLASS * counts / counts.sum()
        share = np.floor(exact).astype(int)
        left = ROWS_PER_CLASS - share.sum()
        share[np.argsort(share - exact, kind="stable")[:left]] += 1
        rows += [(actual, predicted) for predicted, n in zip(names, share, strict=True) for _ in range(n)]
    return rows


def _csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic.write_text(path, text.getvalue())


def write(
    folder: Path, value: Scores, result: "Result",
    previews: Iterable[tuple["Sample", NDArray[np.uint8], float]], meta: Mapping[str, Any],
) -> None:  # fmt: skip
    """All pictures and plot tables of an evaluation into `folder`."""
    names, total = [c["name"] for c in meta["classes"]], result.total
    save(confusion_figure(total.confusion_KK, names), folder / "confusion.png")
    save(class_figure(value.per_class, value.miou), folder / "classes.png")
    table_B3 = metrics.reliability(total.calibration_L2)
    save(reliability_figure(table_B3, value.ece), folder / "calibration.png")
    _csv(folder / "confusion.csv", ("actual", "predicted"), confusion_rows(total.confusion_KK, names))
    rows = [(name, row.iou, *(row.ci or (None, None))) for name, row in value.per_class.items()]
    _csv(folder / "classes.csv", ("class", "iou", "low", "high"), rows)
    _csv(
        folder / "calibration.csv", ("confidence", "accuracy", "pixels"), [(c, a, int(n)) for n, c, a in table_B3 if n]
    )
    for number, (sample, label_HW, accuracy) in enumerate(previews):
        assert sample.truth_HW is not None
        title = f"{sample.row.name}: {100 * accuracy:.1f}% of pixels right"
        figure = overlay_figure(sample.image_HWC, sample.truth_HW, label_HW, meta["classes"], meta["ignore"], title)
        save(figure, folder / f"overlay_{number:02d}.png")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
