"""How a worker learns that the process that watches it ends, or has died: the end of a pipe that it inherited.

A signal does not tell: SIGTERM also ends a worker that another one replaces at the same listening socket, which then has
to stay open. And whose parent was killed hears of no signal at all.
"""

import contextlib
import functools
import os
import select
import stat
from collections.abc import Callable
from typing import Any

_PIPE = "_MARGINALIA_PARENT"  # no MARGINALIA_*: those are settings


@functools.cache
def announce_end() -> None:
    """In the parent, before it starts a worker: close the pipe at the beginning of the end, so before any SIGTERM is sent."""
    from bentoml._internal.utils import circus

    ours, workers = os.pipe()
    os.set_inheritable(ours, True)
    os.environ[_PIPE] = str(ours)
    stop: Callable[[circus.Arbiter], Any] = circus.Arbiter.stop

    def announce_and_stop(arbiter: circus.Arbiter) -> Any:
        with contextlib.suppress(OSError):  # at the second time
            os.close(workers)
        return stop(arbiter)

    circus.Arbiter.stop = announce_and_stop  # type: ignore[method-assign,assignment] # BentoML makes its arbiter of this class itself


class Parent:
    """The process that watches this worker, as far as the worker can see it."""

    def __init__(self) -> None:
        self.pipe = self._inherited()

    @property
    def ends(self) -> bool:
        """It ends or is dead. False where nothing is known of it."""
        return self.pipe is not None and bool(select.select([self.pipe], [], [], 0)[0])

    @staticmethod
    def _inherited() -> int | None:
        stated = os.environ.get(_PIPE, "")
        if not stated.isdigit():
            return None
        try:
            is_pipe = stat.S_ISFIFO(os.fstat(int(stated)).st_mode)
        except OSError:
            return None
        return int(stated) if is_pipe else None
