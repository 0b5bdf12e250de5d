"""The application under uvicorn in a thread of this process: a real socket, and a model that a test can hold."""

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray

from export.runtime.runtime import Runtime
from serving import settings
from serving.bento import uvicorn_protocol
from serving.http import app
from serving.http.segment import SegmentHandler
from serving.model.manager import ModelManager
from tests.support import tiny_onnx
from tests.support.live_server import free_port, until

LONGEST = 60.0  # a limit, not a measurement
RAW = {"Content-Type": "application/octet-stream"}


class Held(Runtime):
    """The tiny model, which runs a batch only while its gate is open and writes down what shapes it was given."""

    def __init__(self, folder: Path, threshold: float = 100.0) -> None:
        made = tiny_onnx.write(folder, model_bytes=tiny_onnx.model(threshold))
        super().__init__(made, provider="cpu", threads=1)
        self.gate, self.shapes = threading.Event(), list[tuple[int, ...]]()
        self.gate.set()

    def run(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        self.shapes.append(images_NHWC.shape[:3])
        assert self.gate.wait(LONGEST)
        return super().run(images_NHWC)


def manager_of(runtime: Runtime) -> ModelManager:
    """Serves `runtime` and watches nothing."""
    manager = ModelManager(settings.Settings())
    manager.current = runtime
    return manager


@dataclass
class Own:
    port: int
    handler: SegmentHandler
    protocol: type[uvicorn_protocol.Connection]

    def limit(self, **chosen: Any) -> None:
        """Other limits for the connections and the work that begin after this: a short one only where it must fire."""
        self.handler.settings = self.protocol.settings = self.handler.settings.model_copy(update=chosen)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=LONGEST, trust_env=False)

    @contextlib.contextmanager
    def crowd(self, bodies: list[bytes]) -> Iterator[list[Future[httpx.Response]]]:
        """Send all images at once, each on a connection of its own."""
        with ThreadPoolExecutor(len(bodies)) as pool, self.client() as http:
            yield [pool.submit(http.post, "/v1/segment", content=body, headers=RAW) for body in bodies]


def told(caplog: pytest.LogCaptureFixture, kind: str) -> list[dict[str, Any]]:
    """Events of one kind that the service has logged."""
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "marginalia"]
    return [line for line in lines if line["event"] == kind]


@contextlib.contextmanager
def serving(runtime: Runtime, **chosen: Any) -> Iterator[Own]:
    """A server with these settings (and patient ones) over `runtime`, ended at the end."""
    these = settings.Settings(**{"timeout_s": LONGEST, "head_timeout_s": LONGEST} | chosen)
    web, handler, _ = app.build(these, manager_of(runtime))
    protocol = type(
        "Limited", (uvicorn_protocol.Connection,), {"settings": these, "front": staticmethod(lambda app: app)}
    )
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(
            web,
            port=port,
            http=protocol,
            log_config=None,
            lifespan="off",
            timeout_graceful_shutdown=5,
            proxy_headers=False,  # as in the worker, where our application stands before uvicorn's
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Own(port, handler, protocol)
    finally:
        if isinstance(runtime, Held):
            runtime.gate.set()
        server.should_exit = True
        thread.join(LONGEST)
        handler.close()
