"""A lane: places at work, room in memory, and a line in the order of arrival."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.http.requests import RETRY_AFTER_S, Problem

_NEWEST = 0.3  # of the mean time of work, the weight of the piece of work that ended last
_LONGEST_RETRY_S = 600
_MIB = 1 << 20


def overloaded(reason: str, retry_after_s: float = RETRY_AFTER_S) -> Problem:
    """The answer to what might be taken later."""
    seconds = min(_LONGEST_RETRY_S, max(RETRY_AFTER_S, math.ceil(retry_after_s)))
    return Problem(503, "overloaded", f"{reason}; try again", {"Retry-After": str(seconds)})


@dataclass(eq=False)
class Place:
    """A place at work, or in the line for one: `turn` is done when work may begin. `leave` gives it back from both."""

    lane: "Lane"
    cost: int
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    since: float | None = None

    def leave(self) -> None:
        """The work has ended, or will not begin."""
        self.lane.leave(self)


class Lane:
    """`places` at work in `room` bytes, and `line` that wait. Only the event loop's thread may touch it."""

    def __init__(
        self,
        name: str,
        places: int,
        line: int,
        room: int,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.room = room
        self.bytes = 0
        self._places = places
        self._longest_line = line
        self._on_change = on_change
        self._clock = clock
        self._line = deque[Place]()
        self._at_work = set[Place]()
        self._mean_s: float | None = None

    @property
    def running(self) -> int:
        """Pieces of work that hold a place."""
        return len(self._at_work)

    @property
    def waiting(self) -> int:
        """Those in the line."""
        return len(self._line)

    def expected_wait_s(self) -> float:
        """Seconds until one that comes now would begin; 0 where a place is free or nothing is known.

        By the mean time of the work so far. What is at work for longer than that already says that the mean is too low.
        """
        ahead = self.running + self.waiting - self._places + 1
        if ahead <= 0:
            return 0.0
        now = self._clock()
        so_far = [now - place.since for place in self._at_work if place.since is not None]
        mean_s = max(self._mean_s or 0.0, sum(so_far) / len(so_far) if so_far else 0.0)
        return ahead * mean_s / self._places

    def check(self, deadline_s: float, cost: int = 0) -> None:
        """Refuse what has no chance, also before its body has come.

        Raises:
            Problem: 413, it takes more memory than the lane has; 503, the line is full or longer than `deadline_s`.
        """
        if cost > self.room:
            raise Problem(
                413,
                "too-much-memory",
                f"working on this image takes {math.ceil(cost / _MIB)} MiB by its format, size and answer, and the limit for "
                f"{self.name} is {self.room // _MIB} MiB; scale it down, or send it as PNG or TIFF in strips without "
                "interlacing",
            )
        if self.running + self.waiting >= self._places + self._longest_line:
            raise overloaded(f"too many requests under way ({self.name})", self.expected_wait_s())
        wait_s = self.expected_wait_s()
        if wait_s > deadline_s:
            raise overloaded(
                f"the line for {self.name} is about {math.ceil(wait_s)} seconds long, more than the {deadline_s:g} that a "
                "request may take",
                wait_s - deadline_s,
            )

    def enter(self, cost: int, deadline_s: float) -> Place:
        """A place in the line for work of `cost` bytes, which has its turn at once where there is room. Raises Problem."""
        self.check(deadline_s, cost)
        place = Place(self, cost)
        self._line.append(place)
        self._advance()
        return place

    def leave(self, place: Place) -> None:
        """`Place.leave`."""
        if place in self._at_work:
            self._at_work.remove(place)
            self.bytes -= place.cost
            self._learn(self._clock() - (place.since or 0.0))
        elif place in self._line:
            self._line.remove(place)
            place.turn.cancel()
        self._advance()

    def _learn(self, spent_s: float) -> None:
        self._mean_s = spent_s if self._mean_s is None else (1 - _NEWEST) * self._mean_s + _NEWEST * spent_s

    def _advance(self) -> None:
        """Strictly in order: what needs much room is not overtaken for ever by what needs little."""
        while self._line and self.running < self._places and self.bytes + self._line[0].cost <= self.room:
            place = self._line.popleft()
            self._at_work.add(place)
            self.bytes += place.cost
            place.since = self._clock()
            place.turn.set_result(None)
        self._on_change()
