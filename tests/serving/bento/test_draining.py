"""serving.bento.uvicorn_server and parent: how a real server ends while callers ask, and with whom."""

import contextlib
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support import live_server
from tests.support.image_files import save
from tests.support.live_server import Server, until

PICTURE = save(Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8)))
HEAD = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(PICTURE)


@pytest.fixture
def own() -> Iterator[Server]:
    """A server that nobody else speaks to."""
    started = live_server.start({})
    yield started
    started.stop()


def link(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 60)


def answer(made: socket.socket) -> bytes:
    """All that comes until the server ends the connection, which must not be by a reset."""
    got = b""
    while piece := made.recv(65536):
        got += piece
    return got


def refused(server: Server) -> bool:
    try:
        link(server).close()
    except ConnectionRefusedError:
        return True
    return False


def gone(pid: int) -> bool:
    return (
        not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    )


@contextlib.contextmanager
def asking(server: Server, callers: int) -> Iterator[Counter[str]]:
    """Callers that ask again and again until they are refused, each time over a new connection; and what they heard."""
    heard: Counter[str] = Counter()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                with server.client() as http:
                    answered = http.post("/v1/segment", content=PICTURE, headers={"Content-Type": "image/png"})
                heard[str(answered.status_code)] += 1
            except httpx.ConnectError:
                heard["refused"] += 1
                return
            except httpx.TransportError as error:
                heard[repr(error)] += 1

    threads = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield heard
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_what_was_accepted_is_answered_and_nobody_else_is_let_in(own: Server) -> None:
    with asking(own, 12) as heard, link(own) as uploading, link(own) as silent:
        uploading.sendall(HEAD + PICTURE[:100])
        until(lambda: heard["200"] > 20)  # so both connections were accepted long ago
        own.process.send_signal(signal.SIGTERM)
        silent.sendall(HEAD + PICTURE)  # its first request is on its way while the server begins to end
        until(lambda: heard["refused"] == 12)
        assert own.process.poll() is None
        uploading.sendall(PICTURE[100:])
        for made in (uploading, silent):
            head, _, body = answer(made).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert made is silent or b"\r\nconnection: close" in head.lower()  # it may have come before the end began
            assert body.startswith(b"\x89PNG")
        own.process.wait(60)
    assert heard.keys() == {"200", "refused"}  # nobody was reset
    (began,) = own.events("draining")
    assert began["requests"] >= 1
    assert own.events("drained")
    assert own.events("drain-cut") == []


@pytest.mark.slow
def test_the_end_waits_no_longer_than_set() -> None:
    own = live_server.start({"MARGINALIA_DRAIN_S": "0.5"})
    with link(own) as stuck:
        stuck.sendall(HEAD + PICTURE[:100])
        with own.client() as http:
            assert http.get("/v1/model").status_code == 200
        own.stop()
    assert own.events("drain-cut")[0]["requests"] == 1


def test_a_worker_ends_with_its_killed_parent(own: Server) -> None:
    workers = own.workers()
    with link(own) as uploading:
        uploading.sendall(HEAD + PICTURE[:100])
        with own.client() as http:
            assert http.get("/v1/model").status_code == 200
        own.process.kill()
        until(lambda: refused(own))
        uploading.sendall(PICTURE[100:])
        assert answer(uploading).startswith(b"HTTP/1.1 200")
    for pid in workers:
        until(lambda pid=pid: gone(pid))


@pytest.mark.slow
def test_the_next_worker_listens_where_one_was_ended(own: Server) -> None:
    """Not the whole service ends: callers wait for the next worker, and none is refused."""
    first = own.workers()[-1]
    os.kill(first, signal.SIGTERM)
    until(lambda: gone(first))
    with link(own) as waiting:
        waiting.settimeout(240)
        waiting.sendall(HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + PICTURE)
        assert answer(waiting).startswith(b"HTTP/1.1 200")
    assert own.workers()[-1] != first
