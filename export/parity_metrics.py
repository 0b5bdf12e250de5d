"""How far an exported variant of the network is from torch, counted pixel by pixel on real images.

Two places: the padded working grid (the graph alone) and the original resolution (what a user gets). How many of the
differing pixels are near-ties, or lie beside a border between classes, is counted too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.runtime.runtime import Runtime
from pipeline import config, console
from pipeline.champions.parity_report import AgreementReport
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

    def report(self, names: Sequence[str]) -> AgreementReport:
        pixels = int(self.pairs_KK.sum())
        return AgreementReport(agreement=self.overall, pixels=pixels, per_class=self.per_class(names))


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


@dataclass(frozen=True)
class TestImages:
    """What is run through torch and the runtimes, how it is read, and how pixels are counted.

    border_px: how far from another class (or the image's edge) a pixel of torch's answer counts as beside a border.
    """

    batches: Sequence[list[manifest.Row]]
    policy: config.Input
    max_pixels: int
    classes: int
    ignore: int
    border_px: int

    __test__ = False  # no test class, whatever pytest makes of its name


@dataclass(frozen=True)
class _TorchAnswer:
    """uint8 class ids and confidence, and where torch's two likeliest classes are nearly as likely; each B x H x W."""

    label_BHW: NDArray[np.uint8]
    confidence_BHW: NDArray[np.uint8]
    near_tie_BHW: NDArray[np.bool_]


class _Counts:
    """The sums behind one `Measured`."""

    def __init__(self, images: TestImages) -> None:
        self.of = images
        self.grid, self.border, self.original, self.torch, self.runtime = np.zeros(
            (5, images.classes, images.classes), np.int64
        )
        self.near_ties = 0
        self.differing = 0
        self.confidence_levels = 0
        self.images = 0
        self.served = 1.0

    def add(self, runtime: Runtime, samples: Sequence[inference.Sample], torch_answer: _TorchAnswer) -> None:
        """Run the samples and count what comes back."""
        label_BHW, confidence_BHW = runtime.run(np.stack([s.input_HWC for s in samples]))
        self._compare(torch_answer, label_BHW, confidence_BHW)
        for sample, torch_HW, runtime_HW in zip(samples, torch_answer.label_BHW, label_BHW, strict=True):
            self._count(sample, torch_HW, runtime_HW)
            if self.images < SEGMENT_CHECKS:
                answered_HW = runtime.segment(sample.image_HWC).label_HW
                expected_HW = resize.restore(runtime_HW, sample.fit)
                self.served = min(self.served, float((answered_HW == expected_HW).mean()))
            self.images += 1

    def _compare(
        self, torch_answer: _TorchAnswer, label_BHW: NDArray[np.uint8], confidence_BHW: NDArray[np.uint8]
    ) -> None:
        """Differing pixels, the near-ties among them, and the largest gap in confidence where both agree."""
        differs_BHW = torch_answer.label_BHW != label_BHW
        self.near_ties += int((differs_BHW & torch_answer.near_tie_BHW).sum())
        self.differing += int(differs_BHW.sum())
        if not differs_BHW.all():
            gaps = np.abs(torch_answer.confidence_BHW.astype(int) - confidence_BHW.astype(int))[~differs_BHW]
            self.confidence_levels = max(self.confidence_levels, int(gaps.max()))

    def _count(self, sample: inference.Sample, torch_HW: NDArray[np.uint8], runtime_HW: NDArray[np.uint8]) -> None:
        """One image on the grid, beside its borders, at its original resolution and against its mask."""
        classes, ignore = self.of.classes, self.of.ignore
        self.grid += metrics.confusion(torch_HW, runtime_HW, classes, ignore)
        rim_HW = metrics.boundary(torch_HW, self.of.border_px)
        self.border += metrics.confusion(torch_HW[rim_HW], runtime_HW[rim_HW], classes, ignore)

        torch_sized_HW = resize.restore(torch_HW, sample.fit)
        runtime_sized_HW = resize.restore(runtime_HW, sample.fit)
        self.original += metrics.confusion(torch_sized_HW, runtime_sized_HW, classes, ignore)

        assert sample.truth_HW is not None
        self.torch += metrics.confusion(sample.truth_HW, torch_sized_HW, classes, ignore)
        self.runtime += metrics.confusion(sample.truth_HW, runtime_sized_HW, classes, ignore)

    def measured(self) -> Measured:
        return Measured(
            grid=Agreement(self.grid),
            original=Agreement(self.original),
            torch_KK=self.torch,
            runtime_KK=self.runtime,
            near_ties=self.near_ties,
            differing=self.differing,
            confidence_levels=self.confidence_levels,
            served=self.served,
            images=self.images,
            border=Agreement(self.border),
        )


def measure(
    model: nn.Module, runtimes: Mapping[str, Runtime], images: TestImages
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Run every batch through torch and every runtime; the first few images also through the call that serving makes.

    Returns what was counted, and for each runtime that failed on the way why; the first runtime's failure is raised.
    """
    first, failed = next(iter(runtimes)), dict[str, str]()
    counts = {name: _Counts(images) for name in runtimes}
    with console.bar("parity", sum(map(len, images.batches))) as bar:
        for samples in inference.stream(images.batches, images.policy, images.max_pixels, mask=True):
            torch_answer = _ask_torch(model, samples)
            for name in [name for name in runtimes if name not in failed]:
                try:
                    counts[name].add(runtimes[name], samples, torch_answer)
                except Exception as error:  # the runtimes' own exceptions share no base class
                    if name == first:
                        raise
                    failed[name] = str(error) or repr(error)
            bar.advance(len(samples))
    return {name: part.measured() for name, part in counts.items() if name not in failed}, failed


def _ask_torch(model: nn.Module, samples: Sequence[inference.Sample]) -> _TorchAnswer:
    with torch.inference_mode():
        logits_BKHW = model(inference.to_network(samples, next(model.parameters()).device))
        label_BHW, confidence_BHW = inference.answer(logits_BKHW)
        near_tie_BHW = margin(torch.softmax(logits_BKHW.float(), 1)) < NEAR_TIE
        return _TorchAnswer(label_BHW.cpu().numpy(), confidence_BHW.cpu().numpy(), near_tie_BHW.cpu().numpy())
