"""Every method as data: which hooks of `step.step` it uses, with which values. Sources stand beside each.

supervised, and ceiling, which differs in its labelled images alone; FixMatch with an EMA teacher and in-batch CutMix (the
base of all others); UniMatch V1 and V2 (Yang et al., CVPR 2023 and TPAMI 2025); S4MC (Kimhi et al., TMLR 2024); CorrMatch
(Sun et al., CVPR 2024); and their combinations.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from pipeline.config import Train
from training.engine.distributed import ALONE, Ranks
from training.methods import s4mc
from training.methods.losses import Normaliser
from training.methods.threshold import ClassMax, Fixed, Partition


class Threshold(Protocol):
    """A bar for scores: a scalar tensor for this batch at this (semi-supervised) step."""

    def value(self, score: Tensor, label: Tensor, valid: Tensor, step: int, ranks: Ranks = ALONE) -> Tensor: ...


@dataclass(frozen=True)
class Correlation:
    """CorrMatch's use of its correlation maps. The defaults correct what the published form has wrong; `REFERENCE` keeps it.

    regions: how overlapping region masks are applied, or "off". masks: how many rows of the map are drawn a step.
    bar: overlap and purity of a region; None: the method's own threshold (published), which only makes sense where
    that is a probability. mixed_target: the KL target goes through CutMix like the image (published: it does not).
    mixed_valid: the threshold sees the mixed mask beside unmixed predictions (published). last: the last position can
    be drawn (published: never). neighbours: how many of the most correlated positions take part in the union; 0: none.
    """

    regions: Literal["parallel", "sequential", "off"] = "parallel"
    masks: int = 128
    bar: float | None = None
    mixed_target: bool = True
    mixed_valid: bool = False
    last: bool = True
    neighbours: int = 0


REFERENCE = Correlation("sequential", mixed_target=False, mixed_valid=True, last=False)


@dataclass(frozen=True)
class Method:
    """Which hooks a method uses.

    threshold None: no unlabelled half. refinement None: raw maximum probability. teacher: the EMA network in eval mode,
    or the student itself by its train-mode pass over the weak view. streams: strong views. partner: whose pixels CutMix
    pastes, those of the next image in the batch or of another crop of the same one. weights: of the loss terms;
    a term that is absent or 0 is not computed.
    """

    refinement: s4mc.Refinement | None = None
    threshold: Threshold | None = None
    normaliser: Normaliser = "valid"
    strict: bool = False
    table_K: Tensor | None = None
    teacher: Literal["ema", "self"] = "ema"
    streams: int = 1
    dropout: Literal["none", "perturb", "complementary"] = "none"
    partner: Literal["batch", "same"] = "batch"
    correlation: Correlation | None = None
    weights: dict[str, float] = field(default_factory=lambda: {"supervised": 1.0, "unsupervised": 1.0})
    hard: int = 0  # supervised loss over at least so many hard pixels (OHEM); 0: plain cross entropy
    sure: float = 0.7

    @property
    def feature_dropout(self) -> Literal["none", "perturb", "complementary"]:
        """What the student's features go through: nothing where the term that needs it has no weight."""
        return "none" if self.dropout == "perturb" and not self.weights.get("perturbed") else self.dropout

    @property
    def weak(self) -> bool:
        """Whether the student sees the weak views."""
        return self.teacher == "self" or self.feature_dropout == "perturb" or self.correlation is not None


# UniMatch V1: (L_x + 0.25 L_s1 + 0.25 L_s2 + 0.5 L_fp) / 2. V2: (L_x + (L_s1 + L_s2) / 2) / 2.
UNIMATCH = {
    "v1": {"supervised": 0.5, "unsupervised": 0.125, "unsupervised_2": 0.125, "perturbed": 0.25},
    "v2": {"supervised": 0.5, "unsupervised": 0.25, "unsupervised_2": 0.25},
}
# CorrMatch: [0.5 L_x + 0.5 L_xc + 0.25 L_s + 0.25 L_fp + 0.25 L_kl + 0.25 (L_cs + L_cw) / 2] / 2.
CORRMATCH = {
    "supervised": 0.25, "supervised_corr": 0.25, "unsupervised": 0.125, "perturbed": 0.125, "divergence": 0.125,
    "corr_strong": 0.0625, "corr_weak": 0.0625,
}  # fmt: skip


