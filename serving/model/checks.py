"""The smoke test that a candidate has to pass beside the model it would replace."""

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from export.runtime.runtime import Runtime

ROUNDS = 5
FAST_S = 0.005  # what answers within this is never called slow: below it the clock measures the machine, not the model


class CandidateRefused(ValueError):
    """A candidate that must not be served. `cause` is one of `metrics.CAUSES`; the message says what to do."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def test_image(long_side: int) -> NDArray[np.uint8]:
    """The same image each time: 3:4, `long_side` wide, patches of colour with noise, nothing quite black or white."""
    rng = np.random.default_rng(48)
    height, width = max(1, long_side * 3 // 4), long_side
    patches = rng.integers(40, 200, (8, 8, 3))
    image_HWC = patches[np.arange(height)[:, None] * 8 // height, np.arange(width) * 8 // width]
    return (image_HWC + rng.integers(0, 16, image_HWC.shape)).astype(np.uint8)


def check_classes(candidate: Runtime, current: Runtime) -> None:
    """Same ids and names (colours may change). Raises CandidateRefused."""
    new = {item.id: item.name for item in candidate.bundle.manifest.classes}
    old = {item.id: item.name for item in current.bundle.manifest.classes}
    if new == old:
        return

    changed = [i for i in sorted(old.keys() | new.keys()) if old.get(i) != new.get(i)]
    changes = [f"{i} {old.get(i, 'absent')!r} -> {new.get(i, 'absent')!r}" for i in changed]
    raise CandidateRefused(
        "classes",
        f"has other classes than the model that is served ({', '.join(changes[:3])}); if callers know about it, load "
        "it with allow_class_change or set MARGINALIA_ALLOW_CLASS_CHANGE=true",
    )


def check_output(candidate: Runtime, image_HWC: NDArray[np.uint8]) -> None:
    """Right size, known ids, and finite scores. Raises CandidateRefused.

    The graph's confidence is round(255 * the highest of K <= 255 softmax shares), so at least 1. NaN and infinite scores
    become 0 in the cast to uint8: observed in ONNX Runtime and OpenVINO, and what CUDA's conversion is defined to do.
    """
    try:
        result = candidate.segment(image_HWC)
    except Exception as error:  # the runtimes' own exceptions share no base class
        raise CandidateRefused("output", f"fails on the test image ({error}); export it again") from error

    label_HW, confidence_HW = result.label_HW, result.confidence_HW
    if label_HW.shape != image_HWC.shape[:2] or confidence_HW.shape != image_HWC.shape[:2]:
        raise CandidateRefused(
            "output", f"answers {label_HW.shape} to an image of {image_HWC.shape[:2]}; export it again"
        )
    known = [c.id for c in candidate.bundle.manifest.classes]
    if unknown := np.setdiff1d(label_HW, known).tolist():
        raise CandidateRefused(
            "output", f"answers ids {unknown[:5]} that are no class of its bundle.json; export it again"
        )
    if lost := int((confidence_HW == 0).sum()):
        raise CandidateRefused(
            "output",
            f"{lost} of {confidence_HW.size} pixels of the test image have confidence 0, which a softmax cannot give: "
            "its scores are NaN or infinite; look for NaN in the weights and train again",
        )


def check_speed(
    candidate: Runtime,
    current: Runtime,
    image_HWC: NDArray[np.uint8],
    max_slowdown: float,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Both models on the same image in turns, so that a busy machine slows both; the fastest round of each counts.

    Raises:
        CandidateRefused: after ROUNDS the candidate is still more than `max_slowdown` times as slow.
    """

    def time_once(runtime: Runtime) -> float:
        start = clock()
        runtime.segment(image_HWC)
        return clock() - start

    current_s = candidate_s = math.inf
    for _ in range(ROUNDS):
        current_s = min(current_s, time_once(current))
        candidate_s = min(candidate_s, time_once(candidate))
        if candidate_s <= max(FAST_S, max_slowdown * current_s):
            return

    raise CandidateRefused(
        "slow",
        f"takes {candidate_s * 1e3:.1f} ms for the test image, {candidate_s / current_s:.1f} times what the model that "
        f"is served takes; make it smaller, or raise MARGINALIA_MAX_SLOWDOWN (now {max_slowdown:g})",
    )


def check_answers(candidate: Runtime, current: Runtime | None, allow_class_change: bool) -> None:
    """What it answers; the first model of a service has no other's classes to keep. Raises CandidateRefused."""
    if current is not None and not allow_class_change:
        check_classes(candidate, current)
    check_output(candidate, test_image((current or candidate).bundle.manifest.input.long_side))


def compare_speed(candidate: Runtime, current: Runtime, max_slowdown: float) -> None:
    """How fast it answers, which is the one thing that has to be tried at full speed. Raises CandidateRefused."""
    check_speed(candidate, current, test_image(current.bundle.manifest.input.long_side), max_slowdown)
