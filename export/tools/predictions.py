"""What `marginalia predict` writes: pictures of each image's answer, and lists of what was done.

OUT/NAME.png              class ids with the classes' palette
OUT/overlays/NAME.jpg     the classes' colours over the image
OUT/confidence/NAME.png   grey, 0..255 = 0..1 (--confidence)
OUT/predictions.csv       a line an image; predictions.json: the same with the run's facts
OUT/quarantine.json       what was not predicted, and why
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from rich.markup import escape
from rich.table import Table

from export.bundle.manifest import Manifest
from export.tools.inputs import Quarantined, SourceError
from pipeline.imaging import label_maps
from pipeline.storage import atomic

OVERLAY_ALPHA, JPEG_QUALITY = 0.5, 90  # what the service answers with
JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
LISTED = "predictions.json"
STRIP = 256  # rows that are blended and counted at a time: both need several times the memory of what they read


class Prediction(BaseModel):
    """One predicted image: its size in pixels, each class's share of the area, mean confidence 0..1, and the seconds
    spent on it from decoding to writing, waiting excluded."""

    model_config = ConfigDict(frozen=True)

    file: str
    mask: str
    width: int
    height: int
    area: dict[str, float]
    confidence: float
    seconds: float


class PredictionRun(BaseModel):
    """What a run did; `seconds` from the first image's reading to the last one's writing."""

    model_config = ConfigDict(frozen=True)

    bundle: str
    provider: str
    precision: str
    images: tuple[Prediction, ...]
    quarantined: tuple[Quarantined, ...]
    seconds: float


@dataclass(frozen=True)
class Layout:
    """Where the pictures of an image go, and which are made."""

    output: Path
    overlay: bool
    confidence: bool

    def paths(self, name: str) -> dict[str, Path]:
        """The files of an image called `name`, by what they show: "mask", "overlay", "confidence"."""
        found = {"mask": self.output / f"{name}.png"}
        if self.overlay:
            found["overlay"] = self.output / "overlays" / f"{name}.jpg"
        if self.confidence:
            found["confidence"] = self.output / "confidence" / f"{name}.png"
        return found

    def check(self, bundle: Path) -> None:
        """Refuse to write beside files that are not ours (a mask beside its photograph has our very name) or into a bundle.

        Raises SourceError.
        """
        output = self.output
        if output.is_relative_to(bundle):
            raise SourceError(
                f"{output}: lies in the bundle, which may hold nothing else; choose another output folder"
            )
        if output.exists() and not output.is_dir():
            raise SourceError(f"{output}: is a file; name a folder")
        if output.is_dir() and any(output.iterdir()) and not (output / LISTED).exists():
            raise SourceError(
                f"{output}: holds files that predict did not write and might replace; "
                "choose a new or empty output folder"
            )


def encode(
    kind: str, image_HWC: NDArray[np.uint8], label_HW: NDArray[np.uint8], confidence_HW: NDArray[np.uint8],
    manifest: Manifest,
) -> bytes:  # fmt: skip
    """The file that shows `kind`, one of the keys of `Layout.paths`."""
    if kind == "mask":
        return label_maps.encode_png(label_HW, manifest.palette)
    if kind == "overlay":
        return _overlay(image_HWC, label_HW, manifest)
    return label_maps.encode_png(confidence_HW)


def class_shares(label_HW: NDArray[np.uint8], manifest: Manifest) -> dict[str, float]:
    """Each class's share of the image's area."""
    pixels = np.sum([np.bincount(label_HW[rows].ravel(), minlength=256) for rows in _strips(len(label_HW))], axis=0)
    return {known.name: float(pixels[known.id] / label_HW.size) for known in manifest.classes}


def _strips(height: int) -> list[slice]:
    return [slice(top, top + STRIP) for top in range(0, height, STRIP)]


def _overlay(image_HWC: NDArray[np.uint8], label_HW: NDArray[np.uint8], manifest: Manifest) -> bytes:
    blended_HWC = np.empty_like(image_HWC)
    for rows in _strips(len(image_HWC)):
        blended_HWC[rows] = label_maps.overlay(image_HWC[rows], label_HW[rows], manifest.palette, OVERLAY_ALPHA)
    buffer = io.BytesIO()
    Image.fromarray(blended_HWC).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def write_lists(output: Path, run: PredictionRun, classes: Sequence[str]) -> None:
    """predictions.csv, predictions.json and quarantine.json."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "mask", "width", "height", *(f"area {name}" for name in classes), "confidence", "seconds"])
    for item in run.images:
        areas = (f"{item.area[name]:.6f}" for name in classes)
        rows.writerow(
            [item.file, item.mask, item.width, item.height, *areas, f"{item.confidence:.4f}", f"{item.seconds:.4f}"]
        )
    atomic.write_text(output / "predictions.csv", text.getvalue())
    atomic.write_json(output / LISTED, run.model_dump(mode="json", exclude={"quarantined"}))
    atomic.write_json(output / "quarantine.json", [item._asdict() for item in run.quarantined])


def record(run: PredictionRun) -> dict[str, object]:
    """The run as plain values: what predictions.json says, and what was quarantined."""
    return run.model_dump(mode="json") | {"quarantined": [item._asdict() for item in run.quarantined]}


def class_areas(images: Sequence[Prediction]) -> dict[str, float]:
    """Each class's share of all pixels of all images."""
    total = sum(item.width * item.height for item in images)
    names = images[0].area if images else {}
    return {name: sum(item.area[name] * item.width * item.height for item in images) / total for name in names}


def shown(run: PredictionRun, output: Path, most: int = 20) -> list[Table | str]:
    """One table of the run, and after it what was quarantined (the first `most`)."""
    table = Table(title=f"predictions in {escape(str(output))}", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("images", str(len(run.images)))
    table.add_row("quarantined", str(len(run.quarantined)), style="yellow" if run.quarantined else None)
    table.add_row("images/s", f"{len(run.images) / run.seconds:.1f}", end_section=True)
    for name, share in class_areas(run.images).items():
        table.add_row(escape(name), f"{share:.1%}")
    table.add_section()
    for name, value in (("provider", run.provider), ("precision", run.precision), ("bundle", run.bundle)):
        table.add_row(name, value)

    lines = [f"{item.file}: {item.reason}" for item in run.quarantined[:most]]
    if (more := len(run.quarantined) - most) > 0:
        lines.append(f"and {more} more in {output / 'quarantine.json'}")
    return [table, *lines]
