"""segment: who is let in, who waits, who is dropped, and when a place is free again. The model is held by a gate."""

import asyncio
import contextlib
import gc
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.imaging import decode as images
from serving import settings
from serving.admission import cost
from serving.bento import worker
from serving.http import requests, responses
from serving.http.negotiate import KINDS, Kind
from serving.http.query import Query
from serving.http.requests import Problem
from serving.http.segment import SegmentHandler, largest_batch, segment
from serving.model.batcher import ImageJob
from tests.support.image_files import save
from tests.support.live_server import error, until
from tests.support.threaded_server import LONGEST, RAW, Held, manager_of, serving, told

RNG = np.random.default_rng(8)
MASK = KINDS[0]


def picture(height: int, width: int) -> bytes:
    return save(Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)))


PICTURE = picture(60, 80)


@pytest.fixture
def model(tmp_path: Path) -> Held:
    return Held(tmp_path / "bundle")


def test_every_answer_is_its_own_whatever_runs_together(model: Held) -> None:
    """Mixed sizes and views under concurrency, batches allowed: byte for byte what this process answers."""
    here = settings.Settings(concurrency=8, max_batch=8)
    bodies = [picture(*[(40, 64), (64, 40), (64, 64), (200, 100), (17, 5)][i % 5]) for i in range(60)]
    kinds = [KINDS[i % 2] for i in range(60)]
    with (
        serving(model, concurrency=8, max_batch=8, queue=60) as own,
        own.client() as http,
        ThreadPoolExecutor(16) as pool,
    ):

        def ask(body: bytes, kind: Kind) -> httpx.Response:
            return http.post("/v1/segment", content=body, headers=RAW | {"Accept": kind.media_type})

        model.gate.clear()
        asked = [pool.submit(ask, body, kind) for body, kind in zip(bodies, kinds, strict=True)]
        until(lambda: own.handler.waiting == 6)  # of 8 at work; two are at the model
        model.gate.set()
        found = [response.result(LONGEST) for response in asked]
    for body, kind, response in zip(bodies, kinds, found, strict=True):
        assert response.content == segment(body, kind, model, here, 0.0).body
    assert max(shape[0] for shape in model.shapes) > 1


def test_memory_is_counted_and_what_finds_none_waits(model: Held) -> None:
    """Room for two images: of three one waits in line though places are free; what needs more than there is, is refused."""
    one = cost.of(PICTURE, MASK, Query(), model.bundle, settings.Settings()).size
    model.gate.clear()
    with serving(model, concurrency=3, memory_mb=8.8 * one / (1 << 20)) as own, own.client() as http:
        with own.crowd([PICTURE] * 3) as asked:
            until(lambda: own.handler.admission.requests == 3)
            until(lambda: len(model.shapes) == 2)
            assert (own.handler.admission.ordinary.running, own.handler.admission.ordinary.waiting) == (2, 1)
            assert own.handler.admission.memory == 2 * one
            model.gate.set()
            assert [response.result(LONGEST).status_code for response in asked] == [200] * 3
        until(lambda: own.handler.admission.memory == 0)
        large = http.post("/v1/segment", content=picture(3000, 3000), headers=RAW)
        assert (large.status_code, error(large)) == (413, "too-much-memory")
        assert f"is {int(4.4 * one) >> 20} MiB" in large.json()["error"]["message"]


def test_an_answer_that_is_larger_than_its_image_takes_the_room_of_the_answer(model: Held) -> None:
    chosen = settings.Settings()
    small, large = (
        cost.of(PICTURE, MASK, query, model.bundle, chosen).size for query in (Query(), Query(size="4000x4000"))
    )
    assert large - small > 3 * 4000 * 4000


def test_bodies_are_counted_as_they_come(model: Held) -> None:
    """2 MiB of room: a body of which 1.5 MiB came leaves room for a small one only, and gives it back when it goes."""
    head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    large = PICTURE + bytes(900_000)
    with serving(model, max_body_mb=1, max_bodies_mb=2, many_mb=1) as own, own.client() as http:
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                slow = stack.enter_context(socket.create_connection(("127.0.0.1", own.port), LONGEST))
                slow.sendall(head % 800_000 + bytes(700_000))
            until(lambda: own.handler.admission.bytes == 1_400_000)
            assert own.handler.admission.requests == 0
            full = http.post("/v1/segment", content=large, headers=RAW)
            assert (full.status_code, error(full)) == (503, "overloaded")
            assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200
        until(lambda: own.handler.admission.bytes == 0)
        assert http.post("/v1/segment", content=large, headers=RAW).status_code == 200


