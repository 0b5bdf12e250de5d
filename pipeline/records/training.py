"""What a training was and how it ended."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class GivenLabels(BaseModel):
    """Pseudo-labels that a training was given (`train.pseudo_labels`), as measured before its first step.

    Attributes:
        images: with a mask that is used. refused: masks that are not.
        coverage: share of their pixels with a label, 0..1.
        precision: share of the labels that are right, where a hidden label is known; None: nowhere.
        weighted_precision: the same, each pixel counting its confidence.
    """

    model_config = ConfigDict(frozen=True)

    images: int
    refused: int
    coverage: float
    precision: float | None
    weighted_precision: float | None


class TrainingSummary(BaseModel):
    """One training, as `dvc metrics`, the comparison and the student's own description have it (reports/train/train.json).

    Attributes:
        preset: of S4MC. best_step: of the best teacher on val; None without a validation.
        val_miou: in percent, of the last teacher; None without val images.
        kept, precision: of the pseudo-labels at the end, in 0..1; None where the method has none, or nothing was kept.
        precision_on: the labels that the precision was measured against.
        labelled, unlabelled: images. pseudo_labels: given from outside for some of those; None: none were.
        seconds: wall time. warm_start: weights that it began with.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    preset: str
    steps: int
    seed: int
    best_step: int | None
    val_miou: float | None
    kept: float | None
    precision: float | None
    precision_on: str
    labelled: int
    unlabelled: int
    pseudo_labels: GivenLabels | None
    seconds: float
    warm_start: str | None
    torch: str
    machine: str
    device: str
    split_hash: str
    data_hash: str


class TrainingRecord(TrainingSummary):
    """The summary, and what a champion's history says of its settings and data (models/student/train.json)."""

    params: dict[str, Any]
    dumps: dict[str, Any] | None
    counts: dict[str, int] | None
    label_hash: str | None
