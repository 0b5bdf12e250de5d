"""Work beside the requests at a low priority, that of the threads it starts included, and those raised again afterwards.

A runtime starts a pool of threads with the session, and on Linux a thread inherits its starter's nice value. Loading a
candidate so leaves the cores to the requests; when it serves, its pool has to be as fast as the one before.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
BELOW = 10  # about a tenth of what a request's thread gets where both want the core: slow, but it ends


def quietly(work: Callable[[], T]) -> T:
    """work(), in a thread of its own `BELOW` this one's priority where that can be taken back, else at this one's.

    One at a time: the end of one call raises the threads of another.

    Raises what `work` raises.
    """
    low = _low()
    done: Future[T] = Future()

    def run() -> None:
        try:
            if low is not None:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), low)
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="quietly", daemon=True)
    thread.start()
    thread.join()
    if low is not None:
        _raise_from(low)
    return done.result()


def _low() -> int | None:
    """The nice value to work at; None where a thread may not be made nicer and back (no Linux, or no right to)."""
    if sys.platform != "linux":
        return None
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found: list[int] = []

    def attempt() -> None:
        own = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, own, here + BELOW)
            os.setpriority(os.PRIO_PROCESS, own, here)
            found.append(here + BELOW)

    thread = threading.Thread(target=attempt)  # which would stay nice where it may not go back
    thread.start()
    thread.join()
    return found[0] if found and found[0] < 19 else None


def _raise_from(low: int) -> None:
    """Every thread of this process that has the nice value `low` gets that of the caller."""
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            if os.getpriority(os.PRIO_PROCESS, int(task.name)) == low:
                os.setpriority(os.PRIO_PROCESS, int(task.name), here)
