"""The process that holds the model is killed. Nobody says ready meanwhile, and another takes its place."""

import os
import signal
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.image_files import save
from tests.support.live_server import Server, start, until

PICTURE = save(Image.fromarray(np.random.default_rng(50).integers(0, 256, (24, 32, 3), dtype=np.uint8)))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One that nobody else speaks to while it is without a worker."""
    own = start({})
    yield own
    own.stop()


@pytest.mark.slow
def test_a_killed_worker_is_replaced(server: Server) -> None:
    with server.client() as http:
        want = http.post("/v1/segment", content=PICTURE, headers={"Content-Type": "image/png"}).content
        assert http.get("/readyz").status_code == http.get("/livez").status_code == 200
    workers = server.workers()
    os.kill(workers[-1], signal.SIGKILL)
    answered: list[int] = []

    def probe(patience_s: float = 5.0) -> bool:
        """As an orchestrator asks: on a connection of its own, and not for long."""
        for path in ("/readyz", "/livez"):
            try:
                answered.append(httpx.get(server.url + path, timeout=patience_s, trust_env=False).status_code)
            except httpx.TransportError:
                return False
        return answered[-2:] == [200, 200]

    assert not probe(0.5)
    assert answered == []  # nobody lives there, and nobody says so
    until(probe, 240)
    assert server.workers()[-1] not in workers
    with server.client() as http:
        again = http.post("/v1/segment", content=PICTURE, headers={"Content-Type": "image/png"})
        assert (again.status_code, again.content) == (200, want)
