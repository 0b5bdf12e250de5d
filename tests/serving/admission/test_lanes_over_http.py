"""No class of requests starves another: a server over a real socket, with a model that runs one window at a time."""

import io
import threading
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.image_files import save
from tests.support.live_server import error, until
from tests.support.threaded_server import LONGEST, RAW, Held, Own, serving

RNG = np.random.default_rng(8)
ZIP = {"Content-Type": "application/zip"}
FULL = "/v1/segment?resolution=full"


def picture(height: int, width: int) -> bytes:
    return save(Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)))


ORDINARY, LARGE = picture(30, 40), picture(400, 400)


class Metered(Held):
    """Runs of windows as large as the model takes wait for a token each; an ordinary image's do not."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.windows = threading.Semaphore(0)

    def run(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if images_NHWC.shape[1:3] == (64, 64):
            assert self.windows.acquire(timeout=LONGEST)
        return super().run(images_NHWC)


def packed(images: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, image in enumerate(images):
            archive.writestr(f"{number}.png", image)
    return buffer.getvalue()


def ask(http: httpx.Client, path: str, body: bytes, headers: dict[str, str] = RAW) -> httpx.Response:
    return http.post(path, content=body, headers=headers)


def start(pool: ThreadPoolExecutor, own: Own, count: int, path: str, body: bytes) -> list[Future[httpx.Response]]:
    http = own.client()
    headers = ZIP if path.endswith("batch") else RAW
    return [pool.submit(ask, http, path, body, headers) for _ in range(count)]


def test_ordinary_callers_are_answered_while_native_resolution_waits_in_a_line_of_its_own(tmp_path: Path) -> None:
    """Six at native resolution, of 49 windows each, and one place at the model between them all the time."""
    model = Metered(tmp_path / "bundle")
    with (
        serving(model, concurrency=2, long_at_once=1, long_queue=8, max_batch=1) as own,
        own.client() as http,
        ThreadPoolExecutor(6) as pool,
    ):
        slow = start(pool, own, 6, FULL, LARGE)
        until(lambda: own.handler.admission.long.running == 1)
        until(lambda: own.handler.admission.long.waiting == 5)

        for _ in range(8):
            answer = ask(http, "/v1/segment", ORDINARY)
            assert answer.status_code == 200
            model.windows.release()  # and one more window is done
        assert not any(response.done() for response in slow)

        model.windows.release(100_000)
        assert [response.result(LONGEST).status_code for response in slow] == [200] * 6


def test_a_full_line_of_long_work_refuses_long_work_only_and_before_its_body(tmp_path: Path) -> None:
    model = Metered(tmp_path / "bundle")
    with (
        serving(model, long_at_once=1, long_queue=1) as own,
        own.client() as http,
        ThreadPoolExecutor(2) as pool,
    ):
        slow = start(pool, own, 2, FULL, LARGE)
        until(lambda: own.handler.admission.requests == 2)
        refused = ask(http, FULL, b"the body is not looked at")
        assert (refused.status_code, error(refused)) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert ask(http, "/v1/segment", ORDINARY).status_code == 200
        model.windows.release(100_000)
        assert [response.result(LONGEST).status_code for response in slow] == [200] * 2


def test_a_line_longer_than_the_deadline_is_said_at_once(tmp_path: Path) -> None:
    """While its first work has run for longer than a request may take, another is refused and not kept until then."""
    model = Metered(tmp_path / "bundle")
    with serving(model, long_at_once=1) as own, own.client() as http, ThreadPoolExecutor(1) as pool:
        slow = start(pool, own, 1, FULL, LARGE)
        until(lambda: own.handler.admission.long.running == 1)
        own.limit(large_timeout_s=0.05)
        until(lambda: own.handler.admission.long.expected_wait_s() > 0.05)
        refused = ask(http, FULL, LARGE)
        assert (refused.status_code, error(refused)) == (503, "overloaded")
        assert "the line for long work" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert ask(http, "/v1/segment", ORDINARY).status_code == 200
        model.windows.release(100_000)
        assert slow[0].result(LONGEST).status_code == 200


def test_ordinary_callers_are_answered_while_calls_of_many_wait(tmp_path: Path) -> None:
    """Two calls of 40 images that all take a window's time; an ordinary caller waits for none of them to end."""
    model = Metered(tmp_path / "bundle")
    body = packed([picture(64, 64)] * 40)
    with (
        serving(model, concurrency=1, many_calls=2, max_batch=1) as own,
        own.client() as http,
        ThreadPoolExecutor(2) as pool,
    ):
        calls = start(pool, own, 2, "/v1/segment/batch", body)
        until(lambda: own.handler.admission.many.running == 1)
        for _ in range(4):
            assert ask(http, "/v1/segment", ORDINARY).status_code == 200
            model.windows.release()
        assert not any(call.done() for call in calls)
        model.windows.release(100_000)
        for call in calls:
            lines = call.result(LONGEST).text.splitlines()
            assert len(lines) == 40
            assert not any('"error"' in line for line in lines)


def test_bodies_of_calls_of_many_leave_room_for_ordinary_ones(tmp_path: Path) -> None:
    """4 MiB for bodies: two calls of which 1.5 MiB came are one too many, an ordinary image of 1.5 MiB is not."""
    model = Metered(tmp_path / "bundle")
    large = ORDINARY + bytes(1_500_000)
    with (
        serving(model, max_body_mb=2, max_bodies_mb=4, many_mb=2, many_calls=9) as own,
        own.client() as http,
        ThreadPoolExecutor(1) as pool,
    ):
        gate = threading.Event()

        def slowly() -> httpx.Response:
            def pieces():  # type: ignore[no-untyped-def]
                yield bytes(1_500_000)
                gate.wait(LONGEST)
                yield bytes(1)

            headers = ZIP | {"Content-Length": "1500001"}
            return http.post("/v1/segment/batch", content=pieces(), headers=headers)

        first = pool.submit(slowly)
        until(lambda: own.handler.admission.large_bytes == 1_500_000)
        refused = ask(http, "/v1/segment/batch", bytes(1_500_000), ZIP)
        assert (refused.status_code, error(refused)) == (503, "overloaded")
        assert ask(http, "/v1/segment", large).status_code == 200
        gate.set()
        assert first.result(LONGEST).status_code == 400
        until(lambda: own.handler.admission.large_bytes == own.handler.admission.bytes == 0)