def build(config: Train, *, n_classes: int, total: int, epoch_steps: int, table_K: Tensor | None = None) -> Method:
    """The method named by `config.method`.

    Args:
        total: semi-supervised steps (after the warm-up); the quantile schedule runs over these.
        epoch_steps: steps of one pass over the unlabelled pool, for presets whose schedule moves once an epoch.
        table_K: class table for presets with joint = table, measured on the labelled split.
    """
    name = config.method
    method = Method(threshold=None if config.labels_only else Fixed(config.fixmatch.threshold))
    if "unimatch" in name:
        method = _unimatch(method, config)
    if "corrmatch" in name:
        method = _corrmatch(method, config, n_classes)
    if name == "s4mc+corrmatch":
        method = _combine(method, config, total)
    elif "s4mc" in name:
        method = _s4mc(method, config, total, epoch_steps, table_K)
    if config.threshold_rule != "auto" and method.threshold is not None:
        method = _barred(method, config, n_classes, total)
    if config.teacher != "auto":
        method = replace(method, teacher=config.teacher)
    if config.supervised_loss == "ohem":
        method = replace(method, hard=config.ohem.pixels, sure=config.ohem.probability)
    return method


def _partition(config: Train, total: int) -> Partition:
    return Partition(config.s4mc.alpha, config.s4mc.alpha_end, total)


def _s4mc(method: Method, config: Train, total: int, epoch_steps: int, table_K: Tensor | None) -> Method:
    how = s4mc.PRESETS[config.s4mc.preset]
    start, end = s4mc.ALPHA.get(config.s4mc.preset, (config.s4mc.alpha, config.s4mc.alpha_end))
    bar = Partition(start, end, total, every=epoch_steps if how.alpha_every == "epoch" else 1)
    return replace(
        method, refinement=how, threshold=bar, normaliser=how.normaliser, strict=how.strict, table_K=table_K
    )  # fmt: skip


def _unimatch(method: Method, config: Train) -> Method:
    weights = UNIMATCH[config.unimatch.streams]
    if config.unimatch.streams == "v1":
        return replace(method, streams=2, dropout="perturb", teacher="self", weights=weights)
    return replace(method, streams=2, dropout="complementary", weights=weights)


def _corrmatch(method: Method, config: Train, n_classes: int) -> Method:
    bar = ClassMax(n_classes, config.corrmatch.start, config.corrmatch.momentum)
    method = replace(method, threshold=bar, teacher="self", dropout="perturb", weights=CORRMATCH)
    if config.corrmatch.variant == "reference":
        return replace(method, correlation=REFERENCE, partner="same")
    return replace(method, correlation=Correlation())


def _combine(method: Method, config: Train, total: int) -> Method:
    """S4MC's refined selection, its falling quantile as the threshold, CorrMatch's correlated positions as neighbours.

    With the quantile, region acceptance gets its own constant: a quantile of scores is no overlap ratio. With CorrMatch's
    slow threshold the refined score is the highest probability, the scale that threshold lives on, and the threshold is
    fed raw scores: refined ones would push it to 1. Of S4MC's presets, `weighted` is followed here too.
    """
    assert method.correlation is not None
    correlation = method.correlation
    parts = config.s4mc_corrmatch
    if parts.refined_selection or parts.correlated_neighbours:
        score: Literal["margin", "max"] = "margin" if parts.falling_quantile else "max"
        ours = config.s4mc.preset == "weighted" and parts.refined_selection
        how = s4mc.PRESETS["weighted" if ours else "paper"]
        method = replace(method, refinement=replace(how, score=score), strict=parts.falling_quantile)
    if parts.falling_quantile:
        method = replace(method, threshold=_partition(config, total))
        correlation = replace(correlation, bar=config.corrmatch.start)
    if parts.correlated_neighbours:
        correlation = replace(correlation, neighbours=config.corrmatch.neighbours)
    return replace(method, correlation=correlation)


def _barred(method: Method, config: Train, n_classes: int, total: int) -> Method:
    """Another method's bar, for the ablation {fixed, quantile, class_max} of every method."""
    bars: dict[str, Threshold] = {
        "fixed": Fixed(config.fixmatch.threshold), "quantile": _partition(config, total),
        "class_max": ClassMax(n_classes, config.corrmatch.start, config.corrmatch.momentum),
    }  # fmt: skip
    if (
        method.correlation is not None and config.threshold_rule == "quantile"
    ):  # a quantile of scores is no overlap ratio
        method = replace(method, correlation=replace(method.correlation, bar=config.corrmatch.start))
    return replace(method, threshold=bars[config.threshold_rule])


def needs_table(config: Train) -> bool:
    """Whether the method's preset uses the class table (`s4mc.neighbour_table`)."""
    return config.method in ("s4mc", "s4mc+unimatch") and s4mc.PRESETS[config.s4mc.preset].joint == "table"


def fixed(method: Method, bar: float) -> Method:
    """The same method with a fixed bar (for ablations and the equivalence S4MC(beta 0, fixed) = FixMatch)."""
    return replace(method, threshold=Fixed(bar))
