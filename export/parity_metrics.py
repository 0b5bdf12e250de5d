"""How far an exported form of the network is from torch: counted pixel by pixel on real images, judged by bars.

Two places: the padded working grid (the graph alone) and the original resolution (what a user gets). Arg max
agreement of class c is judged on the pixels that torch calls c. Any class below its bar fails although the mean may
pass, and near-ties are not forgiven: how many of the differing pixels are near-ties, or lie beside a border between
classes, is told beside the verdict, nothing more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.runtime.runtime import Runtime
from pipeline import config, console
from pipeline.champions import metrics as scores
from pipeline.imaging import resize
from pipeline.storage import manifest
from training import inference, metrics
from training.methods.s4mc import margin

NEAR_TIE = 1e-4
SEGMENT_CHECKS = 4


@dataclass(frozen=True)
class Agreement:
    """Torch (rows) against runtime (columns), pixels, on one grid."""

    pairs_KK: NDArray[np.int64]

    @property
    def overall(self) -> float:
        return float(np.trace(self.pairs_KK) / max(1, self.pairs_KK.sum()))

    def per_class(self, names: Sequence[str]) -> dict[str, float | None]:
        """Share of the pixels torch calls a class on which the runtime agrees; None for a class torch never answers."""
        torch_says = self.pairs_KK.sum(1)
        right = np.diagonal(self.pairs_KK)
        return {name: float(right[c] / torch_says[c]) if torch_says[c] else None for c, name in enumerate(names)}

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        return {"agreement": self.overall, "pixels": int(self.pairs_KK.sum()), "per_class": self.per_class(names)}


@dataclass(frozen=True)
class Measured:
    """What both sides answered, counted: agreement on both grids, confusion with the masks at original resolution.

    border: the grid's pixels beside another class (or the image's edge) in torch's answer.
    """

    grid: Agreement
    original: Agreement
    torch_KK: NDArray[np.int64]
    runtime_KK: NDArray[np.int64]
    near_ties: int
    differing: int
    confidence_levels: int
    served: float
    images: int
    border: Agreement | None = None


class _Counts:
    """The sums behind one `Measured`."""

    def __init__(self, classes: int, ignore: int, border_px: int) -> None:
        self.classes, self.ignore, self.border_px = classes, ignore, border_px
        self.grid, self.border, self.original, self.ours, self.theirs = np.zeros((5, classes, classes), np.int64)
        self.near = self.differing = self.confidence_levels = self.images = 0
        self.served = 1.0

    def add(
        self, runtime: Runtime, samples: Sequence[inference.Sample], label: NDArray[np.uint8], confidence: NDArray[np.uint8],
        close: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        answer, sure = runtime.run(np.stack([s.input_HWC for s in samples]))
        other = label != answer
        self.near, self.differing = self.near + int((other & close).sum()), self.differing + int(other.sum())
        if not other.all():
            gap = np.abs(confidence.astype(int) - sure.astype(int))[~other]
            self.confidence_levels = max(self.confidence_levels, int(gap.max()))
        for sample, mine, its in zip(samples, label, answer, strict=True):
            self.grid += metrics.confusion(mine, its, self.classes, self.ignore)
            rim = metrics.boundary(mine, self.border_px)
            self.border += metrics.confusion(mine[rim], its[rim], self.classes, self.ignore)
            sized, its_sized = resize.restore(mine, sample.fit), resize.restore(its, sample.fit)
            self.original += metrics.confusion(sized, its_sized, self.classes, self.ignore)
            assert sample.truth_HW is not None
            self.ours += metrics.confusion(sample.truth_HW, sized, self.classes, self.ignore)
            self.theirs += metrics.confusion(sample.truth_HW, its_sized, self.classes, self.ignore)
            if self.images < SEGMENT_CHECKS:
                answered = runtime.segment(sample.image_HWC).label_HW
                self.served = min(self.served, float((answered == its_sized).mean()))
            self.images += 1

    def measured(self) -> Measured:
        return Measured(
            Agreement(self.grid), Agreement(self.original), self.ours, self.theirs, self.near, self.differing,
            self.confidence_levels, self.served, self.images, Agreement(self.border),
        )  # fmt: skip


def measure(
    model: nn.Module, runtimes: Mapping[str, Runtime], batches: Sequence[list[manifest.Row]], *,
    policy: config.Input, classes: int, ignore: int, max_pixels: int, border_px: int,
) -> tuple[dict[str, Measured], dict[str, str]]:  # fmt: skip
    """Run every batch through torch and every runtime; the first few images also through the call that serving makes.

    Returns what was counted, and for each runtime that failed on the way why; the first runtime's failure is raised.
    """
    first, failed = next(iter(runtimes)), dict[str, str]()
    where = next(model.parameters()).device
    counts = {name: _Counts(classes, ignore, border_px) for name in runtimes}
    with console.bar("parity", sum(map(len, batches))) as bar:
        for samples in inference.stream(batches, policy, max_pixels, mask=True):
            with torch.inference_mode():
                logits_BKHW = model(inference.to_network(samples, where))
                label, confidence = (t.cpu().numpy() for t in inference.answer(logits_BKHW))
                close = (margin(torch.softmax(logits_BKHW.float(), 1)) < NEAR_TIE).cpu().numpy()
            for name in [name for name in runtimes if name not in failed]:
                try:
                    counts[name].add(runtimes[name], samples, label, confidence, close)
                except Exception as error:  # the runtimes' own exceptions share no base class
                    if name == first:
                        raise
                    failed[name] = str(error) or repr(error)
            bar.advance(len(samples))
    return {name: part.measured() for name, part in counts.items() if name not in failed}, failed


def judge(measured: Measured, names: Sequence[str], bars: config.ParityLimits, key: str = "parity") -> list[str]:
    """Every bar that is not met, each with the class and the numbers; empty when parity holds."""
    failures = []
    for place, agreement in (("working grid", measured.grid), ("original resolution", measured.original)):
        if agreement.overall < bars.agreement:
            failures.append(f"{place}: agreement {agreement.overall:.6f} is below {key}.agreement {bars.agreement:g}")
        for name, share in agreement.per_class(names).items():
            if share is not None and share < bars.class_agreement:
                failures.append(
                    f"{place}: class {name!r} agrees on {share:.6f} of its pixels, below {key}.class_agreement "
                    f"{bars.class_agreement:g} (overall {agreement.overall:.6f})"
                )
    if measured.served < bars.agreement:
        failures.append(
            f"serving's own path agrees with the graph on {measured.served:.6f} of an image's pixels, below "
            f"{key}.agreement {bars.agreement:g}: its input policy is not evaluation's"
        )
    drop = scores.miou(measured.torch_KK) - scores.miou(measured.runtime_KK)
    if not drop <= bars.miou_drop:
        failures.append(f"mIoU falls by {drop:.3f} points, more than {key}.miou_drop {bars.miou_drop:g}")
    lost = scores.iou(measured.torch_KK) - scores.iou(measured.runtime_KK)
    for name, points in zip(names, 100 * lost, strict=True):
        if points > bars.class_drop:
            failures.append(
                f"class {name!r} loses {points:.2f} points of IoU, more than {key}.class_drop {bars.class_drop:g}"
            )
    return failures


def report(measured: Measured, names: Sequence[str], bars: config.ParityLimits, key: str = "parity") -> dict[str, Any]:
    """The verdict and all numbers, as reports/parity.json holds them (without the names of the two sides)."""
    failures = judge(measured, names, bars, key)
    ours, theirs = scores.miou(measured.torch_KK), scores.miou(measured.runtime_KK)
    known = not (np.isnan(ours) or np.isnan(theirs))
    return {
        "passed": not failures,
        "failures": failures,
        "bars": {name: getattr(bars, name) for name in config.ParityLimits.model_fields},
        "images": measured.images,
        "original": measured.original.as_dict(names),
        "grid": measured.grid.as_dict(names),
        "miou_torch": ours if known else None,
        "miou_runtime": theirs if known else None,
        "miou_drop": ours - theirs if known else None,
        "differing_pixels": measured.differing,
        "near_ties_among_them": measured.near_ties,
        "near_tie_margin": NEAR_TIE,
        "class_drop": {
            name: None if np.isnan(v) else float(v)
            for name, v in zip(
                names, 100 * (scores.iou(measured.torch_KK) - scores.iou(measured.runtime_KK)), strict=True
            )
        },
        "border_agreement": None if measured.border is None else measured.border.overall,
        "serving_path_agreement": measured.served,
        "largest_confidence_gap": measured.confidence_levels,
    }
