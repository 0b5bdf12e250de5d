"""A lane: places, memory, the order of its line, and when it says early that waiting is in vain. The clock is a number."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serving.admission.lanes import Lane
from serving.http.requests import Problem

PATIENT = 1e9


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def story(told: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that runs in an event loop."""

    def run() -> None:
        asyncio.run(told())

    run.__doc__ = told.__doc__
    return run


@story
async def test_places_and_line_are_bounded_and_served_in_order() -> None:
    lane = Lane("x", places=2, line=2, room=100)
    first, second, third, fourth = (lane.enter(1, PATIENT) for _ in range(4))
    assert [place.turn.done() for place in (first, second, third, fourth)] == [True, True, False, False]
    assert (lane.running, lane.waiting, lane.bytes) == (2, 2, 2)
    with pytest.raises(Problem) as full:
        lane.enter(1, PATIENT)
    assert (full.value.status, full.value.code) == (503, "overloaded")

    second.leave()
    assert (third.turn.done(), fourth.turn.done()) == (True, False)
    first.leave()
    assert fourth.turn.done()
    third.leave()
    fourth.leave()
    fourth.leave()  # twice is once
    assert (lane.running, lane.waiting, lane.bytes) == (0, 0, 0)


@story
async def test_what_needs_much_memory_is_not_overtaken() -> None:
    lane = Lane("x", places=9, line=9, room=100)
    half, most, little = lane.enter(50, PATIENT), lane.enter(90, PATIENT), lane.enter(1, PATIENT)
    assert [half.turn.done(), most.turn.done(), little.turn.done()] == [True, False, False]
    half.leave()
    assert (most.turn.done(), little.turn.done(), lane.bytes) == (True, True, 91)


@story
async def test_who_leaves_the_line_makes_room_for_those_behind() -> None:
    lane = Lane("x", places=9, line=9, room=100)
    lane.enter(50, PATIENT)
    most, little = lane.enter(90, PATIENT), lane.enter(1, PATIENT)
    most.leave()
    assert most.turn.cancelled()
    assert little.turn.done()


@story
async def test_more_than_the_lane_ever_has_is_refused_with_the_limit() -> None:
    lane = Lane("long work", places=1, line=1, room=64 << 20)
    with pytest.raises(Problem, match=r"70 MiB .* and the limit for long work is 64 MiB") as refused:
        lane.enter(70 << 20, PATIENT)
    assert (refused.value.status, refused.value.code) == (413, "too-much-memory")
    assert (lane.running, lane.waiting) == (0, 0)


@story
async def test_a_line_longer_than_the_deadline_is_refused_early_with_when_to_come_again() -> None:
    """Two places, 10 seconds each: the fourth in line would begin after 20 seconds."""
    clock = Clock()
    lane = Lane("x", places=2, line=99, room=100, clock=clock)
    done = [lane.enter(1, PATIENT) for _ in range(2)]
    clock.now = 10
    for place in done:
        place.leave()

    for _ in range(2):
        assert lane.expected_wait_s() == 0
        lane.enter(1, 15)
    assert lane.expected_wait_s() == 5
    lane.enter(1, 15)
    lane.enter(1, 15)
    lane.enter(1, 15)
    assert lane.expected_wait_s() == 20
    with pytest.raises(Problem, match="about 20 seconds") as refused:
        lane.check(15)
    assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "5"})
    lane.enter(1, 20)


@story
async def test_work_that_takes_longer_than_any_before_counts_while_it_runs() -> None:
    clock = Clock()
    lane = Lane("x", places=1, line=99, room=100, clock=clock)
    lane.enter(1, PATIENT)
    lane.check(15)  # nothing is known yet
    clock.now = 16
    with pytest.raises(Problem, match="seconds long"):
        lane.check(15)
