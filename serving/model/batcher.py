"""Where prepared images meet to run the model: those that wait together and have one shape and one model run as one batch.

There is no thread of its own here: a caller that comes while a place at the model is free runs it, for the oldest image
that waits and any others of the same shape and model that are there already, in one of
`export.runtime.batches.BATCH_SIZES`. So no image waits for others to join it, an idle server pays for no hand-over between
threads (a runner of its own cost 1.0 ms of processor time a request more, 1.16 to 1.27 times the whole), and none starves.

Two may run at once, because the ends of one run (copies, the last thread's share) leave the processor or the card idle:
on 2 busy cores 1.12 to 1.49 times the images per second of one at a time in ONNX Runtime, 0.96 to 1.22 in OpenVINO
(DeepLabV3+ on EfficientNet-Lite0, 128 x 128 to 384 x 512, medians of 5 to 7 alternating rounds).

BentoML's own batching (1.4.39, `batchable=True`, its CorkDispatcher) measured against this with the same model call: the
same images per second under load (ours 1.03 times with 16 callers, 1.08 with 4), but 0.86 ms to our 0.36 for a caller
alone, because it polls every millisecond and waits for others by an estimate. It puts different shapes into one batch
(a ValueError for all of it), gives one image's error to the whole batch, and cannot drop a caller who has gone. And it
is available only through a BentoML API method, not from an ASGI app mounted beside it: arrays as bodies, once more over HTTP.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.runtime.batches import BATCH_SIZES
from export.runtime.runtime import Runtime

Array = NDArray[np.uint8]


class Dropped(Exception):
    """The caller no longer waits for this work: phases that have not begun are skipped."""


@dataclass
class ImageJob:
    """The work on one image, which its caller may stop waiting for; the bytes that came for it, let go when that happens.

    Lanes take turns at the model, however many images of each wait.
    """

    data: Any = None
    lane: str = "ordinary"
    dropped: bool = False

    def check(self) -> None:
        """Before a phase. Raises Dropped."""
        if self.dropped:
            raise Dropped


@dataclass(frozen=True)
class ModelRun:
    """One image's answer at the model's size: class ids and confidence, uint8 H x W; seconds before and in the model."""

    label_HW: Array
    confidence_HW: Array
    waited_s: float
    ran_s: float
    batch: int


@dataclass(eq=False)
class _WaitingImage:
    runtime: Runtime
    image_HWC: Array
    job: ImageJob
    since: float = field(default_factory=time.perf_counter)
    result: ModelRun | Exception | None = None

    def fits(self, other: "_WaitingImage") -> bool:
        return self.runtime is other.runtime and self.image_HWC.shape == other.image_HWC.shape


class Batcher:
    """Runs images for many threads; `limit` gives the largest batch for a model, `on_run` gets the size of each run."""

    def __init__(
        self, limit: Callable[[Runtime], int], on_run: Callable[[int], None] = lambda size: None, at_once: int = 2
    ) -> None:
        self._limit = limit
        self._on_run = on_run
        self._free = at_once
        self._waiting: list[_WaitingImage] = []
        self._runs = 0
        self._turns: dict[str, int] = {}  # the last run of each lane
        self._change = threading.Condition()

    @property
    def waiting(self) -> int:
        """Images that wait for a place at the model."""
        return len(self._waiting)

    def run(self, runtime: Runtime, image_HWC: Array, job: ImageJob) -> ModelRun:
        """One prepared image, uint8 H x W x 3 of a size that `runtime` takes -> its answer. Blocks.

        Raises:
            Dropped: the job was dropped while its image waited.
            Exception: what the model raises for this image alone.
        """
        entry = _WaitingImage(runtime, image_HWC, job)
        with self._change:
            job.check()
            self._waiting.append(entry)
            while entry.result is None:
                if entry in self._waiting and self._free:
                    self._lead()
                else:
                    self._change.wait()
        if isinstance(entry.result, Exception):
            raise entry.result
        return entry.result

    def drop(self, job: ImageJob) -> None:
        """Mark a job as dropped, and let its thread go if its image waits here."""
        with self._change:
            job.dropped = True
            job.data = None  # the pool keeps dropped work until a worker comes to it
            for entry in [entry for entry in self._waiting if entry.job is job]:
                self._waiting.remove(entry)
                entry.result = Dropped()
            self._change.notify_all()

    def _lead(self) -> None:
        """Run the oldest image of the lane whose turn it is and others like it, with the lock let go meanwhile."""
        first = min(self._waiting, key=lambda entry: self._turns.get(entry.job.lane, 0))  # of equals the oldest
        self._runs += 1
        self._turns[first.job.lane] = self._runs
        like = [entry for entry in self._waiting if entry.fits(first)]
        most = min(len(like), max(1, self._limit(first.runtime)))
        taken = like[: next(size for size in BATCH_SIZES if size <= most)]
        self._waiting = [entry for entry in self._waiting if entry not in taken]
        self._free -= 1
        self._change.release()
        try:
            self._run(taken)
        finally:
            self._change.acquire()
            self._free += 1
            self._change.notify_all()

    def _run(self, taken: list[_WaitingImage]) -> None:
        images = [entry.image_HWC for entry in taken]
        start = time.perf_counter()
        try:
            label_NHW, confidence_NHW = taken[0].runtime.run(images[0][None] if len(images) == 1 else np.stack(images))
            spent = time.perf_counter() - start
            for label_HW, confidence_HW, entry in zip(label_NHW, confidence_NHW, taken, strict=True):
                entry.result = ModelRun(label_HW, confidence_HW, start - entry.since, spent, len(taken))
        except Exception as error:  # of any runtime: it belongs to the image's thread, not to this one
            if len(taken) == 1:
                taken[0].result = error
                return
            for entry in taken:  # one of them may be at fault: the others must not pay for it
                self._run([entry])
        else:
            self._on_run(len(taken))
