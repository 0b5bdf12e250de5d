"""Three steps at a time: read and prepare, run, finish; in order, with bounded memory.

The network runs in the caller's thread. One thread draws the items, a few prepare and finish them beside it: decoding,
scaling and packing release Python's lock while they work.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

MEMORY = 1 << 30  # bytes under way; one item that needs more goes alone
WINDOW = 32  # items under way at most

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Answer = TypeVar("Answer")
Done = TypeVar("Done")


class _Closed(Exception):
    """Nobody waits for further items."""


class _Budget:
    """Bytes that may be under way. Only one thread takes, in the items' order, so the first always comes through."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._open = True
        self._changed = threading.Condition()

    def take(self, cost: int) -> int:
        cost = min(self._total, max(cost, self._total // WINDOW))
        with self._changed:
            self._changed.wait_for(lambda: self._free >= cost or not self._open)
            if not self._open:
                raise _Closed
            self._free -= cost
        return cost

    def give(self, cost: int) -> None:
        with self._changed:
            self._free += cost
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()


def overlapped(
    items: Iterable[Item],
    before: Callable[[Item], Prepared],
    run: Callable[[Prepared], Answer],
    after: Callable[[Answer], Done],
    *,
    cost: Callable[[Item], int],
    workers: int,
    memory: int = MEMORY,
) -> Iterator[Done]:
    """Yield `after(run(before(item)))` for each item, in order.

    `run` is called here, one item at a time; `before` and `after` in `workers` threads; `cost` gives the bytes that an
    item needs from when it is drawn until `after` is through. Whatever any of them raises ends the work and is raised
    here; a generator that is closed early, as by Ctrl-C, waits for the `after` under way and starts no other.
    """
    budget = _Budget(memory)
    ready: queue.SimpleQueue[tuple[int, Future[Prepared]] | BaseException | None] = queue.SimpleQueue()
    pool = ThreadPoolExecutor(workers, "overlap")

    def feed() -> None:
        try:
            for item in items:
                taken = budget.take(cost(item))
                ready.put((taken, pool.submit(before, item)))
            ready.put(None)
        except _Closed:
            pass
        except BaseException as error:
            ready.put(error)

    feeder = threading.Thread(target=feed, name="overlap-feed")
    finishing: deque[Future[Done]] = deque()
    feeder.start()
    try:
        while (arrived := ready.get()) is not None:
            if isinstance(arrived, BaseException):
                raise arrived
            taken, future = arrived
            done = pool.submit(after, run(future.result()))
            done.add_done_callback(lambda _, taken=taken: budget.give(taken))  # type: ignore[misc]
            finishing.append(done)
            while finishing and finishing[0].done():
                yield finishing.popleft().result()
        while finishing:
            yield finishing.popleft().result()
    finally:
        budget.close()
        feeder.join()
        pool.shutdown(cancel_futures=True)
