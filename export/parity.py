"""Does the exported graph say what the torch student says? Measured on real test images, overall and per class.

Two places: the padded working grid (the graph alone) and the original resolution (what a user gets). Arg max
agreement of class c is judged on the pixels that torch calls c. Any class below its bar fails the run although the
mean may pass, and near-ties are not forgiven: how many of the differing pixels are near-ties is told beside the
verdict, nothing more.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from export import bundle
from export.runtime import Runtime
from pipeline import config, files, fit, manifest, progress, scores
from training import infer, metrics, models
from training.refine import margin

STUDENT = Path("models/student/student.safetensors")
SPLIT = Path("data/split")
NEAR_TIE = 1e-4
SEGMENT_CHECKS = 4


class ParityError(RuntimeError):
    """Parity cannot be measured; the message says what to do."""


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
    """What both sides answered, counted: agreement on both grids, confusion with the masks at original resolution."""

    grid: Agreement
    original: Agreement
    torch_KK: NDArray[np.int64]
    runtime_KK: NDArray[np.int64]
    near_ties: int
    differing: int
    confidence_levels: int
    served: float
    images: int


def pick(rows: Sequence[manifest.Row], count: int) -> list[manifest.Row]:
    """At most `count` rows spread evenly over the list, by id, so that the choice does not follow the order of
    files.
    """
    ordered = sorted(rows, key=lambda row: row.id)
    if len(ordered) <= count:
        return ordered
    return [ordered[i * len(ordered) // count] for i in range(count)]


def measure(
    model: nn.Module, runtime: Runtime, batches: Sequence[list[manifest.Row]], *,
    policy: config.Input, classes: int, ignore: int, max_pixels: int,
) -> Measured:  # fmt: skip
    """Run every batch through both; the first few images also through the call that serving makes."""
    where = next(model.parameters()).device
    grid, original, ours, theirs = np.zeros((4, classes, classes), np.int64)
    near = differing = confidence_levels = images = 0
    served = 1.0
    with progress.bar("parity", sum(map(len, batches))) as bar:
        for samples in infer.stream(batches, policy, max_pixels, mask=True):
            with torch.inference_mode():
                logits_BKHW = model(infer.to_network(samples, where))
                label, confidence = (t.cpu().numpy() for t in infer.answer(logits_BKHW))
                close = (margin(torch.softmax(logits_BKHW.float(), 1)) < NEAR_TIE).cpu().numpy()
            answer, sure = runtime.run(np.stack([s.input_HWC for s in samples]))
            other = label != answer
            near, differing = near + int((other & close).sum()), differing + int(other.sum())
            if not other.all():
                gap = np.abs(confidence.astype(int) - sure.astype(int))[~other]
                confidence_levels = max(confidence_levels, int(gap.max()))
            grid += metrics.confusion(label, answer, classes, ignore)
            for sample, mine, its in zip(samples, label, answer, strict=True):
                sized, its_sized = fit.restore(mine, sample.fit), fit.restore(its, sample.fit)
                original += metrics.confusion(sized, its_sized, classes, ignore)
                assert sample.truth_HW is not None
                ours += metrics.confusion(sample.truth_HW, sized, classes, ignore)
                theirs += metrics.confusion(sample.truth_HW, its_sized, classes, ignore)
                if images < SEGMENT_CHECKS:
                    answered = runtime.segment(sample.image_HWC).label_HW
                    served = min(served, float((answered == its_sized).mean()))
                images += 1
            bar.advance(len(samples))
    return Measured(
        Agreement(grid), Agreement(original), ours, theirs, near, differing, confidence_levels, served, images
    )


def judge(measured: Measured, names: Sequence[str], bars: config.Parity) -> list[str]:
    """Every bar that is not met, each with the class and the numbers; empty when parity holds."""
    failures = []
    for place, agreement in (("working grid", measured.grid), ("original resolution", measured.original)):
        if agreement.overall < bars.agreement:
            failures.append(f"{place}: agreement {agreement.overall:.6f} is below parity.agreement {bars.agreement:g}")
        for name, share in agreement.per_class(names).items():
            if share is not None and share < bars.class_agreement:
                failures.append(
                    f"{place}: class {name!r} agrees on {share:.6f} of its pixels, below parity.class_agreement "
                    f"{bars.class_agreement:g} (overall {agreement.overall:.6f})"
                )
    if measured.served < bars.agreement:
        failures.append(
            f"serving's own path agrees with the graph on {measured.served:.6f} of an image's pixels, below "
            f"parity.agreement {bars.agreement:g}: its input policy is not evaluation's"
        )
    drop = scores.miou(measured.torch_KK) - scores.miou(measured.runtime_KK)
    if not drop <= bars.miou_drop:
        failures.append(f"mIoU falls by {drop:.3f} points, more than parity.miou_drop {bars.miou_drop:g}")
    return failures


def report(measured: Measured, names: Sequence[str], bars: config.Parity) -> dict[str, Any]:
    """The verdict and all numbers, as reports/parity.json holds them (without the names of the two sides)."""
    failures = judge(measured, names, bars)
    ours, theirs = scores.miou(measured.torch_KK), scores.miou(measured.runtime_KK)
    known = not (np.isnan(ours) or np.isnan(theirs))
    return {
        "passed": not failures,
        "failures": failures,
        "bars": bars.model_dump(),
        "images": measured.images,
        "original": measured.original.as_dict(names),
        "grid": measured.grid.as_dict(names),
        "miou_torch": ours if known else None,
        "miou_runtime": theirs if known else None,
        "miou_drop": ours - theirs if known else None,
        "differing_pixels": measured.differing,
        "near_ties_among_them": measured.near_ties,
        "near_tie_margin": NEAR_TIE,
        "serving_path_agreement": measured.served,
        "largest_confidence_gap": measured.confidence_levels,
    }


def _show(said: dict[str, Any], console: Console) -> None:
    verdict = "passed" if said["passed"] else "FAILED"
    table = Table(
        "agreement on", "working grid", "original", title=f"parity {verdict}: {said['provider']} against torch"
    )
    table.caption = (
        f"{said['images']} test images; mIoU torch {said['miou_torch']:.3f}, runtime {said['miou_runtime']:.3f}; "
        f"{said['differing_pixels']} pixels differ, {said['near_ties_among_them']} of them near-ties"
    )
    for name, share in said["grid"]["per_class"].items():
        cells = ["-" if v is None else f"{v:.6f}" for v in (share, said["original"]["per_class"][name])]
        table.add_row(name, *cells)
    table.add_row("all pixels", *(f"{said[place]['agreement']:.6f}" for place in ("grid", "original")), style="bold")
    console.print(table)


def run(params: config.Params, console: Console) -> bool:
    """The stage: bundle, student and test images -> reports/parity.json (written pass or fail)."""
    opened = bundle.open_bundle(Path("bundle"))
    model, meta = models.load(STUDENT)
    names = [c["name"] for c in meta["classes"]]
    policy = config.Input.model_validate(meta["params"]["input"])
    rows = pick([r for r in manifest.read(SPLIT / "manifest.parquet") if r.split == "test"], params.parity.images)
    if not rows:
        raise ParityError("the test split has no image: raise split.test, or name test images in the source's lists")
    measured = measure(
        model,
        Runtime(opened, provider="cpu"),
        infer.plan_batches(rows, policy, params.evaluate.batch),
        policy=policy,
        classes=len(names),
        ignore=meta["ignore"],
        max_pixels=params.ingest.max_pixels,
    )
    said = report(measured, names, params.parity)
    said |= {"bundle": opened.manifest.id, "weights": files.sha256(STUDENT), "provider": "onnxruntime cpu fp32"}
    files.write_json(Path("reports/parity.json"), said)
    _show(said, console)
    for failure in said["failures"]:
        Console(stderr=True).print(f"parity: {failure}", style="red", markup=False, soft_wrap=True)
    return bool(said["passed"])


def main() -> int:
    """Exit code 0 when every bar holds, 1 otherwise."""
    try:
        return 0 if run(config.load(), Console()) else 1
    except (
        ParityError,
        infer.MaskError,
        bundle.BundleError,
        manifest.ManifestError,
        models.WeightsError,
        config.ConfigError,
    ) as error:
        Console(stderr=True).print(f"parity: {error}", style="red", markup=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
