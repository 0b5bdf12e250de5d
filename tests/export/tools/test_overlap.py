"""export.tools.overlap: order, bounds, errors and early ends."""

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from export.tools.overlap import WINDOW, Steps, run_overlapped


def same(item: int) -> int:
    return item


def results(outcomes: Iterable[Future[Any]]) -> list[Any]:
    return [outcome.result() for outcome in outcomes]


def test_order_is_kept_and_all_steps_are_done() -> None:
    def slow_if_even(item: int) -> int:
        time.sleep(0.004 * (item % 2 == 0))
        return item + 1

    steps = Steps(same, lambda _: 1, slow_if_even, lambda x: 10 * x, lambda x: (x, x))
    assert results(run_overlapped(range(50), steps, workers=3)) == [(10 * (i + 1), 10 * (i + 1)) for i in range(50)]


def test_what_is_under_way_stays_within_the_memory() -> None:
    lock, costs = threading.Lock(), [3, 9, 40, 5, 5, 5, 60, 1, 2, 20] * 6
    now = most = 0
    alone: list[int] = []

    def start(at: int) -> int:
        nonlocal now, most
        with lock:
            now += costs[at]
            most = max(most, now if costs[at] <= 30 else 0)
            if costs[at] > 30:
                alone.append(now - costs[at])
        return at

    def finish(at: int) -> int:
        nonlocal now
        time.sleep(0.001)
        with lock:
            now -= costs[at]
        return at

    steps = Steps(same, lambda at: costs[at], start, same, finish)
    assert results(run_overlapped(range(60), steps, workers=4, memory=30)) == list(range(60))
    assert 20 <= most <= 30
    assert set(alone) == {0}  # what needs more than the memory goes alone


def test_items_are_not_drawn_far_ahead() -> None:
    drawn: list[int] = []

    def draw() -> object:
        for number in range(10 * WINDOW):
            drawn.append(number)
            yield number

    outcomes = run_overlapped(draw(), Steps(same, lambda _: 0, same, same, same), workers=2)
    assert next(outcomes).result() == 0
    time.sleep(0.05)
    assert len(drawn) <= 2 * WINDOW + 2
    outcomes.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("overlap")]


def fails_at_five(item: int) -> int:
    if item == 5:
        raise OSError("the fifth has failed")
    return item


@pytest.mark.parametrize("step", ["load", "cost", "prepare", "run", "finish"])
def test_an_error_of_an_item_is_its_own(step: str) -> None:
    steps = replace(Steps(same, same, same, same, same), **{step: fails_at_five})
    for number, outcome in enumerate(run_overlapped(range(20), steps, workers=2)):
        assert outcome.done()
        if number == 5:
            with pytest.raises(OSError, match="the fifth has failed"):
                outcome.result()
        else:
            assert outcome.result() == number
    assert number == 19


def test_an_error_of_the_items_themselves_ends_the_work_and_is_raised() -> None:
    items = map(fails_at_five, range(10**6))
    outcomes = run_overlapped(items, Steps(same, same, same, same, same), workers=2)
    with pytest.raises(OSError, match="the fifth has failed"):
        list(outcomes)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("overlap")]


def test_an_interrupt_in_the_callers_thread_ends_the_work() -> None:
    def interrupted(item: int) -> int:
        raise KeyboardInterrupt

    outcomes = run_overlapped(range(10**6), Steps(same, same, same, interrupted, same), workers=2)
    with pytest.raises(KeyboardInterrupt):
        list(outcomes)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("overlap")]
