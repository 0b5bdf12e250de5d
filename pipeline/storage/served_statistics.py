"""What a service has answered, by bundle and window of time: written by `serving.telemetry`, read by `pipeline.drift`.

Every image is counted; a window also keeps a sample of at most 64, drawn evenly. The samples have the names and shapes of
`area` and `confidence` in `pipeline.storage.predictions`: their rows are the points of a two-sample test, with the window
as the group, since neighbours in time are not independent draws.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class AreaCounts(_Record):
    """Share of the image by class, 0 to 1: its sum [K], and images by bin [K][B]."""

    sum: list[float]
    counts: list[list[int]]


class ConfidenceCounts(_Record):
    """Mean confidence of an image, 0 to 1: its sum, and images by bin [B]."""

    sum: float
    counts: list[int]


class WindowSample(_Record):
    """The areas [m][K] and confidences [m] of some images."""

    area: list[list[float]]
    confidence: list[float]


class WindowStatistics(_Record):
    """The images of one bundle from `start` (unix seconds, a multiple of the window's length) on."""

    start: int
    images: int
    area: AreaCounts
    confidence: ConfidenceCounts
    sample: WindowSample


class BundleStatistics(_Record):
    """One bundle's windows, the newest last; `images` counts all since the service started."""

    bundle: str
    classes: list[str]
    images: int
    windows: list[WindowStatistics]


class BinEdges(_Record):
    """B + 1 edges of B bins, [low, high), the last closed."""

    area: list[float]
    confidence: list[float]


class ServedStatistics(_Record):
    """All of it: the bundle that answered last is last; times in unix seconds."""

    format: Literal[1] = 1
    started: float
    written: float
    window_s: int
    images: int
    edges: BinEdges
    bundles: list[BundleStatistics]
