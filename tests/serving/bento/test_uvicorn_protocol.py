"""serving.bento.uvicorn_protocol: idle, slow and too many connections are ended; those that keep the pace are not."""

import contextlib
import json
import re
import select
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from serving.http import requests
from serving.settings import Settings
from tests.support.image_files import save
from tests.support.live_server import Server, until
from tests.support.threaded_server import LONGEST, Held, Own, serving

RAW = {"Content-Type": "application/octet-stream"}
PICTURE = save(Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
HEAD = b"POST /v1/segment%s HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
MODEL = b"GET /v1/model HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Held:
    return Held(tmp_path_factory.mktemp("connections") / "bundle")


@contextlib.contextmanager
def link(own: Own | Server, sent: bytes = b"", buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as made:
        if buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.settimeout(LONGEST)
        made.connect(("127.0.0.1", own.port))
        made.sendall(sent)
        yield made


def rest(made: socket.socket) -> bytes:
    """What still comes until the server ends the connection."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := made.recv(65536):
            got += piece
    return got


def an_answer(made: socket.socket) -> None:
    """Read one whole answer in JSON."""
    got = b""
    while not got.endswith(b"}"):
        piece = made.recv(65536)
        assert piece, got
        got += piece
    assert got.startswith(b"HTTP/1.1 200")


def rejected(own: Own | Server, reason: str) -> float:
    with own.client() as http:
        text = http.get("/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "marginalia_rejected_total" and sample.labels["reason"] == reason
    )


def rejected_here(reason: str) -> float:
    """The same of a server in this process, without a connection to it."""
    return REGISTRY.get_sample_value("marginalia_rejected_total", {"reason": reason}) or 0.0


@pytest.mark.parametrize("sent", [b"", b"POST /v1/seg", b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nA: b"])
def test_a_head_that_does_not_come_is_not_waited_for(model: Held, sent: bytes) -> None:
    with serving(model) as own:
        before = rejected(own, "slow-head")
        own.limit(head_timeout_s=0.3)
        with link(own, sent) as made:
            assert rest(made) == b""
        own.limit(head_timeout_s=LONGEST)
        assert rejected(own, "slow-head") == before + 1


def test_a_second_head_has_the_same_time_and_a_quiet_connection_longer(model: Held) -> None:
    run = len(model.shapes)
    model.gate.clear()
    with serving(model) as own, link(own, HEAD % (b"?view=json", len(PICTURE)) + PICTURE) as made:
        until(lambda: len(model.shapes) > run)
        own.limit(head_timeout_s=0.3)  # from before the answer
        model.gate.set()
        an_answer(made)
        with link(own) as quiet:
            assert rest(quiet) == b""  # 0.3 s have passed, and the first connection still stands:
        own.limit(head_timeout_s=LONGEST)
        made.sendall(MODEL)
        an_answer(made)
        before = rejected(own, "slow-head")
        own.limit(head_timeout_s=0.3)
        made.sendall(b"GET /v1/mo")
        assert rest(made) == b""
        own.limit(head_timeout_s=LONGEST)
        assert rejected(own, "slow-head") == before + 1


def test_a_quiet_connection_is_closed_in_the_end(model: Held) -> None:
    with serving(model, idle_timeout_s=0.2, head_timeout_s=20) as own, link(own, MODEL) as made, link(own) as clock:
        an_answer(made)
        before = rejected(own, "slow-head")
        assert rest(made) == b""
        assert rejected(own, "slow-head") == before  # closed, not cut
        assert not select.select([clock], [], [], 0)[0]  # and sooner than one that says nothing is cut


def test_a_long_wait_for_the_answer_is_no_slowness(model: Held) -> None:
    """Neither clock runs while the service is the one that takes its time."""
    model.gate.clear()
    with (
        serving(model, head_timeout_s=5.0, idle_timeout_s=0.2) as own,
        ThreadPoolExecutor(1) as pool,
        own.client() as http,
    ):
        waiting = pool.submit(http.post, "/v1/segment", content=PICTURE, headers=RAW)
        until(lambda: own.handler.admission.requests == 1)
        with link(own) as clock:
            assert rest(clock) == b""  # a connection that is cut after 5 s is the clock
        model.gate.set()
        assert waiting.result(LONGEST).status_code == 200


def refusal(made: socket.socket) -> bytes:
    """Everything up to the end of an error answer."""
    got = b""
    while not got.endswith(b"}}"):
        piece = made.recv(4096)
        assert piece, got
        got += piece
    return got


@pytest.mark.parametrize("end", ["whole", "stuck"])
def test_who_is_refused_early_may_send_the_body_to_its_end(
    model: Held, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refused body takes longer than a head may; then the connection serves the next request. Or it is cut."""
    monkeypatch.setattr(requests, "GRACE_S", LONGEST if end == "whole" else 0.2)
    monkeypatch.setattr(requests, "LONGEST_PAUSE_S", LONGEST)
    with serving(model, token="t", head_timeout_s=1) as own:
        before = rejected(own, "slow-body")
        with link(own, HEAD % (b"", 1000) + bytes(500)) as made:
            assert refusal(made).startswith(b"HTTP/1.1 401")
            made.sendall(bytes(100))
            if end == "stuck":
                assert rest(made) == b""
                assert rejected(own, "slow-body") == before + 1
                return
            with link(own) as clock:
                assert rest(clock) == b""  # a connection that is cut after 1 s is the clock
            made.sendall(bytes(400) + MODEL)
            assert refusal(made).startswith(b"HTTP/1.1 401")


def test_slow_bodies_are_cut_by_rate_before_the_time_is_up(model: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "GRACE_S", 0.3)
    with serving(model, min_rate_kb=1000) as own:
        with link(own, HEAD % (b"", len(PICTURE)) + PICTURE[:-1]) as made:
            answer = rest(made)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"slow-body"' in answer


def test_a_body_that_keeps_the_rate_may_take_long(model: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much longer than the pause that anybody may make at the start."""
    monkeypatch.setattr(requests, "GRACE_S", 0.5)
    pieces = [PICTURE[i : i + 500] for i in range(0, len(PICTURE), 500)]
    assert len(pieces) >= 8
    with serving(model, min_rate_kb=0.1) as own, link(own, HEAD % (b"?view=json", len(PICTURE))) as made:
        for piece in pieces:
            made.sendall(piece)
            time.sleep(0.2)
        an_answer(made)


def test_rate_alone_decides_and_pauses_are_bounded() -> None:
    kib = 1024

    def lasts(seconds: int, rate: float, settings: Settings) -> bool:
        """Whether a body that comes at `rate` bytes a second, once a second, is waited for so long."""
        pace = requests.Pace(settings, 0.0)
        return all(pace.came(int(rate), float(now)) >= now + 1 for now in range(1, seconds))

    slow = Settings(min_rate_kb=16)
    assert lasts(3600, 500_000, slow)  # a phone
    assert lasts(3600, 17 * kib, slow)
    assert not lasts(3600, 15 * kib, slow)
    assert lasts(3600, 15 * kib, Settings(min_rate_kb=14))
    pace = requests.Pace(slow, 0.0)
    assert pace.came(100_000_000, 1.0) == 1.0 + requests.LONGEST_PAUSE_S  # no credit for an hour
    assert requests.Pace(slow, 7.0).deadline == 7.0 + requests.GRACE_S


def test_the_slowest_body_makes_room_where_all_connections_are_taken(model: Held) -> None:
    """One connection waits for the model, two upload; the one of them that came less far in the same time has to go."""
    model.gate.clear()
    run = len(model.shapes)
    with serving(model, max_connections=3) as own, contextlib.ExitStack() as stack:
        working = stack.enter_context(link(own, HEAD % (b"?view=json", len(PICTURE)) + PICTURE))
        until(lambda: len(model.shapes) > run)
        patient = HEAD.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n") % (b"?view=json", len(PICTURE))
        quick, drip = (stack.enter_context(link(own, patient)) for _ in range(2))
        for made, sent in ((quick, PICTURE[:-1]), (drip, PICTURE[:1])):
            assert made.recv(100).startswith(b"HTTP/1.1 100")  # its body is waited for, so it is not idle
            made.sendall(sent)
        before = rejected_here("evicted")

        def somebody_new_is_answered() -> bool:
            """Refused while it is too early to say who is slow."""
            with link(own, MODEL) as made:
                return made.recv(100).startswith(b"HTTP/1.1 200")

        until(somebody_new_is_answered)
        answer = rest(drip)
        assert answer.startswith(b"HTTP/1.1 503")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "evicted"
        until(lambda: rejected_here("evicted") == before + 1)
        quick.sendall(PICTURE[-1:])
        model.gate.set()
        an_answer(working)
        an_answer(quick)


def test_who_does_not_read_the_answer_is_cut_and_who_begins_to_is_not(model: Held) -> None:
    """An overlay of noise is larger than what the kernel keeps for a client with a small window."""
    noise = np.random.default_rng(6).integers(0, 256, (1200, 1300, 3), dtype=np.uint8)
    body = save(Image.fromarray(noise), "JPEG", quality=70)
    ask = HEAD % (b"?view=overlay", len(body)) + body
    with serving(model, min_rate_kb=100_000) as own:  # limits.GRACE_S, for one to read all and for the other to be cut
        before = rejected(own, "slow-reader")
        with link(own, ask, buffer=65536) as late, link(own, ask, buffer=4096) as lazy:
            until(lambda: own.handler.admission.requests == 0)
            head, _, picture = late.recv(1 << 16).partition(b"\r\n\r\n")
            size = int(re.findall(rb"content-length: (\d+)", head.lower())[0])
            assert size > 4_000_000
            while len(picture) < size:
                piece = late.recv(1 << 16)
                assert piece, len(picture)
                picture += piece
            until(lambda: rejected(own, "slow-reader") == before + 1)
            assert len(rest(lazy)) < size
            late.sendall(MODEL)
            an_answer(late)


def test_too_many_connections_push_out_the_one_that_idles_longest(model: Held) -> None:
    with serving(model, max_connections=3) as own, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(link(own, MODEL)) for _ in range(3))
        for made in (first, second, third):
            an_answer(made)
        first.sendall(MODEL)
        an_answer(first)
        fourth = stack.enter_context(link(own, MODEL))
        an_answer(fourth)
        assert rest(second) == b""  # the longest without a request
        for made in (first, third, fourth):
            made.sendall(MODEL)
            an_answer(made)


def test_when_all_connections_work_one_more_is_told_so(model: Held) -> None:
    model.gate.clear()
    with serving(model, max_connections=2) as own, ThreadPoolExecutor(2) as pool:
        working = [pool.submit(httpx.post, f"http://127.0.0.1:{own.port}/v1/segment", content=PICTURE, headers=RAW,
                               timeout=LONGEST, trust_env=False) for _ in range(2)]  # fmt: skip
        until(lambda: own.handler.admission.requests == 2)
        with link(own) as made:
            full = rest(made)
        assert full.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1\r\n" in full
        head, _, body = full.partition(b"\r\n\r\n")
        assert b"Content-Length: %d\r\n" % len(body) in head + b"\r\n"
        assert json.loads(body)["error"]["code"] == "overloaded"
        model.gate.set()
        assert [done.result(LONGEST).status_code for done in working] == [200, 200]


def test_the_real_server_uses_them(server: Server) -> None:
    """Started through BentoML: were the hook at the wrong place, uvicorn's own protocol would wait for ever."""
    before = rejected(server, "slow-head")
    with link(server, b"GET /v1/model HTTP/1.1\r\nHost: x\r\n") as made:
        assert rest(made) == b""
    assert rejected(server, "slow-head") > before
