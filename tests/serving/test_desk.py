"""serving.desk: who is let in, who waits, who is dropped, and when a place is free again. The model is held by a gate."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from pipeline import images
from serving import answers, limits, settings
from serving.desk import Desk, largest_batch, segment
from serving.limits import Problem
from tests.live_server import error, until
from tests.own_server import LONGEST, Held, Own, serving, slot_of
from tests.pictures import save

RNG = np.random.default_rng(8)
RAW = {"Content-Type": "application/octet-stream"}
MASK = answers.KINDS[0]


def picture(height: int, width: int) -> bytes:
    return save(Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)))


PICTURE = picture(60, 80)


@pytest.fixture
def model(tmp_path: Path) -> Held:
    return Held(tmp_path / "bundle")


def told(caplog: pytest.LogCaptureFixture, kind: str) -> list[dict]:
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "marginalia"]
    return [line for line in lines if line["event"] == kind]


@contextlib.contextmanager
def crowd(own: Own, bodies: list[bytes]) -> Iterator[list[Future[httpx.Response]]]:
    """Send all at once, each on a connection of its own."""
    with ThreadPoolExecutor(len(bodies)) as pool, own.client() as http:
        yield [pool.submit(http.post, "/v1/segment", content=body, headers=RAW) for body in bodies]


def test_every_answer_is_its_own_whatever_runs_together(model: Held) -> None:
    """Mixed sizes and views under concurrency, batches allowed: byte for byte what this process answers."""
    here = settings.Settings(concurrency=8, max_batch=8)
    bodies = [picture(*[(40, 64), (64, 40), (64, 64), (200, 100), (17, 5)][i % 5]) for i in range(60)]
    kinds = [answers.KINDS[i % 2] for i in range(60)]
    with (
        serving(model, concurrency=8, max_batch=8, queue=60) as own,
        own.client() as http,
        ThreadPoolExecutor(16) as pool,
    ):

        def ask(body: bytes, kind: answers.Kind) -> httpx.Response:
            return http.post("/v1/segment", content=body, headers=RAW | {"Accept": kind.media_type})

        found = list(pool.map(ask, bodies, kinds))
    for body, kind, response in zip(bodies, kinds, found, strict=True):
        assert response.content == segment(body, kind, model, here, 0.0).body
    assert max(shape[0] for shape in model.shapes) > 1


def test_a_full_house_refuses_before_the_body_and_recovers(model: Held) -> None:
    """F46: 503 with Retry-After for a head alone; everybody who was let in is answered."""
    model.gate.clear()
    with serving(model, concurrency=2, queue=3) as own, crowd(own, [PICTURE] * 5) as admitted:
        until(lambda: own.desk.admission.requests == 5)
        with socket.create_connection(("127.0.0.1", own.port), LONGEST) as link:
            head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000000\r\n\r\n"
            link.sendall(head)
            answer = b""
            while b"}}" not in answer:
                answer += link.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1\r\n" in answer.lower()
        assert b'"overloaded"' in answer
        model.gate.set()
        assert [response.result(LONGEST).status_code for response in admitted] == [200] * 5
        until(lambda: own.desk.admission.requests == own.desk.admission.pixels == own.desk.admission.bytes == 0)
        with own.client() as http:
            assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200


def test_pixels_are_counted_and_an_image_alone_is_let_in(model: Held) -> None:
    model.gate.clear()
    with serving(model, max_pixels_at_once=5000) as own, own.client() as http, crowd(own, [PICTURE]) as first:
        until(lambda: own.desk.admission.pixels == 4800)
        full = http.post("/v1/segment", content=picture(24, 32), headers=RAW)
        assert (full.status_code, error(full)) == (503, "overloaded")
        assert full.headers["retry-after"] == "1"
        with crowd(own, [picture(10, 20)]) as small:
            until(lambda: own.desk.admission.pixels == 5000)
            full = http.post("/v1/segment", content=picture(1, 1), headers=RAW)
            assert (full.status_code, error(full)) == (503, "overloaded")
            model.gate.set()
            assert small[0].result(LONGEST).status_code == first[0].result(LONGEST).status_code == 200
        until(lambda: own.desk.admission.pixels == 0)
        assert http.post("/v1/segment", content=picture(100, 60), headers=RAW).status_code == 200


def test_bodies_are_counted_as_they_come(model: Held) -> None:
    """2 MiB of room: a body of which 1.5 MiB came leaves room for a small one only, and gives it back when it goes."""
    head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    large = PICTURE + bytes(900_000)
    with serving(model, max_body_mb=1, max_bodies_mb=2) as own, own.client() as http:
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                slow = stack.enter_context(socket.create_connection(("127.0.0.1", own.port), LONGEST))
                slow.sendall(head % 800_000 + bytes(700_000))
            until(lambda: own.desk.admission.bytes == 1_400_000)
            assert own.desk.admission.requests == 0
            full = http.post("/v1/segment", content=large, headers=RAW)
            assert (full.status_code, error(full)) == (503, "overloaded")
            assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200
        until(lambda: own.desk.admission.bytes == 0)
        assert http.post("/v1/segment", content=large, headers=RAW).status_code == 200


def test_after_the_deadline_the_place_stays_taken_until_the_work_ends(
    model: Held, caplog: pytest.LogCaptureFixture
) -> None:
    """F45: the one in the model and the one in line both get 504; only the second's place is free, and it never runs."""
    caplog.set_level(logging.INFO, "marginalia")
    model.gate.clear()
    with serving(model, concurrency=1, queue=1, timeout_s=0.2) as own, own.client() as http:
        with crowd(own, [PICTURE] * 2) as late:
            for response in late:
                assert (response.result(LONGEST).status_code, error(response.result())) == (504, "deadline")
        until(lambda: own.desk.admission.requests == 1)
        assert own.desk.admission.pixels == 4800
        assert model.shapes == [(1, 48, 64)]
        model.gate.set()
        until(lambda: own.desk.admission.requests == 0)
        assert own.desk.admission.pixels == 0
        assert model.shapes == [(1, 48, 64)]
        assert told(caplog, "late-error") == []  # it ended well, too late
        assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200


