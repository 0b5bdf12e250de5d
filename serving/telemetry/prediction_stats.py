"""Statistics of the answers, in bounded memory: for GET /v1/statistics and for drift (`pipeline.storage.served_statistics`).

Kept are the newest `WINDOWS` windows of the `BUNDLES` bundles that answered last.
"""

import bisect
import json
import os
import platform
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.storage import atomic
from pipeline.storage.served_statistics import (
    AreaCounts,
    BinEdges,
    BundleStatistics,
    ConfidenceCounts,
    ServedStatistics,
    WindowSample,
    WindowStatistics,
)

WINDOW_S = 900
WINDOWS = 96  # a day
BUNDLES = 4
SAMPLE = 64
# Small areas are where classes come and go; a uniform grid would put them all into one bin.
AREA_EDGES = (0.0, 1e-6, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
CONFIDENCE_EDGES = tuple(round(0.05 * i, 2) for i in range(21))


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _with_list(head: Any, name: str, items: Iterable[str]) -> str:
    """The JSON object `head` with one more member, a list of what is JSON already."""
    return f'{_json(head)[:-1]},"{name}":[{",".join(items)}]}}'


# Searched without its ends, an edge's index is its bin's, and what lies beyond falls into the first or last.
_AREA, _CONFIDENCE = np.array(AREA_EDGES[1:-1]), CONFIDENCE_EDGES[1:-1]


class OpenWindow:
    """Images of one bundle in one stretch of time."""

    def __init__(self, start: int, classes: int) -> None:
        self.start = start
        self.images = 0
        self._rows = np.arange(classes)
        self._area_sum = np.zeros(classes)
        self._area_counts = np.zeros((classes, len(AREA_EDGES) - 1), np.int64)
        self._confidence_sum = 0.0
        self._confidence_counts = np.zeros(len(CONFIDENCE_EDGES) - 1, np.int64)
        self._sample = np.zeros((SAMPLE, classes + 1), np.float32)
        self._draw = random.Random(start)

    def add(self, area_K: Any, confidence: float) -> None:
        """One image: shares of it by class, mean confidence, all 0 to 1."""
        # Vitter, "Random sampling with a reservoir" (ACM TOMS 1985), algorithm R: each image stays with the same chance.
        place = self.images if self.images < SAMPLE else self._draw.randrange(self.images + 1)
        if place < SAMPLE:
            self._sample[place, :-1] = area_K
            self._sample[place, -1] = confidence

        self.images += 1
        self._area_sum += area_K
        self._area_counts[self._rows, np.searchsorted(_AREA, area_K, side="right")] += 1
        self._confidence_sum += confidence
        self._confidence_counts[bisect.bisect_right(_CONFIDENCE, confidence)] += 1

    def record(self) -> WindowStatistics:
        """What has been counted so far."""
        sample = self._sample[: min(self.images, SAMPLE)].astype(np.float64).round(5)
        return WindowStatistics(
            start=self.start,
            images=self.images,
            area=AreaCounts(sum=self._area_sum.round(6).tolist(), counts=self._area_counts.tolist()),
            confidence=ConfidenceCounts(sum=round(self._confidence_sum, 6), counts=self._confidence_counts.tolist()),
            sample=WindowSample(area=sample[:, :-1].tolist(), confidence=sample[:, -1].tolist()),
        )


class BundleCollector:
    """One bundle's windows. A closed one is kept as its JSON: encoding a day at once would hold up the requests."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.images = 0
        self.closed: deque[str] = deque(maxlen=WINDOWS - 1)
        self.open: OpenWindow | None = None

    def add(self, start: int, shares: Mapping[str, float], confidence: float) -> None:
        """One image, in the window that begins at `start`."""
        # A clock set back must not open a window a second time: what comes late goes into the newest.
        if self.open is None or self.open.start < start:
            if self.open is not None:
                self.closed.append(_json(self.open.record().model_dump()))
            self.open = OpenWindow(start, len(self.classes))
        self.open.add(np.array([shares.get(name, 0.0) for name in self.classes]), confidence)
        self.images += 1

    def text(self, bundle: str) -> str:
        """`BundleStatistics` as JSON."""
        head = BundleStatistics(bundle=bundle, classes=list(self.classes), images=self.images, windows=[])
        newest = [_json(self.open.record().model_dump())] if self.open else []
        return _with_list(head.model_dump(exclude={"windows"}), "windows", [*self.closed, *newest])


class PredictionCollector:
    """The statistics of a service since its start. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.started = clock()
        self.images = 0
        self._bundles: dict[str, BundleCollector] = {}  # the one that answered last is last
        self._lock = threading.Lock()

    def add(self, bundle: str, shares: Mapping[str, float], confidence: float) -> None:
        """One image: the bundle that answered, class name -> share of the image, mean confidence 0..1."""
        start = int(self._clock() // WINDOW_S) * WINDOW_S
        with self._lock:
            collector = self._bundles.pop(bundle, None) or BundleCollector(tuple(shares))
            self._bundles[bundle] = collector
            if len(self._bundles) > BUNDLES:
                del self._bundles[next(iter(self._bundles))]
            collector.add(start, shares, confidence)
            self.images += 1

    def text(self) -> str:
        """`ServedStatistics` as one line of JSON."""
        with self._lock:
            bundles = [collector.text(bundle) for bundle, collector in self._bundles.items()]
            images = self.images
        head = ServedStatistics(
            started=round(self.started, 3),
            written=round(self._clock(), 3),
            window_s=WINDOW_S,
            images=images,
            edges=BinEdges(area=list(AREA_EDGES), confidence=list(CONFIDENCE_EDGES)),
            bundles=[],
        )
        return _with_list(head.model_dump(exclude={"bundles"}), "bundles", bundles) + "\n"


class StatisticsWriter:
    """Writes the statistics into `folder` (None: nowhere), a file for each start of the service, every `every_s` seconds
    and at the end; `on_error` gets the error of a disk that will not take it.
    """

    def __init__(
        self, statistics: PredictionCollector, folder: Path | None, every_s: float, on_error: Callable[[OSError], None]
    ) -> None:
        start = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(statistics.started))
        self.path = folder / f"predictions-{start}-{platform.node() or 'host'}-{os.getpid()}.json" if folder else None
        self._statistics = statistics
        self._every_s = every_s
        self._on_error = on_error
        self._written = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="statistics", daemon=True)

    def start(self) -> None:
        """Write in the background from now on."""
        if self.path is not None:
            self._thread.start()

    def stop(self) -> None:
        """Write what is left; returns when it is on disk."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _work(self) -> None:
        while not self._stop.wait(self._every_s):
            self._write()
        self._write()

    def _write(self) -> None:
        images = self._statistics.images
        if self.path is None or images == self._written:
            return
        try:
            atomic.write_text(self.path, self._statistics.text())
        except OSError as error:  # must not stop the service; the next round tries again
            self._on_error(error)
            return
        self._written = images
