"""telemetry.phase_timer: seconds go to the phase that spent them, also where one generator pulls another."""

from collections.abc import Iterator

import pytest

from serving.telemetry import phase_timer
from serving.telemetry.phase_timer import PhaseTimer


def test_what_is_pulled_counts_for_its_phase_and_the_rest_for_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(phase_timer.time, "perf_counter", lambda: now[0])
    timer = PhaseTimer()

    def bands() -> Iterator[int]:
        for band in range(3):
            now[0] += 1.0  # to decode it
            yield band

    for _ in timer.pulled("decode", bands()):
        with timer.phase("run"):
            now[0] += 10.0
        now[0] += 100.0
    assert timer.timings() == {"decode": 3.0, "run": 30.0, "encode": 300.0}


def test_a_phase_that_fails_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(phase_timer.time, "perf_counter", lambda: now[0])
    timer = PhaseTimer()

    def fail() -> None:
        now[0] += 2.0
        raise ValueError

    with pytest.raises(ValueError), timer.phase("run"):
        fail()
    assert timer.timings() == {"decode": 0.0, "run": 2.0, "encode": 0.0}
