"""What `marginalia bench` and its children tell each other: one line of JSON each way.

A child gets its task as an argument, answers with `Ready` or `Failed`, then each `Turn` with `Seconds`.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from export.bundle.manifest import Precision, Provider

TorchMode = Literal["eager", "channels_last", "compile"]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Task(_Message):
    """Images of `size` (width, height; pixels) in batches of `batch`, by `threads` threads."""

    size: tuple[int, int]
    batch: int
    threads: int


class BundleTask(_Task):
    """Run a bundle; `images` are streamed from JPEG to PNG in one turn, at batch 1."""

    bundle: Path
    provider: Provider
    precision: Precision
    images: int


class TorchTask(_Task):
    """Run the student's weights in torch, on images brought to the network as the bundle's input policy does it."""

    student: Path
    mode: TorchMode
    long_side: int
    stride: int


class Facts(_Message):
    """What runs: `tensor` is the shape that the network gets, N x H x W x 3."""

    provider: str
    precision: str
    threads: int
    tensor: tuple[int, ...]


class Ready(_Message):
    """`once` is the seconds of a warm call, `peak_bytes` the most memory until then."""

    facts: Facts
    once: float
    peak_bytes: int


class Failed(_Message):
    """Why this configuration does not run here."""

    failed: str


class Turn(_Message):
    """Time so many calls of a work, "run" or "stream"."""

    work: Literal["run", "stream"]
    calls: int


class Seconds(_Message):
    """Of each call of a turn."""

    seconds: tuple[float, ...]


Greeting = TypeAdapter[Ready | Failed](Ready | Failed)
Answer = TypeAdapter[Seconds | Failed](Seconds | Failed)
