"""The load generator's parts: when requests are due, what counts as answered, and that nothing leaves this machine."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.serving import soak_mix
from benchmarks.support import load, wire

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Bundle-Id: b1\r\n\r\nok"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def against(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], use: Any) -> Any:
    """`use(Wire)` against a server of this process that hands each connection to `answer`."""

    async def run() -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await answer(reader, writer)
            finally:
                writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        line = wire.Wire(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return await use(line)
        finally:
            line.close()
            server.close()

    return asyncio.run(asyncio.wait_for(run(), 30))


async def head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize(
    "url",
    ["http://example.com:80", "http://10.0.0.1:3000", "http://0.0.0.0:3000", "http://localhost:3000",
     "http://127.0.0.1.example.com:80", "https://127.0.0.1:3000", "http://127.0.0.1", "http://[::]:3000", "127.0.0.1:3000"],
)  # fmt: skip
def test_load_goes_nowhere_else(url: str) -> None:
    with pytest.raises(wire.NotLoopback, match=r"127\.0\.0\.1:PORT"):
        wire.Wire(url)


def test_loopback_is_fine() -> None:
    assert wire.loopback("http://127.0.0.1:3000") == ("127.0.0.1", 3000)
    assert wire.loopback("http://[::1]:3000/x") == ("::1", 3000)


def test_arrivals_are_a_poisson_process() -> None:
    due = load.arrivals(2000, 10, seed=3)
    assert due == sorted(due) == load.arrivals(2000, 10, seed=3) != load.arrivals(2000, 10, seed=4)
    assert due[0] > 0
    assert due[-1] < 10
    assert abs(len(due) - 20_000) < 4 * 20_000**0.5
    gaps = np.diff(due)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)  # of an exponential; evenly spaced ones have 0
    per_second = np.histogram(due, bins=1000, range=(0, 10))[0]
    assert per_second.var() / per_second.mean() == pytest.approx(1, abs=0.2)


def test_arrivals_are_bounded() -> None:
    assert len(load.arrivals(1e6, 1, most=50)) == 50
    for rate, seconds in ((0, 1), (-1, 1), (1, 0), (1, load.LONGEST_S + 1), (float("nan"), 1)):
        with pytest.raises(ValueError, match="both positive"):
            load.arrivals(rate, seconds)


def test_an_open_model_does_not_wait_for_answers() -> None:
    """None is answered before all have come: whoever sends the next one after an answer hangs here."""
    count = 12

    async def use(line: wire.Wire) -> list[load.Outcome]:
        call = load.Call("x", wire.request("GET", "/"))
        return await load.fire(line, [0.001 * i for i in range(count)], lambda i: call, patience_s=20)

    here, all_here = [0], asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        here[0] += 1
        if here[0] == count:
            all_here.set()
        await all_here.wait()
        writer.write(OK)
        await writer.drain()

    done = against(answer, use)
    assert [o.verdict for o in done] == ["answered"] * count
    assert {o.bundle for o in done} == {"b1"}


def test_time_counts_from_when_a_request_was_due() -> None:
    """The generator is held up for 20 ms before each of three requests that are due at once."""

    def held_up(i: int) -> load.Call:
        time.sleep(0.02)
        return load.Call("x", wire.request("GET", "/"))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(OK)
        await writer.drain()

    done = sorted(against(answer, lambda line: load.fire(line, [0.0] * 3, held_up)), key=lambda o: o.late_s)
    for i, outcome in enumerate(done, 1):
        assert outcome.took_s >= outcome.late_s >= 0.02 * i


def test_what_cannot_be_sent_is_said() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # never an answer

    call = load.Call("x", wire.request("GET", "/"))
    done = against(answer, lambda line: load.fire(line, [0.0] * 5, lambda i: call, most_open=2, patience_s=0.1))
    assert sorted(o.verdict for o in done) == ["failed"] * 2 + ["unsent"] * 3
    assert load.tally(done) == {
        "sent": 2, "answered": 0, "refused": 0, "rejected": 0, "cut": 0, "failed": 2, "unsent": 3,
    }  # fmt: skip


def test_connections_are_kept_and_a_closed_one_is_replaced() -> None:
    accepted, served = [0], [0]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted[0] += 1
        for _ in range(3):  # then closes without having said so
            await head(reader)
            served[0] += 1
            writer.write(OK)
            await writer.drain()

    async def use(line: wire.Wire) -> list[int]:
        return [(await line.ask(wire.request("GET", "/"))).status for _ in range(7)]

    assert against(answer, use) == [200] * 7
    assert (accepted[0], served[0]) == (3, 7)


def test_chunked_answers_and_early_ones_are_read() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(
            b"HTTP/1.1 413 No\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        )
        await writer.drain()

    reply = against(answer, lambda line: line.ask(wire.request("POST", "/", bytes(100), content_type="image/png")))
    assert (reply.status, reply.body) == (413, b"abcde")


def test_a_cut_request_is_sent_so_far_and_no_further() -> None:
    seen = asyncio.Queue[bytes]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = b""
        try:
            while piece := await reader.read(100):
                got += piece
        except ConnectionError:
            pass
        seen.put_nowait(got)

    async def use(line: wire.Wire) -> tuple[list[load.Outcome], bytes]:
        call = load.Call("x", wire.request("POST", "/", b"whole body"), cut=30)
        return await load.fire(line, [0.0], lambda i: call), await seen.get()

    done, got = against(answer, use)
    assert [o.verdict for o in done] == ["cut"]
    assert len(got) in (0, 30)  # a reset may overtake the bytes


def test_verdicts() -> None:
    plain = load.Call("x", b"")
    picky = load.Call("x", b"", fine=frozenset({200, 415}), golden=b"ok")

    def reply(status: int, body: bytes = b"ok") -> wire.Reply:
        return wire.Reply(status, {}, body)

    assert load.judge(plain, reply(200, b"anything")) == "answered"
    assert load.judge(plain, reply(415)) == "failed"
    assert load.judge(picky, reply(415, b"?")) == "refused"
    assert load.judge(picky, reply(200)) == "answered"
    assert load.judge(picky, reply(200, b"another image's")) == "failed"
    for status in (500, 502, 504):
        assert load.judge(picky, reply(status)) == "failed"
    assert load.judge(picky, reply(503)) == "rejected"
    assert load.judge(picky, None) == "failed"


def test_goodput_and_percentiles() -> None:
    def outcome(due: float, took: float, verdict: str = "answered") -> load.Outcome:
        return load.Outcome("x", due, 0, took, 200, verdict)

    some = [outcome(0, 1), outcome(1, 3), outcome(3, 2), outcome(0, 1, "rejected"), outcome(0, 1, "refused")]
    assert load.goodput(some, 4) == 2 / 4  # the third came too late to count
    assert load.goodput(some, 4, within_s=2) == 1 / 4
    assert load.took(some, 0.5) == 2
    values = np.random.default_rng(1).normal(size=57)
    for share in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0):
        assert load.percentile(values, share) == np.percentile(values, 100 * share, method="inverted_cdf")


@pytest.mark.slow
def test_the_mix_is_what_the_server_says_it_is(server: Any) -> None:
    """Every call of the soak, once, against the real server: each gets one of the statuses that it names."""
    limits = (2 << 20, 2_000_000)  # the shared server's
    views = {"mask": "image/png", "json": "application/json", "overlay": "image/jpeg", "confidence": "image/png",
             "geojson": "application/geo+json"}  # fmt: skip
    calls = [item.call for item in soak_mix.mix("unused", *limits, views, batch=True)]
    calls = [call for call in calls if "token" not in call.kind and call.kind.split()[-1] != "large"]

    async def run() -> list[load.Outcome]:
        line = wire.Wire(server.url)
        done = [(await load.fire(line, [0.0], lambda i, c=call: c))[0] for call in calls]
        line.close()
        return done

    wrong = [(o.kind, o.status) for o in asyncio.run(run()) if o.verdict not in ("answered", "refused", "cut")]
    assert wrong == []
    assert len({call.kind for call in calls}) == len(calls) > 20


def test_calls_are_drawn_by_weight() -> None:
    calls = soak_mix.mix("unused", 1, 1, {"mask": "image/png"}, batch=True)
    pick, count = soak_mix.picker(calls, 5), 20_000
    drawn = Counter(pick(i).kind for i in range(count))
    total = sum(item.weight for item in calls)
    for item in calls:
        expected = count * item.weight / total
        assert abs(drawn[item.call.kind] - expected) < 5 * expected**0.5
    answered = sum(item.weight for item in calls if 200 in item.call.fine and item.call.cut is None)
    assert 0.7 < answered / total < 0.85
