"""export.tools.overlap: order, bounds, errors and early ends."""

import threading
import time

import pytest

from export.tools.overlap import WINDOW, overlapped


def same(item: int) -> int:
    return item


def test_order_is_kept_and_all_steps_are_done() -> None:
    def slow_if_even(item: int) -> int:
        time.sleep(0.004 * (item % 2 == 0))
        return item + 1

    done = overlapped(range(50), slow_if_even, lambda x: 10 * x, lambda x: (x, x), cost=lambda _: 1, workers=3)
    assert list(done) == [(10 * (i + 1), 10 * (i + 1)) for i in range(50)]


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

    assert list(overlapped(range(60), start, same, finish, cost=lambda at: costs[at], workers=4, memory=30)) == list(
        range(60)
    )
    assert 20 <= most <= 30
    assert set(alone) == {0}  # what needs more than the memory goes alone


def test_items_are_not_drawn_far_ahead() -> None:
    drawn: list[int] = []

    def draw() -> object:
        for number in range(10 * WINDOW):
            drawn.append(number)
            yield number

    steps = overlapped(draw(), same, same, same, cost=lambda _: 0, workers=2)
    assert next(steps) == 0
    time.sleep(0.05)
    assert len(drawn) <= 2 * WINDOW + 2
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("overlap")]


@pytest.mark.parametrize("step", ["items", "before", "run", "after", "cost"])
def test_an_error_anywhere_ends_the_work_and_is_raised(step: str) -> None:
    def fails_at(name: str) -> object:
        def work(item: int) -> int:
            if name == step and item == 5:
                raise OSError(f"{name} has failed")
            return item

        return work

    items = map(fails_at("items"), range(10**6))
    steps = overlapped(items, fails_at("before"), fails_at("run"), fails_at("after"), cost=fails_at("cost"), workers=2)
    with pytest.raises(OSError, match=f"{step} has failed"):
        list(steps)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("overlap")]
