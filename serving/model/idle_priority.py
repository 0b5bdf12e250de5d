"""Work beside the requests, which come first: on cores that nothing else needs, with the threads that it starts.

A runtime starts a pool of threads with the session, and on Linux a thread inherits its starter's scheduling. Loading a
candidate so leaves the cores to the requests; when it serves, its pool has to be as fast as the one before. Loads without
a pause on 2 half busy cores took the requests' p99 to 1.75 times its usual height like this, to 2.6 times at a nice value
of 10, to 2.2 at 19 (medians of 3 rounds in turn; DeepLabV3+ in OpenVINO).
"""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
# On cores that are never free it would not end, and the operator who asked for it waits `load_timeout_s`, 20 s unless set.
PATIENCE_S = 5.0


def run_at_idle_priority(work: Callable[[], T]) -> T:
    """work(), in a thread of its own that runs where a core is free, for at most PATIENCE_S; then as any other thread.

    At this thread's scheduling where that cannot be taken back. One at a time: the end of one call raises the threads of
    another.

    Raises what `work` raises.
    """
    if not _may_return():
        return work()
    done: Future[T] = Future()

    def run() -> None:
        try:
            _schedule(0, os.SCHED_IDLE)
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="idle-priority", daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    _raise_all()
    thread.join()
    _raise_all()  # what it may have started at the moment of the first time
    return done.result()


def _schedule(thread: int, policy: int) -> None:
    """Linux takes a thread's id where POSIX has a process's; 0 is the calling thread. Raises OSError."""
    os.sched_setscheduler(thread, policy, os.sched_param(0))


def _may_return() -> bool:
    """Whether a thread may be scheduled as idle and back again (Linux, and the right to: CAP_SYS_NICE or its limit)."""
    if not hasattr(os, "SCHED_IDLE"):
        return False
    outcome: list[bool] = []

    def attempt() -> None:
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                _schedule(0, os.SCHED_IDLE)
                _schedule(0, os.SCHED_OTHER)
                outcome.append(True)

    thread = threading.Thread(target=attempt)  # which would stay idle where it may not go back
    thread.start()
    thread.join()
    return bool(outcome)


def _raise_all() -> None:
    """Every idle thread of this process is scheduled like any other."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            if os.sched_getscheduler(int(task.name)) == os.SCHED_IDLE:
                _schedule(int(task.name), os.SCHED_OTHER)
