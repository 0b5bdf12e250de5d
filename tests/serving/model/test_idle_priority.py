"""Loading beside requests: at a low priority, the pools that it starts included, and all of it as before afterwards."""

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from export.runtime import runtime
from serving.model import idle_priority
from tests.support import tiny_onnx

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")


def policy(thread: int = 0) -> int:
    return os.sched_getscheduler(thread)


def threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


needs_the_right = pytest.mark.skipif(
    not idle_priority._may_return(), reason="this user may not take a thread back from SCHED_IDLE (CAP_SYS_NICE)"
)


@needs_the_right
def test_work_and_the_threads_it_starts_are_idle_and_then_raised() -> None:
    before, go = threads(), threading.Event()
    pool: list[threading.Thread] = []

    def work() -> tuple[int, int]:
        pool.append(threading.Thread(target=go.wait))
        pool[0].start()
        return policy(), policy(pool[0].native_id or 0)

    assert idle_priority.run_at_idle_priority(work) == (os.SCHED_IDLE, os.SCHED_IDLE)
    assert policy(pool[0].native_id or 0) == os.SCHED_OTHER == policy()
    assert {policy(thread) for thread in threads() - before} == {os.SCHED_OTHER}
    go.set()
    pool[0].join()


@needs_the_right
def test_a_sessions_own_pool_is_raised(tmp_path: Path) -> None:
    opened, before = tiny_onnx.write(tmp_path / "b"), threads()
    model = idle_priority.run_at_idle_priority(lambda: runtime.Runtime(opened, provider="cpu", threads=3))
    started = threads() - before
    assert started, "ONNX Runtime started no pool: this test looks at nothing"
    assert {policy(thread) for thread in started} == {os.SCHED_OTHER}
    assert model.run(np.zeros((1, 16, 16, 3), np.uint8))[0].shape == (1, 16, 16)


@needs_the_right
def test_work_that_does_not_end_is_quiet_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_priority, "PATIENCE_S", 0.0)

    def work() -> int:
        for _ in range(5000):  # 5 s; never raised, it fails below
            if policy() != os.SCHED_IDLE:
                break
            time.sleep(0.001)
        return policy()

    assert idle_priority.run_at_idle_priority(work) == os.SCHED_OTHER


def test_without_the_right_it_works_as_the_caller_does(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.sched_setscheduler

    def only_down(thread: int, wanted: int, parameters: os.sched_param) -> None:
        if wanted == os.SCHED_OTHER:
            raise PermissionError("no CAP_SYS_NICE")
        real(thread, wanted, parameters)

    monkeypatch.setattr(os, "sched_setscheduler", only_down)
    assert idle_priority.run_at_idle_priority(policy) == os.SCHED_OTHER == policy()


def test_what_the_work_raises_reaches_the_caller() -> None:
    with pytest.raises(KeyError, match="lost"):
        idle_priority.run_at_idle_priority(lambda: {}["lost"])
