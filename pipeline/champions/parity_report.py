"""reports/parity.json: how far each exported variant is from torch, and which of them became the bundle.

The export's parity stage writes it; the gate reads the verdict in it.
"""

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from pipeline.config.quality import ParityLimits


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, serialize_by_alias=True)


class ParityVerdict(_Record):
    """What the gate asks of the report: did fp32 keep its limits, and for which weights and bundle (an id)."""

    passed: bool = False
    failures: tuple[str, ...] = ()
    weights: str | None = None
    bundle: str | None = None


class AgreementReport(_Record):
    """Share of the pixels on which the runtime answers what torch answers.

    per_class: of the pixels that torch calls that class; None for a class that torch never answers.
    """

    agreement: float
    pixels: int
    per_class: dict[str, float | None]


class VariantParity(_Record):
    """One variant against torch on test images: every limit that it breaks, and the numbers.

    `grid` is the padded working grid (the graph alone), `original` the images' own resolution. mIoU in points, None where
    it is not defined; `class_drop` IoU points lost. `near_ties_among_them`: differing pixels whose two likeliest classes
    are closer than `near_tie_margin`. `largest_confidence_gap` in levels of 0..255.
    """

    passed: bool
    failures: tuple[str, ...]
    limits: ParityLimits = Field(validation_alias=AliasChoices("limits", "bars"), serialization_alias="bars")
    images: int
    original: AgreementReport
    grid: AgreementReport
    miou_torch: float | None
    miou_runtime: float | None
    miou_drop: float | None
    differing_pixels: int
    near_ties_among_them: int
    near_tie_margin: float
    class_drop: dict[str, float | None]
    border_agreement: float | None
    serving_path_agreement: float
    largest_confidence_gap: int


class VariantReport(VariantParity):
    """A variant in one runtime: milliseconds for one image, times the speed of fp32, and why it is not in the bundle."""

    runtime: str
    device: str
    precision: str
    file: str
    name: str
    ms: float
    speedup: float
    left_out: str | None

    @property
    def admitted(self) -> bool:
        return self.left_out is None and self.passed


class ParityReport(VariantParity):
    """The verdict and numbers of fp32 in ONNX Runtime, and what became of every other variant.

    `weights` is the SHA-256 of the student's file, `bundle` the id of the bundle that was written, None where fp32 failed.
    `not_judged` gives reasons by name; `timed_on` image sizes as HEIGHTxWIDTH.
    """

    ms: float
    speedup: float
    weights: str
    provider: str
    bundle: str | None
    options: tuple[VariantReport, ...]
    not_judged: dict[str, str]
    timed_on: str
    threads: int
    machine: str
