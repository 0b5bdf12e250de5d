"""How far a run has come: what it needs, beside weights and thresholds, to go on as if it had never stopped."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training.methods.step import StepResult


@dataclass
class Best:
    """The teacher with the highest val mIoU so far; -1 and None before the first validation."""

    miou: float = -1.0
    step: int | None = None
    weights: dict[str, Tensor] | None = None


@dataclass
class Progress:
    """step: steps done. history: a row of named numbers per log line. running: losses of the steps since the last one."""

    step: int = 0
    best: Best = field(default_factory=Best)
    history: list[dict[str, float]] = field(default_factory=list)
    running: list[Tensor] = field(default_factory=list)

    def add(self, done: StepResult) -> None:
        """Count a step and keep its losses, on their device."""
        self.running.append(torch.stack([term.mean().detach().float() for term in done.losses.values()]))
        self.step += 1

    def take_means(self, done: StepResult) -> dict[str, float]:
        """Mean losses since the last call, of the steps that had the same terms as the last one."""
        names = list(done.losses)
        same = [values for values in self.running if len(values) == len(names)]
        self.running.clear()
        means = torch.stack([values.to(same[-1].device) for values in same]).mean(0).tolist()
        return {f"loss_{name}": value for name, value in zip(names, means, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "history": self.history,
            "running": self.running,
            "best": {"miou": self.best.miou, "step": self.best.step, "weights": self.best.weights},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.history = state["history"]
        self.running = list(state["running"])
        self.best = Best(**state["best"])
