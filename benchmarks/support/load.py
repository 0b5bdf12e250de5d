"""Load on a server of one's own: an open model for what callers do, a closed one for what the server can do at most.

Open model: requests come when they come (Poisson), whether or not the ones before are answered, and each is timed from
when it was due. A generator that waits for answers slows down with the server and hides how long callers would have
waited ("coordinated omission").
"""

import asyncio
import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.support.wire import Reply, Wire

MOST, LONGEST_S = 500_000, 4 * 3600.0  # no run is larger, whatever is asked for
MOST_OPEN = 900  # connections at once; below the usual limit of 1024 open files


@dataclass(frozen=True)
class Call:
    """One request to send: `fine` are the statuses that a right server may answer besides 503.

    With `golden`, a 200 has to have that body. With `cut`, only so many bytes are sent before hanging up, and no answer
    is waited for.
    """

    kind: str
    sent: bytes
    fine: frozenset[int] = frozenset({200})
    golden: bytes | None = None
    cut: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a call. Seconds: `due_s` since the start; `late_s` sent after that; `took_s` from due to answered.

    `status` 0: no whole answer came. `verdict` as `judge` says, or unsent: no connection was free.
    """

    kind: str
    due_s: float
    late_s: float
    took_s: float
    status: int
    verdict: str
    bundle: str = ""

    @property
    def done_s(self) -> float:
        return self.due_s + self.took_s


def arrivals(rate: float, seconds: float, seed: int = 0, most: int = MOST) -> list[float]:
    """Rising times in [0, seconds) of a Poisson process of `rate` a second; no more than `most` of them.

    Raises:
        ValueError: a rate or a time that is not positive, or longer than LONGEST_S.
    """
    if not (rate > 0 and 0 < seconds <= LONGEST_S):
        raise ValueError(f"rate {rate} a second for {seconds} s: both positive, at most {LONGEST_S:g} s")
    source = random.Random(seed)
    gaps = (source.expovariate(rate) for _ in range(min(most, MOST)))
    return list(itertools.takewhile(lambda time: time < seconds, itertools.accumulate(gaps)))


def judge(call: Call, reply: Reply | None) -> str:
    """answered (2xx), refused (an expected 4xx), rejected (503), cut, or failed; `reply` None: no whole one came."""
    if call.cut is not None:
        return "cut"
    if reply is None:
        return "failed"
    if reply.status == 503:
        return "rejected"
    if reply.status not in call.fine or (reply.status == 200 and call.golden not in (None, reply.body)):
        return "failed"
    return "answered" if 200 <= reply.status < 300 else "refused"


def _outcome(call: Call, reply: Reply | None, due_s: float, late_s: float, took_s: float) -> Outcome:
    status, bundle = (reply.status, reply.headers.get("x-bundle-id", "")) if reply else (0, "")
    return Outcome(call.kind, due_s, late_s, took_s, status, judge(call, reply), bundle)


async def _send(wire: Wire, call: Call, patience_s: float) -> Reply | None:
    """None when no whole answer came in time."""
    try:
        async with asyncio.timeout(patience_s):
            if call.cut is not None:
                await wire.cut(call.sent[: call.cut])
                return None
            return await wire.ask(call.sent)
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
        return None


async def fire(
    wire: Wire, due: Sequence[float], call: Callable[[int], Call], *, most_open: int = MOST_OPEN, patience_s: float = 30
) -> list[Outcome]:
    """Send call(i) at due[i] seconds from now, come what may; returns when the last is answered or given up.

    A request that finds `most_open` others under way is not sent and says so: the run is then no open model any more.
    """
    clock = asyncio.get_running_loop().time
    start, under_way, done = clock(), set(), []

    async def one(this: Call, at: float) -> None:
        late = clock() - start - at
        reply = await _send(wire, this, patience_s)
        done.append(_outcome(this, reply, at, late, clock() - start - at))

    for i, at in enumerate(due):
        await asyncio.sleep(max(0.0, start + at - clock()))
        this = call(i)
        if len(under_way) >= most_open:
            done.append(Outcome(this.kind, at, 0.0, 0.0, 0, "unsent"))
            continue
        task = asyncio.create_task(one(this, at))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    if under_way:
        await asyncio.gather(*under_way)
    return done


async def saturate(
    wire: Wire, callers: int, seconds: float, call: Callable[[int], Call], *, patience_s: float = 30
) -> list[Outcome]:
    """`callers` that each send the next request as soon as they are answered: as much as the server can do."""
    clock, numbers = asyncio.get_running_loop().time, itertools.count()
    start, done = clock(), []

    async def caller() -> None:
        while (at := clock() - start) < seconds and (i := next(numbers)) < MOST:
            this = call(i)
            reply = await _send(wire, this, patience_s)
            done.append(_outcome(this, reply, at, 0.0, clock() - start - at))

    await asyncio.gather(*(caller() for _ in range(callers)))
    return done


def goodput(outcomes: Iterable[Outcome], seconds: float, within_s: float = math.inf) -> float:
    """Answers a second that came inside the first `seconds` and no later than `within_s` after they were due."""
    return sum(o.verdict == "answered" and o.done_s <= seconds and o.took_s <= within_s for o in outcomes) / seconds


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank); NaN of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def took(outcomes: Iterable[Outcome], share: float, verdict: str = "answered") -> float:
    """That percentile of the time from due to answered, seconds."""
    return percentile((o.took_s for o in outcomes if o.verdict == verdict), share)


def tally(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many were sent, and how many ended in which way."""
    count = Counter(o.verdict for o in outcomes)
    verdicts = ("answered", "refused", "rejected", "cut", "failed", "unsent")
    return {"sent": len(outcomes) - count["unsent"], **{name: count[name] for name in verdicts}}


def spread(values: Sequence[float]) -> dict[str, object]:
    """Median and quartiles of a ratio's rounds, as in the other rows."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"ratio": statistics.median(values), "ratio_quartiles": [low, high], "rounds": len(values)}
