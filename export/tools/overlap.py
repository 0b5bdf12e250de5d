"""Items through load, prepare, run and finish, with these overlapping in time; in order, with bounded memory.

The network runs in the caller's thread. One thread loads the items, a few prepare and finish them beside it: decoding,
scaling and packing release Python's lock while they work.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

MEMORY = 1 << 30  # bytes under way; one item that needs more goes alone
WINDOW = 32  # items under way at most

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Prepared = TypeVar("Prepared")
Answer = TypeVar("Answer")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Steps(Generic[Item, Loaded, Prepared, Answer, Done]):
    """What is done with an item. An exception from any of these is that item's own: the others go on.

    load: in one thread of its own, in the items' order.
    cost: of what was loaded: the bytes that it needs from then until it is finished.
    prepare, finish: in the workers' threads.
    run: in the caller's thread, one item at a time.
    """

    load: Callable[[Item], Loaded]
    cost: Callable[[Loaded], int]
    prepare: Callable[[Loaded], Prepared]
    run: Callable[[Prepared], Answer]
    finish: Callable[[Answer], Done]


def run_overlapped(
    items: Iterable[Item],
    steps: Steps[Item, Loaded, Prepared, Answer, Done],
    *,
    workers: int,
    memory: int = MEMORY,
) -> Generator[Future[Done], None, None]:
    """Yield for each item, in order, a future that is done: its result is `finish`'s, or raises what a step raised.

    What drawing from `items` raises ends the work and is raised here. A generator that is closed early, as by Ctrl-C,
    waits for the steps under way and starts no other; close it (`contextlib.closing`) where an item's error ends the work.
    """
    budget = _Budget(memory)
    pool = ThreadPoolExecutor(workers, "overlap")
    feeder = _Feeder(items, steps, pool, budget)
    finishing: deque[Future[Done]] = deque()
    feeder.start()
    try:
        for cost, prepared in feeder.arrivals():
            done = _run_and_finish(steps, prepared, pool)
            done.add_done_callback(budget.giver(cost))
            finishing.append(done)
            while finishing and finishing[0].done():
                yield finishing.popleft()
        while finishing:
            wait([finishing[0]])
            yield finishing.popleft()
    finally:
        budget.close()
        feeder.join()
        pool.shutdown(cancel_futures=True)


class _Closed(Exception):
    """Nobody waits for further items."""


class _Budget:
    """Bytes that may be under way. Only one thread takes, in the items' order, so the first always comes through."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._open = True
        self._changed = threading.Condition()

    def take(self, cost: int) -> int:
        """Wait until so much is free, and return what was taken. Raises _Closed."""
        cost = min(self._total, max(cost, self._total // WINDOW))
        with self._changed:
            self._changed.wait_for(lambda: self._free >= cost or not self._open)
            if not self._open:
                raise _Closed
            self._free -= cost
        return cost

    def giver(self, cost: int) -> Callable[[object], None]:
        """What gives `cost` back when it is called."""

        def give(_: object) -> None:
            with self._changed:
                self._free += cost
                self._changed.notify()

        return give

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()


class _Feeder(threading.Thread, Generic[Item, Loaded, Prepared]):
    """Draws and loads the items, and hands them to the workers to be prepared, as far ahead as the budget allows."""

    def __init__(
        self,
        items: Iterable[Item],
        steps: Steps[Item, Loaded, Prepared, Answer, Done],
        pool: ThreadPoolExecutor,
        budget: _Budget,
    ) -> None:
        super().__init__(name="overlap-feed")
        self._items = items
        self._load, self._cost, self._prepare = steps.load, steps.cost, steps.prepare
        self._pool = pool
        self._budget = budget
        self._ready: queue.SimpleQueue[tuple[int, Future[Prepared]] | BaseException | None] = queue.SimpleQueue()

    def arrivals(self) -> Iterator[tuple[int, Future[Prepared]]]:
        """What each item took from the budget, and its preparation. Raises what drawing an item raised."""
        while (arrived := self._ready.get()) is not None:
            if isinstance(arrived, BaseException):
                raise arrived
            yield arrived

    def run(self) -> None:
        try:
            for item in self._items:
                self._ready.put(self._start(item))
            self._ready.put(None)
        except _Closed:
            pass
        except BaseException as error:  # of the iterable: `arrivals` raises it in the caller's thread
            self._ready.put(error)

    def _start(self, item: Item) -> tuple[int, Future[Prepared]]:
        try:
            loaded = self._load(item)
            cost = self._cost(loaded)
        except Exception as error:  # the item's own, raised where its future is asked
            return self._budget.take(0), _failed(error)
        return self._budget.take(cost), self._pool.submit(self._prepare, loaded)


def _run_and_finish(
    steps: Steps[Item, Loaded, Prepared, Answer, Done], prepared: Future[Prepared], pool: ThreadPoolExecutor
) -> Future[Done]:
    try:
        answer = steps.run(prepared.result())
    except Exception as error:  # the item's own, raised where its future is asked
        return _failed(error)
    return pool.submit(steps.finish, answer)


def _failed(error: Exception) -> "Future[Done]":
    future: Future[Done] = Future()
    future.set_exception(error)
    return future
