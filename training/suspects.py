"""Stage suspects: masks that the student confidently contradicts, most suspect first; for a person to look at.

Writes reports/suspect_labels.csv and, for the first `pool.suspects` of each split, reports/suspects/SPLIT-PLACE.jpg: image,
mask, prediction, and where and as what the student sees it otherwise. Labelled, val and test are ranked apart, each by its
own thresholds: the student has learnt the labelled masks, wrong ones too, and contradicts them less.

A suspect is a question, not an error: the network may be wrong. The student is run over these images twice, since the
thresholds are means over all of them.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from torch import nn

from pipeline import config, paths
from pipeline import console as progress
from pipeline.imaging import label_maps, resize
from pipeline.stage import Result
from pipeline.storage import atomic, manifest
from training import confident_learning, inference
from training.confident_learning import Region
from training.models import segmenter

SPLITS = ("labelled", "val", "test")
COLUMNS = (
    "split", "place", "score", "name", "dump", "group", "id", "given", "suggested", "region_pixels", "left", "top", "right",
    "bottom", "regions", "picture",
)  # fmt: skip
PANEL = 320  # pixels of a picture's panel at most


class SuspectsError(ValueError):
    """The student and the data do not belong together; the message says what to do."""


@dataclass(frozen=True)
class Suspect:
    """One image with at least one region, heaviest region first; regions are in pixels of the working size `scale`."""

    row: manifest.Row
    score: float
    regions: list[Region]
    scale: float


@torch.inference_mode()
def answers(
    model: nn.Module, rows: Sequence[manifest.Row], policy: config.Input, params: config.Params, ignore: int, what: str
) -> Iterator[tuple[inference.Sample, NDArray[np.float32], NDArray[np.uint8]]]:
    """(sample, probability_KHW, mask_HW) of each row at working size, padding cut away."""
    where = next(model.parameters()).device
    batches = inference.plan_batches(rows, policy, params.evaluate.batch)
    with progress.bar(what, len(rows)) as bar:
        for samples in inference.stream(batches, policy, params.ingest.max_pixels, mask=True):
            probability_BKHW = torch.softmax(model(inference.to_network(samples, where)).float(), dim=1).cpu().numpy()
            for sample, probability_KHW in zip(samples, probability_BKHW, strict=True):
                assert sample.truth_HW is not None
                height, width = sample.fit.scaled_height, sample.fit.scaled_width
                mask_HW = resize.apply_mask(sample.truth_HW, sample.fit, ignore=ignore)[:height, :width]
                yield sample, probability_KHW[:, :height, :width], mask_HW
            bar.advance(len(samples))


def rank(
    model: nn.Module, rows: Sequence[manifest.Row], policy: config.Input, params: config.Params, ignore: int, split: str
) -> tuple[list[Suspect], NDArray[np.float64]]:
    """Suspects of one split, first the one with most to repaint, and the thresholds that judged."""
    total, count = 0.0, 0.0
    for _, probability_KHW, mask_HW in answers(model, rows, policy, params, ignore, f"{split}: confidence"):
        ours = confident_learning.self_confidence(probability_KHW, mask_HW)
        total, count = total + ours[0], count + ours[1]
    threshold_K = confident_learning.thresholds(np.asarray(total), np.asarray(count))
    found = []
    for sample, probability_KHW, mask_HW in answers(model, rows, policy, params, ignore, f"{split}: masks"):
        judged = confident_learning.suggestions(
            probability_KHW, mask_HW, threshold_K, ignore=ignore, distance=params.evaluate.boundary_px
        )
        if regions := confident_learning.regions(mask_HW, *judged, ignore=ignore):
            value = confident_learning.score(regions, mask_HW, ignore=ignore)
            found.append(Suspect(sample.row, value, regions, sample.row.width / sample.fit.scaled_width))
    return sorted(found, key=lambda suspect: (-suspect.score, suspect.row.id)), threshold_K


def table_csv(by_split: dict[str, list[Suspect]], names: Sequence[str], pictured: int) -> str:
    """A line per suspect; the box and the classes are those of its heaviest region, in pixels of the image itself."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(COLUMNS)
    for split, suspects in by_split.items():
        for place, s in enumerate(suspects, 1):
            first = s.regions[0]
            box = [round(edge * s.scale) for edge in first.box]
            out.writerow((
                split, place, f"{s.score:.6f}", s.row.name, s.row.dump, s.row.group, s.row.id, names[first.given],
                names[first.suggested], round(first.pixels * s.scale**2), *box, len(s.regions),
                picture(split, place).as_posix() if place <= pictured else "",
            ))  # fmt: skip
    return text.getvalue()


