"""When something that failed is tried again."""

import math
import time
from collections.abc import Callable

LONGEST_S = 60.0
_MOST_DOUBLINGS = 10  # of a second, far beyond LONGEST_S


class Backoff:
    """Growing pauses between the attempts at one thing: 1, 2, 4 ... `LONGEST_S` seconds. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Nothing has failed."""
        self._thing: bytes | None = None
        self._failures = 0
        self._last_error = ""
        self._next_at = 0.0

    def is_due(self, thing: bytes) -> bool:
        """Whether `thing` may be tried now. Another thing than before always may, and starts anew."""
        if thing != self._thing:
            self.reset()
            self._thing = thing
            return True
        return self._clock() >= self._next_at

    def fail(self, error: Exception, *, final: bool) -> tuple[float | None, bool]:
        """An attempt failed, for ever if `final` -> (seconds until the next attempt or None, is the error a new one)."""
        pause_s = math.inf if final else min(LONGEST_S, 2.0 ** min(self._failures, _MOST_DOUBLINGS))
        self._failures += 1
        self._next_at = self._clock() + pause_s

        is_new = repr(error) != self._last_error
        self._last_error = repr(error)
        return (None if final else pause_s), is_new
