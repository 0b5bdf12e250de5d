"""What a run needs to go on as if it had never stopped: its state as plain values and tensors, and back.

The file itself is `checkpoint`'s business.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.engine import checkpoint, distributed, guards
from training.methods.pseudo_label_stats import PseudoLabels
from training.methods.registry import Method
from training.methods.threshold import ClassMax


@dataclass
class Best:
    """The teacher with the highest val mIoU so far; -1 and None before the first validation."""

    miou: float = -1.0
    step: int | None = None
    weights: dict[str, Tensor] | None = None


@dataclass
class Progress:
    """What a resumed run needs beside the weights."""

    step: int = 0
    best: Best = field(default_factory=Best)
    history: list[dict[str, float]] = field(default_factory=list)
    running: list[Tensor] = field(default_factory=list)


def state(
    identity: dict[str, Any], now: Progress, parts: dict[str, Any], method: Method, seen: PseudoLabels,
    finite: guards.Finite, collapse: guards.Collapse, us: distributed.Ranks,
) -> dict[str, Any]:  # fmt: skip
    tau = method.threshold.tau if isinstance(method.threshold, ClassMax) else None
    return {
        "identity": checkpoint.describe(identity),
        **{name: part.state_dict() for name, part in parts.items()},
        "step": now.step, "history": now.history, "running": now.running,
        "best": {"miou": now.best.miou, "step": now.best.step, "weights": now.best.weights},
        "seen": {"counts": us.add(seen.counts), "bars": seen.bars}, "bad": finite.bad, "tau": tau,
        "collapse": [collapse.empty, collapse.alone],
    }  # fmt: skip


def restore(
    path: Path, identity: dict[str, Any], parts: dict[str, Any], method: Method, seen: PseudoLabels,
    finite: guards.Finite, collapse: guards.Collapse, device: torch.device, us: distributed.Ranks,
) -> Progress:  # fmt: skip
    state = checkpoint.load(path, identity)
    at = torch.tensor([0 if state is None else state["step"]], device=device)
    if int(us.highest(at)) != -int(us.highest(-at)):
        raise checkpoint.CheckpointError(
            f"{path}: the processes find different checkpoints; machines that train together need one shared project folder"
        )
    if state is None:
        return Progress()
    for name, part in parts.items():
        part.load_state_dict(state[name])
    seen.counts, seen.bars = (state["seen"][k].to(device) for k in ("counts", "bars"))
    if us.rank:  # the file holds the sum over ranks
        seen.counts.zero_()
    collapse.empty, collapse.alone = state["collapse"]
    finite.bad = state["bad"].to(device)
    if isinstance(method.threshold, ClassMax):
        method.threshold.tau = state["tau"].to(device)
    running = [values.to(device) for values in state["running"]]
    return Progress(state["step"], Best(**state["best"]), state["history"], running)