class Failing(Held):
    def run(self, images_NHWC):  # type: ignore[no-untyped-def]
        super().run(images_NHWC)
        raise RuntimeError("the card fell off the bus")


def test_a_late_error_is_logged_and_an_early_one_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "marginalia")
    model = Failing(tmp_path / "bundle")
    model.gate.clear()
    with serving(model, timeout_s=0.2) as own, own.client() as http:
        late = http.post("/v1/segment", content=PICTURE, headers=RAW)
        assert (late.status_code, error(late)) == (504, "deadline")
        assert told(caplog, "late-error") == []
        model.gate.set()
        until(lambda: told(caplog, "late-error"))
        assert told(caplog, "late-error")[0]["error"] == "the card fell off the bus"
        assert own.desk.admission.requests == 0
        failed = http.post("/v1/segment", content=PICTURE, headers=RAW)
        assert (failed.status_code, error(failed)) == (500, "internal")


def test_a_client_that_has_gone_is_dropped_from_the_line(model: Held, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "marginalia")
    model.gate.clear()
    head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    with serving(model, concurrency=1, queue=2) as own, crowd(own, [PICTURE]) as first:
        until(lambda: model.shapes)
        with socket.create_connection(("127.0.0.1", own.port), LONGEST) as link:
            link.sendall(head % len(PICTURE) + PICTURE)
            until(lambda: own.desk.admission.requests == 2)
        until(lambda: own.desk.admission.requests == 1)  # the first still runs
        until(lambda: [line for line in told(caplog, "request") if line["code"] == "disconnected"])
        model.gate.set()
        assert first[0].result(LONGEST).status_code == 200
        assert model.shapes == [(1, 48, 64)]


def test_a_dropped_request_skips_the_phases_that_have_not_begun(model: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone while in the model: it is not rendered. `process` is what other routes call for each of their images."""
    rendered = []
    monkeypatch.setattr(answers, "render", lambda *arguments: rendered.append(arguments) or b"")
    desk = Desk(settings.Settings(concurrency=1), slot_of(model))

    async def story() -> None:
        gone = asyncio.Event()

        async def leave() -> None:
            await gone.wait()

        model.gate.clear()
        work = asyncio.create_task(desk.process(PICTURE, MASK, {}, leave))
        await asyncio.to_thread(until, lambda: model.shapes)
        gone.set()
        with pytest.raises(Problem, match="closed") as caught:
            await work
        assert caught.value.code == "disconnected"
        assert desk.admission.requests == 1
        model.gate.set()
        await asyncio.to_thread(until, lambda: desk.admission.requests == 0)
        assert rendered == []
        assert (await desk.process(PICTURE, MASK, {}, leave_never)).body == b""
        assert len(rendered) == 1

    async def leave_never() -> None:
        await asyncio.Event().wait()

    asyncio.run(story())
    desk.close()


def test_decode_and_encode_go_on_while_the_model_runs(model: Held) -> None:
    """With the model held by one image, the next is decoded already and waits before it."""
    decoded: list[int] = []
    original = images.decode

    def decode(data: bytes, **limits: float) -> np.ndarray:
        decoded.append(len(data))
        return original(data, **limits)  # type: ignore[arg-type]

    model.gate.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "decode", decode)
        with serving(model, concurrency=3) as own, crowd(own, [PICTURE] * 5):
            until(lambda: own.desk.admission.requests == 5)
            until(lambda: len(decoded) == 3)  # no more than are at work
            assert model.shapes == [(1, 48, 64)]
            model.gate.set()


def test_bad_images_are_refused_before_they_take_a_place(model: Held) -> None:
    """With no place to be had, a bomb still hears that it is one."""
    desk = Desk(settings.Settings(concurrency=1, queue=0, max_pixels=4000), slot_of(model))
    desk.admission.enter(1)
    for body, code in ((b"nothing", "not-an-image"), (PICTURE, "too-many-pixels"), (picture(20, 20), "overloaded")):
        with pytest.raises(Problem) as caught:
            asyncio.run(desk.process(body, MASK, {}))
        assert caught.value.code == code
    assert desk.admission.requests == 1
    desk.close()


def test_batches_are_for_cards_unless_a_size_is_set(model: Held) -> None:
    assert largest_batch(model, settings.Settings()) == 1
    assert largest_batch(model, settings.Settings(max_batch=4)) == 4


def test_patience_grows_with_what_has_come() -> None:
    chosen = settings.Settings(min_rate_kb=2)
    assert limits.patience(0, chosen) == limits.GRACE_S
    assert limits.patience(20480, chosen) == limits.GRACE_S + 10
