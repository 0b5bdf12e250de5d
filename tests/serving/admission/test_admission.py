"""Deadlines that hold the place until the work ends, and more requests than there is room for."""

import logging
import socket
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.support.image_files import save
from tests.support.live_server import error, until
from tests.support.threaded_server import LONGEST, RAW, Held, serving, told

DEADLINE = 5.0  # within it the first request has to get into the model
PICTURE = save(Image.fromarray(np.random.default_rng(8).integers(0, 256, (60, 80, 3), dtype=np.uint8)))


@pytest.fixture
def model(tmp_path: Path) -> Held:
    return Held(tmp_path / "bundle")


def test_after_the_deadline_the_place_stays_taken_until_the_work_ends(
    model: Held, caplog: pytest.LogCaptureFixture
) -> None:
    """The one in the model and the one in line both get 504; only the second's place is free, and it never runs."""
    caplog.set_level(logging.INFO, "marginalia")
    model.gate.clear()
    with serving(model, concurrency=1, queue=1, timeout_s=DEADLINE) as own, own.client() as http:
        with own.crowd([PICTURE] * 2) as late:
            for response in late:
                assert (response.result(LONGEST).status_code, error(response.result())) == (504, "deadline")
        own.limit(timeout_s=LONGEST)
        until(lambda: own.handler.admission.requests == 1)
        assert (own.handler.admission.memory > 4800, own.handler.admission.bytes) == (True, len(PICTURE))
        assert model.shapes == [(1, 48, 64)]
        model.gate.set()
        until(lambda: own.handler.admission.requests == 0)
        assert (own.handler.admission.memory, own.handler.admission.bytes) == (0, 0)
        assert model.shapes == [(1, 48, 64)]
        assert told(caplog, "late-error") == []  # it ended well, too late
        assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200


class Failing(Held):
    def run(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        super().run(images_NHWC)
        raise RuntimeError("the card fell off the bus")


def test_a_late_error_is_logged_and_an_early_one_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "marginalia")
    model = Failing(tmp_path / "bundle")
    model.gate.clear()
    with serving(model, timeout_s=DEADLINE) as own, own.client() as http:
        late = http.post("/v1/segment", content=PICTURE, headers=RAW)
        assert (late.status_code, error(late)) == (504, "deadline")
        own.limit(timeout_s=LONGEST)
        assert told(caplog, "late-error") == []
        model.gate.set()
        until(lambda: told(caplog, "late-error"))
        assert told(caplog, "late-error")[0]["request_id"] == late.headers["x-request-id"]
        assert told(caplog, "late-error")[0]["error"] == "the card fell off the bus"
        assert own.handler.admission.requests == 0
        failed = http.post("/v1/segment", content=PICTURE, headers=RAW)
        assert (failed.status_code, error(failed)) == (500, "internal")


def test_a_full_house_refuses_before_the_body_and_recovers(model: Held) -> None:
    """503 with Retry-After for a head alone; everybody who was let in is answered."""
    model.gate.clear()
    with serving(model, concurrency=2, queue=3) as own, own.crowd([PICTURE] * 5) as admitted:
        until(lambda: own.handler.admission.requests == 5)
        with socket.create_connection(("127.0.0.1", own.port), LONGEST) as link:
            head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000000\r\n\r\n"
            link.sendall(head)
            answer = b""
            while b"}}" not in answer:
                piece = link.recv(4096)
                assert piece, answer
                answer += piece
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1\r\n" in answer.lower()
        assert b'"overloaded"' in answer
        model.gate.set()
        assert [response.result(LONGEST).status_code for response in admitted] == [200] * 5
        until(
            lambda: own.handler.admission.requests == own.handler.admission.memory == own.handler.admission.bytes == 0
        )
        with own.client() as http:
            assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200
