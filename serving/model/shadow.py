"""A candidate that runs on a share of the requests and never answers: how often would it have answered the same?

One thread of the lowest priority with one inference thread, and a queue of WAITING images: what finds the queue full is
dropped, so that a request is never later, and never fails, for the shadow's sake.
"""

import contextlib
import os
import queue
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import Manifest
from export.runtime.runtime import Runtime
from serving.model.card import ShadowReport
from serving.telemetry import metrics

WAITING = 2
LARGEST = 64 << 20  # bytes of an image that may wait; with WAITING the bound of the queue's memory
_CHUNK = 1 << 20  # pixels that are counted at once
_NONE = 256  # stands for a class that the served model does not have

Labels = NDArray[np.uint8]
Counts = NDArray[np.int64]


@dataclass
class ShadowAgreement:
    """Pixels by class id of the served model `against`: its own, the shadow's, and those on which both agree."""

    against: Manifest
    images: int = 0
    ours: Counts = field(default_factory=lambda: np.zeros(257, np.int64))
    theirs: Counts = field(default_factory=lambda: np.zeros(257, np.int64))
    same: Counts = field(default_factory=lambda: np.zeros(257, np.int64))

    def add(self, label_HW: Labels, shadow_HW: Labels, shadow: Manifest) -> None:
        """Count one image: the served model's ids and the shadow's. Classes are matched by name."""
        ids = {item.name: item.id for item in self.against.classes}
        translate = np.full(256, _NONE, np.uint16)
        for item in shadow.classes:
            translate[item.id] = ids.get(item.name, _NONE)
        self.images += 1
        step = max(1, _CHUNK // label_HW.shape[1])  # bincount makes eight bytes of each pixel
        for top in range(0, len(label_HW), step):
            ours_HW, theirs_HW = label_HW[top : top + step], translate[shadow_HW[top : top + step]]
            self.ours += np.bincount(ours_HW.ravel(), minlength=257)
            self.theirs += np.bincount(theirs_HW.ravel(), minlength=257)
            self.same += np.bincount(ours_HW[ours_HW == theirs_HW], minlength=257)

    def shares(self) -> tuple[float | None, dict[str, float]]:
        """(share of all pixels with the same class, intersection over union by name of the classes that either found)."""
        total = int(self.ours.sum())
        union = self.ours + self.theirs - self.same
        classes = {c.name: float(self.same[c.id] / union[c.id]) for c in self.against.classes if union[c.id]}
        return (float(self.same.sum() / total) if total else None), classes


def _lower_priority() -> None:
    """Linux counts niceness by thread, and threads that this one starts inherit it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class Shadow:
    """Scores a random `share` (0..1) of the images offered by the runtime that `open_candidate` gives.

    It is opened in the shadow's own thread, so that what the runtime starts has the low priority too; `opened` has the
    outcome.
    """

    def __init__(self, open_candidate: Callable[[], Runtime], share: float) -> None:
        self.opened: Future[Runtime] = Future()
        self.scored, self.dropped, self.failed = 0, 0, 0
        self._open, self._share = open_candidate, share
        self._agreement: ShadowAgreement | None = None
        self._lock = threading.Lock()  # of the counts
        self._waiting: queue.Queue[tuple[Labels, Labels, Manifest] | None] = queue.Queue(WAITING)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, image_HWC: Labels, label_HW: Labels, manifest: Manifest) -> None:
        """Take an image and what the served model, `manifest`, answered, or leave it. Never waits, never raises.

        Neither array may be changed afterwards.
        """
        if random.random() >= self._share or self._closed or not self.opened.done():
            return
        try:
            if image_HWC.nbytes > LARGEST:
                raise queue.Full
            self._waiting.put_nowait((image_HWC, label_HW, manifest))
        except queue.Full:
            with self._lock:
                self.dropped += 1
            metrics.shadowed("dropped")

    def report(self) -> ShadowReport:
        """Counts of images, and the agreement with the model that was served last; a swap starts it anew."""
        with self._lock:
            agreement = self._agreement
            share, classes = agreement.shares() if agreement else (None, {})
            return ShadowReport(
                against=agreement.against.id if agreement else None,
                images=agreement.images if agreement else 0,
                agreement=share,
                agreement_by_class=classes,
                scored=self.scored,
                dropped=self.dropped,
                failed=self.failed,
            )

    def close(self, wait: bool = False) -> None:
        """Score nothing more."""
        self._closed = True
        with contextlib.suppress(queue.Full):  # then the thread wakes by what waits
            self._waiting.put_nowait(None)
        if wait:
            self._thread.join(timeout=5)

    def _work(self) -> None:
        _lower_priority()
        try:
            runtime = self._open()
        except Exception as error:
            self.opened.set_exception(error)
            return
        self.opened.set_result(runtime)
        while (item := self._waiting.get()) is not None and not self._closed:
            self._score(runtime, *item)
            del item  # an image must not stay while nothing comes

    def _score(self, runtime: Runtime, image_HWC: Labels, label_HW: Labels, manifest: Manifest) -> None:
        try:
            shadow_HW = runtime.segment(image_HWC).label_HW
            with self._lock:
                if self._agreement is None or self._agreement.against.id != manifest.id:
                    self._agreement = ShadowAgreement(manifest)
                self._agreement.add(label_HW, shadow_HW, runtime.bundle.manifest)
                self.scored += 1
                shares = self._agreement.shares()
        except Exception as error:  # the candidate's fault, and no request waits for it
            with self._lock:
                self.failed += 1
                first = self.failed == 1
            metrics.shadowed("failed")
            if first:
                metrics.failure("shadow-failed", error, bundle=runtime.bundle.manifest.id)
            return
        metrics.shadowed("scored")
        if not self._closed:
            metrics.agreed(*shares)
