"""How this process computes: precision, denormals, and whether bits repeat."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config import Train


def autocast(config: Train, device: torch.device) -> torch.autocast:
    """bf16 where it pays: on a CUDA card that has it. On CPU `auto` means fp32 (the backward of depthwise convolutions
    gains nothing there: 0.78 s against 0.79 s a step for the default network); ask for bf16 by name to have it."""
    wanted = config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def bits_repeat(config: Train, device: torch.device) -> bool:
    """Whether to ask torch for deterministic algorithms only.

    On CUDA some backward passes (bilinear upsampling) have no deterministic form: seeds are fixed, bits are not. Not with
    torch.compile: in 2.13 inductor's gradient of a bilinear upsampling is 0 in deterministic mode.
    """
    return config.deterministic and device.type == "cpu" and not config.compile


@contextmanager
def arithmetic(deterministic: bool) -> Iterator[None]:
    """Within the block, denormals are zero (a CPU run can slow down many times over without) and, if `deterministic`, bits
    repeat."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(deterministic)
    # A debugging aid: a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(before)
