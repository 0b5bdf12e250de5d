"""What the pseudo-labels do: kept ratio and precision per class, accumulated on the device and fetched now and then."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.engine.distributed import ALONE, Ranks
from training.methods.selection import Selection


@dataclass(frozen=True)
class Report:
    """Shares in [0, 1] since the last fetch; NaN where nothing was seen.

    kept: kept pixels / valid pixels; kept_K: per pseudo-label class.
    precision: correct / kept, against hidden labels (masks that exist but are never trained on); precision_K per class.
    bar: mean threshold; top_class: share of the kept pixels that the most frequent class, number `top`, holds.
    """

    kept: float
    precision: float
    bar: float
    top_class: float
    top: int
    kept_K: list[float]
    precision_K: list[float]

    def row(self, unsup_weight: float) -> dict[str, float]:
        """The report as columns of the training's history."""
        return {
            "kept": self.kept,
            "precision": self.precision,
            "threshold": self.bar,
            "top_class": self.top_class,
            "unsup_weight": unsup_weight,
            **{f"kept_{i}": value for i, value in enumerate(self.kept_K)},
            **{f"precision_{i}": value for i, value in enumerate(self.precision_K)},
        }


class PseudoLabels:
    """Counts per class: valid pixels, kept, kept with a hidden label, and correct among those."""

    def __init__(self, n_classes: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.n, self.ranks = n_classes, ranks
        self.counts = torch.zeros(4, n_classes, dtype=torch.float64, device=device)
        self.bars = torch.zeros(2, dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Counts over all ranks, which must call this together."""
        return {"counts": self.ranks.add(self.counts), "bars": self.bars}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"].to(self.counts.device)
        self.bars = state["bars"].to(self.bars.device)
        if self.ranks.rank:  # the first rank has everybody's
            self.counts.zero_()

    @torch.no_grad()
    def add(self, selection: Selection, valid_BHW: Tensor, hidden_BHW: Tensor, ignore: int) -> None:
        """Count one selection. hidden_BHW holds `ignore` where no hidden label is known; no transfer to the host."""
        known, right = hidden_BHW != ignore, hidden_BHW == selection.label_BHW
        kind = valid_BHW.long() + (selection.keep_BHW.long() * (1 + known.long() * (1 + right.long())))
        joint = (kind * self.n + selection.label_BHW).flatten()
        # Not bincount: on a card it asks for the largest value first and waits for the answer.
        counts = torch.zeros(5 * self.n, dtype=torch.int64, device=joint.device)
        counts.scatter_add_(0, joint, torch.ones_like(joint))
        _, rejected, unknown, wrong, correct = counts.view(5, self.n).double()
        kept = unknown + wrong + correct
        self.counts += torch.stack([rejected + kept, kept, wrong + correct, correct])
        self.bars += torch.stack([selection.bar.double().clamp_min(0), torch.ones_like(self.bars[0])])

    def fetch(self) -> Report:
        """Shares over all ranks since the last call; resets the counts."""
        valid, kept, known, correct = self.ranks.add(self.counts).to("cpu", copy=True)  # a view would be zeroed below
        total, steps = self.bars.tolist()
        self.counts.zero_()
        self.bars.zero_()

        def share(part: Tensor, whole: Tensor) -> float:
            return float(part / whole) if whole > 0 else float("nan")

        return Report(
            share(kept.sum(), valid.sum()),
            share(correct.sum(), known.sum()),
            total / steps if steps else float("nan"),
            share(kept.max(), kept.sum()),
            int(kept.argmax()),
            [share(a, b) for a, b in zip(kept, valid, strict=True)],
            [share(a, b) for a, b in zip(correct, known, strict=True)],
        )
