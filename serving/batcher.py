"""The threads that run the model: prepared images that wait together and have one shape and one model run as one batch.

Nobody waits for company: when a runner becomes free it takes the oldest image, and whatever else of the same shape and
model is there already, in a size of `export.runtime.BATCHES`. So an idle server adds no latency, and nobody starves.

Two runners, because the ends of one run (copies, the last thread's share) leave the processor or the card idle for the
next to fill: on 2 busy cores 1.24 to 1.49 times the images per second of one runner in ONNX Runtime, 0.96 to 1.22 in
OpenVINO (DeepLabV3+ on EfficientNet-Lite0, 128 x 128 to 384 x 512, medians of 5 to 7 alternating rounds).

BentoML's own batching (1.4.39, `batchable=True`, its CorkDispatcher) measured against this with the same model call: the
same images per second under load (ours 1.03 times with 16 callers, 1.08 with 4), but 0.86 ms to our 0.36 for a caller
alone, because it polls every millisecond and waits for company by an estimate. It puts different shapes into one batch
(a ValueError for all of it), gives one image's error to the whole batch, and cannot drop a caller who has gone. And it
is had only through a BentoML API method, not from an ASGI app mounted beside it: arrays as bodies, once more over HTTP.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from export.runtime import BATCHES, Runtime

Array = NDArray[np.uint8]


@dataclass(frozen=True)
class Ran:
    """One image's answer at the model's size: class ids and confidence, uint8 H x W; seconds before and in the model."""

    label_HW: Array
    confidence_HW: Array
    waited_s: float
    ran_s: float
    batch: int


@dataclass(frozen=True)
class _Entry:
    runtime: Runtime
    image_HWC: Array
    future: "Future[Ran]" = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)

    def fits(self, other: "_Entry") -> bool:
        return self.runtime is other.runtime and self.image_HWC.shape == other.image_HWC.shape


class Batcher:
    """Runs what is submitted; `limit` says the largest batch for a model, `told` hears the size of each batch run."""

    def __init__(
        self, limit: Callable[[Runtime], int], told: Callable[[int], None] = lambda size: None, runners: int = 2
    ) -> None:
        self._limit, self._told = limit, told
        self._waiting: deque[_Entry] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._runners = [threading.Thread(target=self._serve, name=f"runner_{i}", daemon=True) for i in range(runners)]
        for thread in self._runners:
            thread.start()

    def submit(self, runtime: Runtime, image_HWC: Array) -> "Future[Ran]":
        """Queue one prepared image, uint8 H x W x 3 of a size that `runtime` takes; cancel the future to drop it.

        The future raises what the model raises for this image alone.

        Raises:
            RuntimeError: after `close`.
        """
        entry = _Entry(runtime, image_HWC)
        with self._change:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._waiting.append(entry)
            self._change.notify()
        return entry.future

    def close(self) -> None:
        """Let the running batches end and drop what waits."""
        with self._change:
            self._closed = True
            for entry in self._waiting:
                entry.future.cancel()
            self._change.notify_all()
        for thread in self._runners:
            thread.join()

    def _serve(self) -> None:
        while taken := self._take():
            self._run(taken)

    def _take(self) -> list[_Entry]:
        """The oldest entry and others like it; empty when closed. The futures of all that are taken are running."""
        with self._change:
            while True:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return []
                self._waiting = deque(entry for entry in self._waiting if not entry.future.cancelled())
                if not self._waiting:
                    continue
                first = self._waiting[0]
                like = [entry for entry in self._waiting if entry.fits(first)]
                most = min(len(like), max(1, self._limit(first.runtime)))
                like = like[: next(size for size in BATCHES if size <= most)]
                taken = [entry for entry in like if entry.future.set_running_or_notify_cancel()]
                gone = {id(entry) for entry in like}
                self._waiting = deque(entry for entry in self._waiting if id(entry) not in gone)
                if taken:
                    return taken

    def _run(self, taken: list[_Entry]) -> None:
        start, images = time.perf_counter(), [entry.image_HWC for entry in taken]
        try:
            label_NHW, confidence_NHW = taken[0].runtime.run(images[0][None] if len(images) == 1 else np.stack(images))
        except Exception as error:  # whatever a runtime throws: it belongs to a request, not to this thread
            if len(taken) == 1:
                taken[0].future.set_exception(error)
                return
            for entry in taken:  # one of them may be at fault: the others must not pay for it
                self._run([entry])
            return
        spent = time.perf_counter() - start
        self._told(len(taken))
        for i, entry in enumerate(taken):
            ran = Ran(label_NHW[i], confidence_NHW[i], start - entry.since, spent, len(taken))
            entry.future.set_result(ran)
