"""What reports/screen.json, reports/drift.json and reports/served.json say."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Finding(BaseModel):
    """One dump against the reference. `spread` is what the energy must exceed beside p, None if not used."""

    model_config = ConfigDict(frozen=True)
    energy: float
    p: float
    rule: str
    spread: float | None
    drifted: bool
    images: int
    reference: int  # images of the reference


class AreaShift(BaseModel):
    """A class's mean share of the pixels on both sides, p that chance moves any class as far, and whether it moved."""

    model_config = ConfigDict(frozen=True)
    reference: float
    dump: float
    p: float
    moved: bool


class MeanShift(BaseModel):
    """Means of both sides, and their difference in standard deviations of the reference."""

    model_config = ConfigDict(frozen=True)
    reference: float
    dump: float
    deviations: float


class MarginHistograms(BaseModel):
    """Share of pixels by refined margin, in equal bins of 0..1."""

    model_config = ConfigDict(frozen=True)
    reference: list[float]
    dump: list[float]


class AnswerShifts(BaseModel):
    """How the student's answers on a dump differ from those on the reference; areas by class name."""

    model_config = ConfigDict(frozen=True)
    confidence: MeanShift
    margin: MeanShift
    entropy: MeanShift
    margins: MarginHistograms
    area: dict[str, AreaShift]


class DumpDrift(Finding):
    """The finding of the first source, drifted if any source says so.

    `sources`: of the first one whether it drifted, of others the finding. `shifts` is given where there are answers.
    """

    sources: dict[str, bool | Finding]
    shifts: AnswerShifts | None = None


class DriftReport(BaseModel):
    """All later dumps against the reference; `drifted` and `held` are names of dumps."""

    model_config = ConfigDict(frozen=True)
    space: str
    drift_p: float
    permutations: int
    policy: str
    dumps: dict[str, DumpDrift]
    drifted: list[str]
    held: list[str]

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON, without what was not looked at."""
        return self.model_dump(mode="json", exclude_unset=True)


class ServedReport(Finding):
    """What the service answers against the champion's answers on its training images."""

    source: str
    bundle: str
    warning: str | None
    area: dict[str, AreaShift]
