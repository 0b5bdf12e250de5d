"""supervised, FixMatch and S4MC as one step: views -> teacher -> refine -> threshold -> select -> mix -> student -> losses.

FixMatch (Sohn et al. 2020) in its segmentation form with an EMA teacher is the base; S4MC replaces the choice of pixels.
A method is data (`Method`), the step is one function that can be read from top to bottom.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from pipeline.config import Train
from training import augment, refine
from training.augment import View
from training.threshold import Fixed, Partition


class Threshold(Protocol):
    """A bar for scores: a scalar tensor for this batch at this (semi-supervised) step."""

    def value(self, score: Tensor, valid: Tensor, step: int) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """Which hooks a method uses. `refinement` None: raw maximum probability; `threshold` None: no unlabelled half."""

    refinement: refine.Refinement | None = None
    threshold: Threshold | None = None
    normaliser: Literal["valid", "kept", "ratio"] = "valid"
    strict: bool = False
    table_K: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """A term as sum and count, so that micro-batches and ranks can add both before dividing once."""

    total: Tensor
    count: Tensor
    weight: float = 1.0

    def mean(self) -> Tensor:
        """sum / count; exactly 0, still connected to the graph, when nothing counts."""
        return self.total / self.count.clamp_min(1)


@dataclass(frozen=True)
class Selection:
    """Pseudo-labels of a weak view: label_BHW int64, keep_BHW bool, and the bar that chose them (scalar)."""

    label_BHW: Tensor
    keep_BHW: Tensor
    bar: Tensor
    score_BHW: Tensor


def build(config: Train, *, total: int, epoch_steps: int, table_K: Tensor | None = None) -> Method:
    """The method named by `config.method`.

    Args:
        total: semi-supervised steps (after the warm-up); the quantile schedule runs over these.
        epoch_steps: steps of one pass over the unlabelled pool, for presets whose schedule moves once an epoch.
        table_K: class table for presets with joint = table, measured on the labelled split.
    """
    if config.method == "supervised":
        return Method()
    if config.method == "fixmatch":
        return Method(threshold=Fixed(config.threshold))
    how = refine.PRESETS[config.preset]
    start, end = refine.ALPHA.get(config.preset, (config.alpha, config.alpha_end))
    partition = Partition(start, end, total, every=epoch_steps if how.alpha_every == "epoch" else 1)
    return Method(how, partition, how.normaliser, how.strict, table_K)


def needs_table(config: Train) -> bool:
    """Whether the method's preset uses the class table (`refine.neighbour_table`)."""
    return config.method == "s4mc" and refine.PRESETS[config.preset].joint == "table"


def fixed(method: Method, bar: float) -> Method:
    """The same method with a fixed bar (for ablations and the equivalence S4MC(beta 0, fixed) = FixMatch)."""
    return replace(method, threshold=Fixed(bar))


@torch.no_grad()
def select(method: Method, logits_BKHW: Tensor, valid_BHW: Tensor, step: int) -> Selection:
    """Teacher logits -> pseudo-labels and which of them count. Invalid pixels influence neither the bar nor the loss."""
    assert method.threshold is not None
    prob = logits_BKHW.float().softmax(1) * valid_BHW[:, None]  # outside the photograph nothing supports anything
    if method.refinement is None:
        raw, label = prob.max(1)
        refined = raw
        reference = raw
    else:
        raw, refined, label = refine.scores(prob, method.refinement, method.table_K)
        reference = refined if method.refinement.quantile_from == "refined" else raw
    bar = method.threshold.value(reference, valid_BHW, step)
    keep = (refined > bar) if method.strict else (refined >= bar)
    return Selection(label, keep & valid_BHW & refined.isfinite(), bar, refined)


def supervised_loss(logits_BKHW: Tensor, label_BHW: Tensor, ignore: int) -> Loss:
    """Cross entropy over pixels that are not `ignore`."""
    total = F.cross_entropy(logits_BKHW.float(), label_BHW, ignore_index=ignore, reduction="sum")
    return Loss(total, (label_BHW != ignore).sum())


def masked_loss(
    logits_BKHW: Tensor,
    label_BHW: Tensor,
    keep_BHW: Tensor,
    valid_BHW: Tensor,
    normaliser: Literal["valid", "kept", "ratio"],
    weight: float = 1.0,
) -> Loss:
    """Cross entropy over kept pixels.

    Divided by the valid pixels (FixMatch), by the kept ones, or by kept^2 / valid (`ratio`: the mean over kept pixels
    times valid / kept, as one public code base has it). With zero kept pixels the loss and its gradient are exactly 0.
    """
    # where before the product: a non-finite loss at a dropped pixel must not turn into 0 * inf.
    each = F.cross_entropy(logits_BKHW.float(), label_BHW, reduction="none")
    total = torch.where(keep_BHW, each, 0.0).sum()
    kept, valid = keep_BHW.sum(), valid_BHW.sum()
    count = {"valid": valid, "kept": kept, "ratio": kept.float().square() / valid.clamp_min(1)}[normaliser]
    if normaliser == "ratio":  # counts below 1 are meaningful here; only an empty selection is not
        count = torch.where(kept > 0, count, torch.ones_like(count))
        return Loss(total / count, torch.ones_like(count), weight)
    return Loss(total, count, weight)


@dataclass(frozen=True)
class Step:
    """What one step gives the engine: loss terms by name, and the selection on the weak view for the diagnostics."""

    losses: dict[str, Loss]
    selection: Selection | None

    def loss(self) -> Tensor:
        return torch.stack([term.weight * term.mean() for term in self.losses.values()]).sum()


def step(
    method: Method,
    student: Callable[[Tensor], Tensor],
    teacher: nn.Module,
    labelled: View,
    unlabelled: View | None,
    *,
    ignore: int,
    at: int,
    unsup_weight: float,
    cutmix: float,
    generator: Generator,
) -> Step:
    """One training step's losses.

    Args:
        labelled, unlabelled: weak views; `unlabelled` None (or a method without threshold) trains on labels alone.
        at: semi-supervised step, from 0; drives the threshold's schedule.
        unsup_weight: factor of the unlabelled term at this step (ramped by the engine).
        cutmix: probability of a box per image.
    """
    if method.threshold is None or unlabelled is None:
        return Step({"supervised": supervised_loss(student(labelled.image_BCHW), labelled.label_BHW, ignore)}, None)
    with torch.no_grad():
        teacher_logits = teacher(unlabelled.image_BCHW)
    chosen = select(method, teacher_logits, unlabelled.valid_BHW, at)
    box = augment.boxes(len(chosen.label_BHW), chosen.label_BHW.shape[1:], cutmix, generator).to(
        chosen.label_BHW.device
    )
    # bf16 has 8 bits of mantissa: too few for pixels.
    with torch.autocast(unlabelled.image_BCHW.device.type, enabled=False):
        image = augment.mix(augment.strong(unlabelled.image_BCHW, generator), box)
    label, keep, valid = (augment.mix(v, box) for v in (chosen.label_BHW, chosen.keep_BHW, unlabelled.valid_BHW))
    logits = student(torch.cat([labelled.image_BCHW, image]))
    on_labelled, on_mixed = logits.split([len(labelled.label_BHW), len(label)])
    return Step(
        {
            "supervised": supervised_loss(on_labelled, labelled.label_BHW, ignore),
            "unsupervised": masked_loss(on_mixed, label, keep, valid, method.normaliser, unsup_weight),
        },
        chosen,
    )
