"""What stops a training: losses that are not finite, pseudo-labels that collapse, and a notice to the process.

Step by step everything stays on the device; the host looks when it logs.
"""

import signal
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from training.engine.distributed import ALONE, Ranks
from training.methods.pseudo_label_stats import Report

MAX_BAD_STEPS = 5


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message gives the reason and where the last good weights are."""


class SigtermNotice:
    """Within the block, SIGTERM (a spot notice) is noted instead of ending the process."""

    def __init__(self) -> None:
        self.arrived = False
        self._before: Any = None

    def __enter__(self) -> "SigtermNotice":
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread: signals are someone else's business
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.arrived = True


class Finite:
    """Counts steps in a row whose loss or gradient was not finite, and keeps BatchNorm's statistics out of them."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.buffers = list(model.buffers())
        self.before = [value.clone() for value in self.buffers]
        self.bad = torch.zeros((), dtype=torch.int64, device=device)
        self.most = torch.zeros((), dtype=torch.int64, device=device)
        self.recent: list[tuple[int, list[str]]] = []
        self.flags: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad = state["bad"].to(self.bad.device)

    def before_step(self, step: int, names: list[str]) -> None:
        torch._foreach_copy_(self.before, self.buffers)
        self.recent.append((step, names))

    def after_backward(self, loss: Tensor, norm: Tensor, optimizer: torch.optim.Optimizer, us: Ranks = ALONE) -> None:
        """Tell the (fused) optimiser whether to skip, and undo what a bad forward pass did to the statistics."""
        bad = us.highest((~(loss.isfinite() & norm.isfinite())).float())  # ranks skip together or not at all
        good = bad == 0
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        for value, before in zip(self.buffers, self.before, strict=True):
            value.copy_(torch.where(good, value, before))
        self.bad = torch.where(good, 0, self.bad + 1)
        self.most = torch.maximum(self.most, self.bad)
        self.flags.append(good)

    def check(self, where: object) -> None:
        """Raises TrainingStopped after MAX_BAD_STEPS bad steps in a row. Waits for the device: call it when logging."""
        flags, recent = torch.stack(self.flags).tolist(), self.recent
        self.flags, self.recent = [], []
        if int(self.most) < MAX_BAD_STEPS:
            return
        bad = [at for at, good in zip(recent, flags, strict=True) if not good]
        step, names = bad[-1] if bad else recent[-1]
        raise TrainingStopped(
            f"the loss or its gradient was not finite for {int(self.most)} steps in a row, the last at step {step} on "
            f"{', '.join(names)}; the last good weights are in {where}. Lower train.lr, or set train.precision: fp32"
        )


class Collapse:
    """Alarm when for `steps` steps no pixel was kept, or one class held more than `share` of what was kept."""

    def __init__(self, steps: int, share: float) -> None:
        self.steps, self.share = steps, share
        self.empty = self.alone = 0

    def state_dict(self) -> dict[str, Any]:
        return {"empty": self.empty, "alone": self.alone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.empty = state["empty"]
        self.alone = state["alone"]

    def look(self, report: Report, since: int) -> str | None:
        """Take in the report over the last `since` steps; the reason to stop, or None."""
        self.empty = self.empty + since if report.kept == 0 else 0
        self.alone = self.alone + since if report.top_class > self.share else 0
        if self.empty >= self.steps:
            return (
                f"no unlabelled pixel was kept for {self.empty} steps (bar {report.bar:.3f}); lower train.fixmatch.threshold, "
                "raise train.warmup_steps, or choose s4mc, whose bar follows the scores"
            )
        if self.alone >= self.steps:
            return (
                f"class {report.top} held over {self.share:.1%} of the kept pixels for {self.alone} steps: the "
                "pseudo-labels have collapsed into it. Raise train.warmup_steps or lower train.unsup_weight; "
                "train.collapse.share: 1.0 turns this alarm off where the data really is so"
            )
        return None
