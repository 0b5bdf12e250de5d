"""The teacher: an exponential moving average of the student."""

import copy

import torch
from torch import nn


def teacher_of(student: nn.Module) -> nn.Module:
    """A frozen copy of the student, in eval mode."""
    teacher = copy.deepcopy(student).eval()
    return teacher.requires_grad_(False)


def decay_at(step: int, limit: float) -> float:
    """min(1 - 1/(step + 1), limit): 0 at step 0, so that the teacher starts as the student."""
    return min(1 - 1 / (step + 1), limit)


class Average:
    """teacher <- decay * teacher + (1 - decay) * student, over parameters and floating buffers in one fused call.

    Integer buffers (BatchNorm's step count, index tables) are copied: averaging them in floating point corrupts them.
    The tensors are looked up once (the look-up takes longer than the sum), so they must stay where they are afterwards.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
        self.floating = [(t, s) for t, s in pairs if t.is_floating_point()]
        self.counters = [(t, s) for t, s in pairs if not t.is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_([t for t, _ in self.floating], [s for _, s in self.floating], 1 - decay)
        for t, s in self.counters:
            t.copy_(s)
