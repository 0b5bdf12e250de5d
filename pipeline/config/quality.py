"""Sections `evaluate`, `export`, `parity`, `gate` and `pool`: how a trained model is measured and let into service."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Positive, Section, Share


class Evaluate(Section):
    """Scores on the test split: bootstrap rounds, width of the boundary band, pictures in the report."""

    bootstrap: Positive
    boundary_px: Positive
    previews: Annotated[int, Field(ge=0)]
    batch: Positive


class Export(Section):
    """Which cheaper precisions of the network are tried beside fp32; parity admits them or not."""

    int8: bool
    calibration_images: Positive  # training images that set the int8 ranges


class ParityLimits(Section):
    """What an exported precision must keep of torch's answers; a class outside its limit fails even if the mean passes.

    A rare class lies mostly beside borders, where near-ties are decided: int8 may move many of its few pixels without
    being any worse at them, so there its IoU (`class_drop`) is the sharper limit.
    """

    agreement: Share
    class_agreement: Share
    miou_drop: Annotated[float, Field(ge=0)]
    class_drop: Annotated[float, Field(ge=0)]  # IoU points that any one class may lose


class Parity(ParityLimits):
    """Limits of fp32, and of the lossy precisions."""

    half: ParityLimits  # fp16 and bf16
    int8: ParityLimits
    speedup: Annotated[float, Field(ge=1)]  # over fp32 in ONNX Runtime, or a precision is left out
    images: Positive

    def limits(self, precision: str) -> ParityLimits:
        """Those of `precision`: fp32, fp16, bf16 or int8."""
        return {"fp32": self, "int8": self.int8}.get(precision, self.half)


class Gate(Section):
    """When a new model replaces the champion."""

    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    bootstrap: Positive
    sequential: Literal["spend", "none"]  # of one test set: pipeline/champions/alpha_spending.py
    class_floor: Annotated[float, Field(ge=0)]
    guarded: tuple[str, ...]
    minimum_miou: Annotated[float, Field(ge=0, le=100)]


class Pool(Section):
    """predict, drift and rank over the unlabelled pool."""

    drift_p: Share
    permutations: Positive
    policy: Literal["warn", "hold", "train"]
    label_next: Positive
    suspects: Annotated[int, Field(ge=0)]  # masks of each split that are drawn for a second look
    max_images: Positive

    @model_validator(mode="after")
    def _can_flag(self) -> "Pool":
        if 1 / (1 + self.permutations) >= self.drift_p:
            raise ValueError(
                f"{self.permutations} permutations give no p below {1 / (1 + self.permutations):.3g}, so nothing could reach "
                f"drift_p {self.drift_p}; raise permutations"
            )
        return self
