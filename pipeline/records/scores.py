"""How good weights are on the test split (reports/scores.json, and a champion's scores.json)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Totals(BaseModel):
    """Scalars of a set of images: mIoUs and boundary IoU in percent, pixel accuracy and calibration error in 0..1.

    None where nothing was counted. miou skips classes that are absent from ground truth and prediction; miou_all has them
    as 0.
    """

    model_config = ConfigDict(frozen=True)

    miou: float | None
    miou_all: float | None
    boundary_iou: float | None
    pixel_accuracy: float | None
    ece: float


class ClassScores(BaseModel):
    """One class, in percent; None where it is absent. ci: 95 % interval of the IoU, over images. pixels: of ground truth."""

    model_config = ConfigDict(frozen=True)

    iou: float | None
    precision: float | None
    recall: float | None
    ci: tuple[float, float] | None
    pixels: int


class WeightsScores(Totals):
    """One of the two weights that a training leaves. miou_ci: 95 % interval over images. weights: sha256 of the file.
    val_miou: in percent; None without val images."""

    miou_ci: tuple[float, float] | None
    weights: str
    val_miou: float | None


class SplitScores(Totals):
    """One weights file on the test split, at each image's original resolution; a pixel at least was counted."""

    miou: float
    miou_all: float
    pixel_accuracy: float
    miou_ci: tuple[float, float] | None
    per_class: dict[str, ClassScores]
    absent: list[str]
    absent_rule: str
    boundary_px: int
    test_images: int
    test_hash: str
    split_hash: str
    data_hash: str
    stride: int
    crop: str
    commit: str
    weights: str
    method: str
    steps: int
    seed: int

    def short(self, val_miou: float | None) -> WeightsScores:
        """The scalars alone, beside the mIoU on val."""
        totals = {name: getattr(self, name) for name in Totals.model_fields}
        return WeightsScores(**totals, miou_ci=self.miou_ci, weights=self.weights, val_miou=val_miou)


class Scores(SplitScores):
    """The scores of the weights that go on, those of the last step, and of the best on val beside them."""

    last: WeightsScores
    best: WeightsScores
    chosen: Literal["last"]

    @classmethod
    def of(cls, last: SplitScores, best: SplitScores, last_val: float | None, best_val: float | None) -> "Scores":
        fields = {name: getattr(last, name) for name in SplitScores.model_fields}
        return cls(**fields, last=last.short(last_val), best=best.short(best_val), chosen="last")
