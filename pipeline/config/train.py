"""Section `train`: the method, what belongs to each method, and the training loop."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Positive, Section, Share

# ceiling: labels alone, those of the unlabelled images too where they are only hidden; what methods are held against.
MethodName = Literal[
    "supervised", "ceiling", "fixmatch", "unimatch", "s4mc", "s4mc+unimatch", "corrmatch", "s4mc+corrmatch"
]  # fmt: skip


class FixMatchSettings(Section):
    """threshold: the fixed one, of fixmatch, unimatch, and any method under `threshold_rule: fixed`."""

    threshold: Share


class UniMatchSettings(Section):
    """v2: EMA teacher and complementary dropout. v1: the student teaches itself, with feature perturbation."""

    streams: Literal["v1", "v2"]


class S4MCSettings(Section):
    """alpha: share of pixels left out at the first step, falling linearly to `alpha_end` at the last."""

    preset: Literal["paper", "weighted", "ref_a", "ref_b"]
    alpha: Share
    alpha_end: Share


class CorrMatchSettings(Section):
    """start: threshold at the first step, and of regions where the threshold is no probability. neighbours: positions of
    the correlation map that take part in a refinement, under `s4mc_corrmatch.correlated_neighbours`."""

    variant: Literal["corrected", "reference"]
    start: Share
    momentum: Share
    neighbours: Positive


class S4MCCorrMatchSettings(Section):
    """Which parts of S4MC the combination takes: its refined selection, its falling quantile as the threshold, and
    CorrMatch's correlated positions as the neighbours of the refinement."""

    refined_selection: bool
    falling_quantile: bool
    correlated_neighbours: bool


class OhemSettings(Section):
    """Online hard example mining: pixels whose class has less than `probability`, and at least `pixels` of them."""

    probability: Share
    pixels: Positive


class OptimizerSettings(Section):
    """AdamW with linear warm-up over `lr_warmup` steps, then polynomial decay."""

    lr: Annotated[float, Field(gt=0)]
    lr_encoder: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    poly_power: Annotated[float, Field(ge=0)]
    lr_warmup: Annotated[int, Field(ge=0)]
    clip_norm: Annotated[float, Field(gt=0)]


class CollapseSettings(Section):
    """So many steps without a kept pixel, or with one class holding `share` of the kept ones, stop the run."""

    steps: Positive
    share: Annotated[float, Field(gt=0, le=1)]


class Train(Section):
    method: MethodName
    fixmatch: FixMatchSettings
    unimatch: UniMatchSettings
    s4mc: S4MCSettings
    corrmatch: CorrMatchSettings
    s4mc_corrmatch: S4MCCorrMatchSettings
    teacher: Literal["auto", "ema", "self"]  # auto: as the method was published
    # What the EMA teacher looks at: the weak view, or the whole image, its answer being cut like the weak view.
    teacher_view: Literal["crop", "whole"]
    threshold_rule: Literal["auto", "fixed", "quantile", "class_max"]  # auto: as the method was published
    pseudo_labels: Path | None  # a folder of masks that another model made of unlabelled images

    steps: Positive
    # BatchNorm and in-batch CutMix both need a partner.
    batch_labelled: Annotated[int, Field(ge=2)]
    batch_unlabelled: Annotated[int, Field(ge=2)]
    accumulate: Positive  # micro-batches a step; both batch sizes are multiples of it
    crop: tuple[Positive, Positive]
    scale: tuple[float, float]
    rare_crops: Share  # of the labelled crops: placed so that they hold a class drawn by its rarity
    optimizer: OptimizerSettings
    ema: Share
    supervised_loss: Literal["ce", "ohem"]
    ohem: OhemSettings
    warmup_steps: Annotated[int, Field(ge=0)]
    ramp_steps: Annotated[int, Field(ge=0)]
    unsup_weight: Annotated[float, Field(ge=0)]
    cutmix: Share

    precision: Literal["auto", "fp32", "bf16"]
    compile: bool  # torch.compile: minutes of start-up for a faster step on a card
    val_every: Positive
    checkpoint_every: Positive
    collapse: CollapseSettings
    seed: Annotated[int, Field(ge=0)]
    deterministic: bool

    @property
    def labels_only(self) -> bool:
        """Whether unlabelled images play no part."""
        return self.method in ("supervised", "ceiling")

    @property
    def published_without_ema(self) -> bool:
        """Whether the method, as published, takes its pseudo-labels from the student's own pass."""
        return "corrmatch" in self.method or ("unimatch" in self.method and self.unimatch.streams == "v1")

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> "Train":
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {list(self.scale)}: give the smaller factor first, both above 0")
        return self

    @model_validator(mode="after")
    def _warm_up_leaves_steps(self) -> "Train":
        if not self.labels_only and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves no step of {self.steps} for the unlabelled images; lower it, "
                "or say method: supervised"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_are_equal_and_normalisable(self) -> "Train":
        if self.batch_labelled % self.accumulate or self.batch_unlabelled % self.accumulate:
            raise ValueError(
                f"accumulate {self.accumulate} does not divide batch_labelled {self.batch_labelled} and "
                f"batch_unlabelled {self.batch_unlabelled}"
            )
        if self.accumulate > 1 and min(self.batch_labelled, self.batch_unlabelled) // self.accumulate < 2:
            raise ValueError(
                f"accumulate {self.accumulate} leaves one image a micro-batch, and BatchNorm needs two: lower it, or raise "
                "batch_labelled and batch_unlabelled"
            )
        return self

    @model_validator(mode="after")
    def _neighbours_have_embeddings(self) -> "Train":
        reference = self.method == "s4mc+corrmatch" and self.corrmatch.variant == "reference"
        if reference and self.s4mc_corrmatch.correlated_neighbours:
            raise ValueError(
                "s4mc_corrmatch.correlated_neighbours needs corrmatch.variant: corrected (the published variant has no "
                "embeddings of its mix partner)"
            )
        return self

    @model_validator(mode="after")
    def _pseudo_labels_can_be_cut_into_micro_batches(self) -> "Train":
        by_student = self.teacher == "self" or self.published_without_ema
        if self.accumulate > 1 and not self.labels_only and by_student:
            raise ValueError(
                f"accumulate {self.accumulate}: {self.method} takes pseudo-labels from the student's own pass, which "
                "cannot be cut up exactly; set accumulate: 1 (or teacher: ema, unimatch.streams: v2 with unimatch)"
            )
        return self

    @model_validator(mode="after")
    def _whole_view_has_an_ema_teacher(self) -> "Train":
        its_own_teacher = self.teacher == "self" or (self.teacher == "auto" and self.published_without_ema)
        if self.teacher_view == "whole" and not self.labels_only and its_own_teacher:
            raise ValueError(
                f"teacher_view whole: {self.method} is its own teacher here and sees the weak view only; set teacher_view: "
                "crop, or teacher: ema"
            )
        return self

    @model_validator(mode="after")
    def _hard_pixels_come_from_a_whole_batch(self) -> "Train":
        if self.accumulate > 1 and self.supervised_loss == "ohem":
            raise ValueError("supervised_loss ohem picks its pixels over a whole batch; set accumulate: 1")
        return self
