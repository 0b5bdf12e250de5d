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
from pydantic import BaseModel, ConfigDict, field_serializer
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
SHOWN = 5  # of each split, in the table
PANEL = 320  # pixels of a picture's panel at most


class SuspectsError(ValueError):
    """The student and the data do not belong together; the message says what to do."""


class SuspectRecord(BaseModel):
    """A line of reports/suspect_labels.csv; box, pixels and classes are those of the heaviest region, in pixels of the image.

    Attributes:
        place: from 1, within the split. score: share of the labelled pixels to repaint, 0..1.
        given, suggested: names of the classes that the mask and the student have there.
        right, bottom: exclusive. picture: empty where none was drawn.
    """

    model_config = ConfigDict(frozen=True)

    split: str
    place: int
    score: float
    name: str
    dump: str
    group: str | None
    id: str
    given: str
    suggested: str
    region_pixels: int
    left: int
    top: int
    right: int
    bottom: int
    regions: int
    picture: str

    @field_serializer("score")
    def _six_digits(self, score: float) -> str:
        return f"{score:.6f}"


@dataclass(frozen=True)
class Suspect:
    """One image with at least one region, heaviest region first; regions are in pixels of the working size `scale`."""

    row: manifest.Row
    score: float
    regions: list[Region]
    scale: float


@dataclass(frozen=True)
class Survey:
    """A student and how it looks at masks. policy: the input policy that it was trained with."""

    model: nn.Module
    policy: config.Input
    params: config.Params
    classes: Sequence[dict[str, Any]]
    ignore: int

    @torch.inference_mode()
    def answers(
        self, rows: Sequence[manifest.Row], what: str
    ) -> Iterator[tuple[inference.Sample, NDArray[np.float32], NDArray[np.uint8]]]:
        """(sample, probability_KHW, mask_HW) of each row at working size, padding cut away."""
        where = next(self.model.parameters()).device
        batches = inference.plan_batches(rows, self.policy, self.params.evaluate.batch)
        with progress.bar(what, len(rows)) as bar:
            for samples in inference.stream(batches, self.policy, self.params.ingest.max_pixels, mask=True):
                logits_BKHW = self.model(inference.to_network(samples, where))
                probability_BKHW = torch.softmax(logits_BKHW.float(), dim=1).cpu().numpy()
                for sample, probability_KHW in zip(samples, probability_BKHW, strict=True):
                    assert sample.truth_HW is not None
                    height, width = sample.fit.scaled_height, sample.fit.scaled_width
                    mask_HW = resize.apply_mask(sample.truth_HW, sample.fit, ignore=self.ignore)[:height, :width]
                    yield sample, probability_KHW[:, :height, :width], mask_HW
                bar.advance(len(samples))

    def thresholds(self, rows: Sequence[manifest.Row], split: str) -> NDArray[np.float64]:
        """threshold_K: the mean confidence of each class over the masks of one split."""
        sum_K = np.zeros(len(self.classes))
        count_K = np.zeros(len(self.classes))
        for _, probability_KHW, mask_HW in self.answers(rows, f"{split}: confidence"):
            image_sum_K, image_count_K = confident_learning.self_confidence(probability_KHW, mask_HW)
            sum_K += image_sum_K
            count_K += image_count_K
        return confident_learning.thresholds(sum_K, count_K)

    def rank(self, rows: Sequence[manifest.Row], threshold_K: NDArray[np.float64], split: str) -> list[Suspect]:
        """Suspects of one split, first the one with most to repaint."""
        found = []
        for sample, probability_KHW, mask_HW in self.answers(rows, f"{split}: masks"):
            judged = self._suggestions(probability_KHW, mask_HW, threshold_K)
            if regions := confident_learning.regions(mask_HW, *judged, ignore=self.ignore):
                value = confident_learning.score(regions, mask_HW, ignore=self.ignore)
                found.append(Suspect(sample.row, value, regions, sample.row.width / sample.fit.scaled_width))
        return sorted(found, key=lambda suspect: (-suspect.score, suspect.row.id))

    def pictures(
        self, rows: Sequence[manifest.Row], threshold_K: NDArray[np.float64], split: str
    ) -> Iterator[tuple[str, bytes]]:
        """(image id, JPEG) of each row."""
        palette = [tuple(c["color"]) for c in self.classes]
        for sample, probability_KHW, mask_HW in self.answers(rows, f"{split}: pictures"):
            suggested_HW, _ = self._suggestions(probability_KHW, mask_HW, threshold_K)
            image_HWC = sample.input_HWC[: mask_HW.shape[0], : mask_HW.shape[1]]
            label_HW = probability_KHW.argmax(0).astype(np.uint8)
            yield sample.row.id, strip(image_HWC, mask_HW, label_HW, suggested_HW, palette)

    def _suggestions(
        self, probability_KHW: NDArray[np.float32], mask_HW: NDArray[np.uint8], threshold_K: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.floating]]:
        distance = self.params.evaluate.boundary_px
        return confident_learning.suggestions(
            probability_KHW, mask_HW, threshold_K, ignore=self.ignore, distance=distance
        )


def record(suspect: Suspect, split: str, place: int, names: Sequence[str], *, pictured: bool) -> SuspectRecord:
    first = suspect.regions[0]
    left, top, right, bottom = (round(edge * suspect.scale) for edge in first.box)
    return SuspectRecord(
        split=split,
        place=place,
        score=suspect.score,
        name=suspect.row.name,
        dump=suspect.row.dump,
        group=suspect.row.group,
        id=suspect.row.id,
        given=names[first.given],
        suggested=names[first.suggested],
        region_pixels=round(first.pixels * suspect.scale**2),
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        regions=len(suspect.regions),
        picture=picture(split, place).as_posix() if pictured else "",
    )


def table_csv(records: Sequence[SuspectRecord]) -> str:
    text = io.StringIO()
    out = csv.DictWriter(text, list(SuspectRecord.model_fields), lineterminator="\n")
    out.writeheader()
    out.writerows(found.model_dump() for found in records)
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
    policy = config.Input.model_validate(meta["params"]["input"])
    survey = Survey(model, policy, params, meta["classes"], meta["ignore"])
    names = [c["name"] for c in meta["classes"]]
    rows = manifest.read(paths.SPLIT_MANIFEST)

    records: list[SuspectRecord] = []
    pictured = params.pool.suspects
    with atomic.replacing_folder(paths.SUSPECTS) as folder:
        for split in SPLITS:
            ours = [row for row in rows if row.split == split]
            threshold_K = survey.thresholds(ours, split)
            suspects = survey.rank(ours, threshold_K, split)
            records += [record(s, split, i, names, pictured=i <= pictured) for i, s in enumerate(suspects, 1)]

            place = {s.row.id: i for i, s in enumerate(suspects[:pictured], 1)}
            for id, jpeg in survey.pictures([row for row in ours if row.id in place], threshold_K, split):
                atomic.write_bytes(folder / picture(split, place[id]).name, jpeg)
    atomic.write_text(paths.SUSPECT_LABELS, table_csv(records))

    shown = Table("split", "", "image", "score", "mask says", "student says", title=f"suspect masks: {paths.SUSPECTS}")
    for found in records:
        if found.place <= SHOWN:
            shown.add_row(found.split, str(found.place), found.name, f"{found.score:.3f}", found.given, found.suggested)
    return Result((shown,))
