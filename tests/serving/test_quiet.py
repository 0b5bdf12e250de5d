"""Loading beside requests: at a low priority, the pools that it starts included, and all of it as before afterwards."""

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from export import runtime
from serving import quiet
from tests import tiny_onnx

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")


def nice(thread: int | None = None) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread or threading.get_native_id())


def threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


needs_the_right = pytest.mark.skipif(
    quiet._low() is None, reason="this user may not take back a thread's nice value (CAP_SYS_NICE)"
)


@needs_the_right
def test_work_and_the_threads_it_starts_are_low_and_then_raised() -> None:
    here, before, go = nice(), threads(), threading.Event()
    pool: list[threading.Thread] = []

    def work() -> int:
        pool.append(threading.Thread(target=go.wait))
        pool[0].start()
        return nice(pool[0].native_id)

    assert quiet.quietly(work) == here + quiet.BELOW
    assert nice(pool[0].native_id) == here == nice()
    assert {nice(thread) for thread in threads() - before} <= {here}
    go.set()
    pool[0].join()


@needs_the_right
def test_a_sessions_own_pool_is_raised(tmp_path: Path) -> None:
    opened, before = tiny_onnx.write(tmp_path / "b"), threads()
    model = quiet.quietly(lambda: runtime.Runtime(opened, provider="cpu", threads=3))
    started = threads() - before
    assert started, "ONNX Runtime started no pool: this test looks at nothing"
    assert {nice(thread) for thread in started} == {nice()}
    assert model.run(np.zeros((1, 16, 16, 3), np.uint8))[0].shape == (1, 16, 16)


def test_without_the_right_it_works_at_the_callers_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.setpriority

    def only_down(which: int, who: int, value: int) -> None:
        if value < os.getpriority(which, who):
            raise PermissionError("no CAP_SYS_NICE")
        real(which, who, value)

    monkeypatch.setattr(os, "setpriority", only_down)
    here = nice()
    assert quiet.quietly(nice) == here == nice()


def test_what_the_work_raises_reaches_the_caller() -> None:
    with pytest.raises(KeyError, match="lost"):
        quiet.quietly(lambda: {}["lost"])
