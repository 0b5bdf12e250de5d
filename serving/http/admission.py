"""What is under way at once: requests, pixels and bytes of bodies, each bounded. What does not fit is refused, not kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serving.http.requests import RETRY_AFTER_S, Problem
from serving.settings import Settings
from serving.telemetry import metrics


def _overloaded(what: str) -> Problem:
    return Problem(503, "overloaded", f"too many {what} under way; try again", {"Retry-After": str(RETRY_AFTER_S)})


class Admission:
    """The counters of one server; only the event loop's thread may touch them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.requests = 0
        self.pixels = 0
        self.bytes = 0

    def check(self) -> None:
        """Refuse early, before the body is read, what would be refused now. Raises Problem(503)."""
        if self.requests >= self._settings.concurrency + self._settings.queue:
            raise _overloaded("requests")
        if self.pixels >= self._settings.max_pixels_at_once:
            raise _overloaded("pixels")

    def enter(self, pixels: int) -> None:
        """Take a place and room for an image of `pixels`; an image is always let in alone. Raises Problem(503)."""
        self.check()
        if self.pixels and self.pixels + pixels > self._settings.max_pixels_at_once:
            raise _overloaded("pixels")
        self._change(1, pixels)

    def leave(self, pixels: int) -> None:
        """Give back what `enter` took."""
        self._change(-1, -pixels)

    def _change(self, requests: int, pixels: int) -> None:
        self.requests += requests
        self.pixels += pixels
        metrics.load(self.requests)
        metrics.queued(max(0, self.requests - self._settings.concurrency))

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Room for one body while it is held, taken by calling with the size of each piece that came.

        A body that has not come takes no room, so slow clients keep no other out. The call raises Problem(503).
        """
        held = _HeldBytes(self, self._settings.max_bodies)
        try:
            yield held.add
        finally:
            held.release()


class _HeldBytes:
    """What one body has taken of the room for all of them."""

    def __init__(self, admission: Admission, room: int) -> None:
        self._admission = admission
        self._room = room
        self._size = 0

    def add(self, size: int) -> None:
        if self._admission.bytes + size > self._room:
            raise _overloaded("bodies")
        self._size += size
        self._admission.bytes += size

    def release(self) -> None:
        self._admission.bytes -= self._size