def picture(split: str, place: int) -> Path:
    return paths.SUSPECTS / f"{split}-{place:03d}.jpg"


def strip(
    image_HWC: NDArray[np.uint8], mask_HW: NDArray[np.uint8], label_HW: NDArray[np.uint8],
    suggested_HW: NDArray[np.uint8], palette: Sequence[Any],
) -> bytes:  # fmt: skip
    """Image | mask | prediction | contradiction over the darkened image, as JPEG."""
    dark = image_HWC // 3
    panels = [
        image_HWC, label_maps.overlay(image_HWC, mask_HW, palette, 0.65), label_maps.overlay(image_HWC, label_HW,
        palette, 0.65), label_maps.overlay(dark, suggested_HW, palette, 0.9),
    ]  # fmt: skip
    factor = min(1.0, PANEL / max(image_HWC.shape[:2]))
    height, width = (max(1, round(side * factor)) for side in image_HWC.shape[:2])
    whole = Image.new("RGB", (4 * width + 12, height), (255, 255, 255))
    for place, panel in enumerate(panels):
        whole.paste(Image.fromarray(panel).resize((width, height)), (place * (width + 4), 0))
    buffer = io.BytesIO()
    whole.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def run(params: config.Params) -> Result:
    """The stage. Raises SuspectsError when the student was trained for other classes or on another split."""
    model, meta = segmenter.load(paths.STUDENT_WEIGHTS, inference.device())
    summary = atomic.read_json(paths.SPLIT_SUMMARY)
    if any(meta[key] != summary[key] for key in ("classes", "split_hash")):
        raise SuspectsError(
            f"{paths.STUDENT_WEIGHTS} was trained for other classes or on another split: train again (`dvc repro`)"
        )
    policy, ignore = config.Input.model_validate(meta["params"]["input"]), meta["ignore"]
    names, palette = ([c[key] for c in meta["classes"]] for key in ("name", "color"))
    rows = manifest.read(paths.SPLIT_MANIFEST)
    found: dict[str, list[Suspect]] = {}
    with atomic.replacing_folder(paths.SUSPECTS) as folder:
        for split in SPLITS:
            ours = [row for row in rows if row.split == split]
            found[split], threshold_K = rank(model, ours, policy, params, ignore, split)
            first = {s.row.id: place for place, s in enumerate(found[split][: params.pool.suspects], 1)}
            again = [row for row in ours if row.id in first]
            for sample, probability_KHW, mask_HW in answers(model, again, policy, params, ignore, f"{split}: pictures"):
                suggested_HW, _ = confident_learning.suggestions(
                    probability_KHW, mask_HW, threshold_K, ignore=ignore, distance=params.evaluate.boundary_px
                )
                image_HWC = sample.input_HWC[: mask_HW.shape[0], : mask_HW.shape[1]]
                label_HW = probability_KHW.argmax(0).astype(np.uint8)
                data = strip(image_HWC, mask_HW, label_HW, suggested_HW, [tuple(c) for c in palette])
                atomic.write_bytes(folder / picture(split, first[sample.row.id]).name, data)
    atomic.write_text(paths.SUSPECT_LABELS, table_csv(found, names, params.pool.suspects))
    shown = Table("split", "", "image", "score", "mask says", "student says", title=f"suspect masks: {paths.SUSPECTS}")
    for split, suspects in found.items():
        for place, s in enumerate(suspects[:5], 1):
            first_region = s.regions[0]
            pair = names[first_region.given], names[first_region.suggested]
            shown.add_row(split, str(place), s.row.name, f"{s.score:.3f}", *pair)
    return Result((shown,))