def test_a_client_that_has_gone_is_dropped_from_the_line(
    model: Held, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are its bytes; no work was ever made of it."""
    caplog.set_level(logging.INFO, "marginalia")
    jobs: list[ImageJob] = []
    monkeypatch.setattr("serving.http.segment.ImageJob", lambda *of: jobs.append(ImageJob(*of)) or jobs[-1])
    model.gate.clear()
    head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    with serving(model, concurrency=1, queue=2) as own, own.crowd([PICTURE]) as first:
        until(lambda: model.shapes)
        with socket.create_connection(("127.0.0.1", own.port), LONGEST) as link:
            link.sendall(head % len(PICTURE) + PICTURE)
            until(lambda: own.handler.admission.requests == 2)
        until(lambda: own.handler.admission.requests == 1)  # the first still runs
        until(lambda: own.handler.admission.bytes == len(PICTURE))
        assert [job.data for job in jobs] == [PICTURE]
        until(lambda: [line for line in told(caplog, "request") if line["code"] == "disconnected"])
        model.gate.set()
        assert first[0].result(LONGEST).status_code == 200
        assert model.shapes == [(1, 48, 64)]


def test_a_dropped_request_skips_the_phases_that_have_not_begun(model: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone while in the model: it is not rendered. `process` is what other routes call for each of their images."""
    rendered = []
    original = responses.render

    def render(*arguments: Any) -> responses.Rendered:
        rendered.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(responses, "render", render)
    handler = SegmentHandler(settings.Settings(concurrency=1), manager_of(model))

    async def story() -> None:
        gone = asyncio.Event()

        async def leave() -> None:
            await gone.wait()

        model.gate.clear()
        work = asyncio.create_task(handler.process(PICTURE, MASK, Query(), leave))
        await asyncio.to_thread(until, lambda: model.shapes)
        gone.set()
        with pytest.raises(Problem, match="closed") as caught:
            await work
        assert caught.value.code == "disconnected"
        assert handler.admission.requests == 1
        model.gate.set()
        await asyncio.to_thread(until, lambda: handler.admission.requests == 0)
        assert rendered == []
        assert (await handler.process(PICTURE, MASK, Query(), leave_never)).body.startswith(b"\x89PNG")
        assert len(rendered) == 1

    async def leave_never() -> None:
        await asyncio.Event().wait()

    asyncio.run(story())
    handler.close()


def test_decode_and_encode_go_on_while_the_model_runs(model: Held) -> None:
    """With both runners held by an image each, the next is decoded already and waits before them."""
    decoded: list[int] = []
    original = images.decode

    def decode(data: bytes, **limits: float) -> np.ndarray:
        decoded.append(len(data))
        return original(data, **limits)  # type: ignore[arg-type]

    model.gate.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "decode", decode)
        with serving(model, concurrency=3) as own, own.crowd([PICTURE] * 5):
            until(lambda: own.handler.admission.requests == 5)
            until(lambda: len(decoded) == 3)  # no more than are at work
            assert model.shapes == [(1, 48, 64)] * 2
            model.gate.set()


def test_bad_images_are_refused_before_they_take_a_place(model: Held) -> None:
    """With no place to be had, a bomb still hears that it is one."""
    handler = SegmentHandler(settings.Settings(concurrency=1, queue=0, max_pixels=4000), manager_of(model))

    async def story() -> None:
        handler.admission.ordinary.enter(1, 60)
        for body, code in ((b"nothing", "not-an-image"), (PICTURE, "too-many-pixels"), (picture(20, 20), "overloaded")):
            with pytest.raises(Problem) as caught:
                await handler.process(body, MASK, Query())
            assert caught.value.code == code
        assert handler.admission.requests == 1

    asyncio.run(story())
    handler.close()


def test_batches_are_for_cards_unless_a_size_is_set(model: Held) -> None:
    assert largest_batch(model, settings.Settings()) == 1
    assert largest_batch(model, settings.Settings(max_batch=4)) == 4


def test_patience_grows_with_what_has_come() -> None:
    chosen = settings.Settings(min_rate_kb=2)
    assert requests.patience(0, chosen) == requests.GRACE_S
    assert requests.patience(20480, chosen) == requests.GRACE_S + 10


class Lost(Held):
    """Fails on everything once `lost`, and on images that begin with 13 always."""

    lost = False

    def run(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if self.lost or images_NHWC[0, 0, 0, 0] == 13:
            raise RuntimeError("device lost")
        return super().run(images_NHWC)


def test_a_failed_run_puts_the_model_to_the_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An image that the model cannot take is that image's trouble; a model that takes nothing is lost."""
    caplog.set_level(logging.INFO, "marginalia")
    model, lost = Lost(tmp_path / "bundle"), threading.Event()
    thirteen = save(Image.fromarray(np.full((20, 20, 3), 13, np.uint8)))
    with serving(model) as own, own.client() as http:
        own.handler.health.on_lost = lost.set
        assert http.post("/v1/segment", content=thirteen, headers=RAW).status_code == 500
        until(lambda: (64, 64) in {shape[1:] for shape in model.shapes})  # the self-test's larger size
        assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200
        assert own.handler.health.is_good
        assert not lost.is_set()
        model.lost = True
        assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 500
        assert lost.wait(LONGEST)
        assert not own.handler.health.is_good
        assert "device lost" in told(caplog, "model-lost")[0]["error"]
        own.handler.manager.current = Held(tmp_path / "next")  # another model in its place is another matter
        assert own.handler.health.is_good


@pytest.fixture
def held_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[worker.Worker]:
    monkeypatch.setattr(worker.uvicorn_protocol, "install", lambda *of_this_process: None)
    monkeypatch.setattr(worker.uvicorn_server, "install", lambda *of_this_process: None)
    try:
        made = worker.Worker(settings.Settings(champions=tmp_path / "champion.json"))
    finally:
        gc.enable()
    yield made
    made.stop()


def test_a_worker_tells_a_lost_model(held_worker: worker.Worker, model: Held) -> None:
    assert (held_worker.alive, held_worker.ready) == (True, False)
    held_worker.models.current = model
    assert (held_worker.alive, held_worker.ready) == (True, True)
    held_worker.handler.health.lost = model
    assert (held_worker.alive, held_worker.ready) == (False, False)


def test_another_server_than_the_workers_is_refused() -> None:
    from serving.bento import service

    with pytest.raises(RuntimeError, match="marginalia serve"):
        service.Marginalia.inner.start(None)
