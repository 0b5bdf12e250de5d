"""How long the phases of a request take where they are interleaved."""

import contextlib
import time
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


class PhaseTimer:
    """Seconds by phase of work that is pulled through generators; what belongs to no other phase is encoding."""

    def __init__(self) -> None:
        self._seconds = {"decode": 0.0, "run": 0.0}
        self._begun = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to a phase."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - begun

    def pulled(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items; what it takes to make each counts for a phase."""
        while True:
            with self.phase(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def timings(self) -> dict[str, float]:
        """Seconds of decode, run and encode until now."""
        encode = time.perf_counter() - self._begun - sum(self._seconds.values())
        return {**self._seconds, "encode": encode}
