"""What is under way at once: images in three lanes, and bytes of bodies, each bounded.

No class of requests takes the room of another. Ordinary images, those of calls of many, and long work (native resolution,
huge images, and whatever takes more memory than half of an ordinary lane's room) each have their own places, line and
share of the memory. What does not fit waits in its lane's line; what would wait for longer than it may is refused at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from serving.admission.lanes import Lane, overloaded
from serving.settings import Settings
from serving.telemetry import metrics

LaneName = Literal["ordinary", "many", "long"]
_LARGE_SHARE = 0.5  # of the room for bodies in memory that large ones may fill


class Admission:
    """The lanes and counters of one server; only the event loop's thread may touch them."""

    def __init__(self, settings: Settings) -> None:
        places = settings.concurrency
        memory = settings.memory
        self._settings = settings
        self.ordinary = Lane("ordinary images", places, settings.queue, memory // 4, self._changed)
        # Each call has no more than `concurrency` of its images under way, so all of them find a place in the line.
        self.many = Lane("images of calls", places, settings.many_calls * places, memory // 4, self._changed)
        self.long = Lane("long work", settings.long_at_once, settings.long_queue, memory // 2, self._changed)
        self.lanes: dict[LaneName, Lane] = {"ordinary": self.ordinary, "many": self.many, "long": self.long}
        self.bytes = 0
        self.large_bytes = 0

    @property
    def requests(self) -> int:
        """Images at work and in line."""
        return sum(lane.running + lane.waiting for lane in self.lanes.values())

    @property
    def memory(self) -> int:
        """Bytes that the images at work are counted for."""
        return sum(lane.bytes for lane in self.lanes.values())

    def lane(self, cost: int, *, is_long: bool, is_one_of_many: bool) -> LaneName:
        """Where an image goes that takes `cost` bytes."""
        if is_long or cost > self.ordinary.room // 2:
            return "long"
        return "many" if is_one_of_many else "ordinary"

    def _changed(self) -> None:
        metrics.load(self.requests)
        metrics.queued(sum(lane.waiting for lane in self.lanes.values()))

    @contextmanager
    def body(self, *, is_large: bool = False) -> Iterator[Callable[[int], None]]:
        """Room for one body while it is held, taken by calling with the size of each piece that came.

        A body that has not come takes no room, so slow clients keep no other out. Large ones fill a part of the room only,
        so that they keep no ordinary image out. The call raises Problem(503).
        """
        held = _HeldBytes(self, self._settings.max_bodies, is_large)
        try:
            yield held.add
        finally:
            held.release()


class _HeldBytes:
    """What one body has taken of the room for all of them."""

    def __init__(self, admission: Admission, room: int, is_large: bool) -> None:
        self._admission = admission
        self._room = room
        self._is_large = is_large
        self._size = 0

    def add(self, size: int) -> None:
        if self._admission.bytes + size > self._room:
            raise overloaded("too many bodies under way")
        if self._is_large and self._admission.large_bytes + size > _LARGE_SHARE * self._room:
            raise overloaded("too many large bodies under way")
        self._change(size)

    def release(self) -> None:
        self._change(-self._size)

    def _change(self, size: int) -> None:
        self._size += size
        self._admission.bytes += size
        if self._is_large:
            self._admission.large_bytes += size
