"""The process that holds the model is killed, beside another service of the same user, whose disk is full.

Nobody says ready meanwhile, another worker takes its place, and all metrics are the truth.
"""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.image_files import save
from tests.support.live_server import Server, start, until

PICTURE = save(Image.fromarray(np.random.default_rng(50).integers(0, 256, (24, 32, 3), dtype=np.uint8)))


RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One that nobody else speaks to while it is without a worker."""
    own = start({})
    yield own
    own.stop()


@pytest.fixture(scope="module")
def neighbour(server: Server) -> Iterator[Server]:
    """Started later, with the same BENTOML_HOME."""
    other = start({"BENTOML_HOME": str(server.folder / "home")})
    yield other
    other.stop()


def answered(server: Server) -> float:
    return value(server, 'marginalia_requests_total{answer="mask",status="2xx"}')


def value(server: Server, series: str) -> float:
    """Of a series in /metrics; 0 without one."""
    with server.client() as http:
        lines = http.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(series + " ")), 0.0)


def send(server: Server, times: int) -> bytes:
    with server.client() as http:
        answers = [http.post("/v1/segment", content=PICTURE, headers=RAW) for _ in range(times)]
    assert {each.status_code for each in answers} == {200}
    return answers[-1].content


@pytest.mark.slow
def test_two_services_of_one_user_count_apart(server: Server, neighbour: Server) -> None:
    send(server, 3)
    send(neighbour, 2)
    assert (answered(server), answered(neighbour)) == (3, 2)
    for each in (server, neighbour):
        assert value(each, "marginalia_ready") == 1
        mapped = Path(f"/proc/{each.workers()[-1]}/maps").read_text()
        assert str(server.folder / "home") not in mapped  # a page of a mapped file is what a full disk takes away
    assert [path for path in (server.folder / "home").rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_full_disk_takes_no_worker(neighbour: Server) -> None:
    """From here on no file of the service may grow by a byte: neither a metric's nor its log."""
    workers = neighbour.workers()
    for pid in (neighbour.process.pid, *workers):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
    with neighbour.client() as http:
        for view in ("mask", "json", "geojson", "overlay", "confidence"):
            sent = http.post("/v1/segment", params={"view": view}, content=PICTURE, headers=RAW)
            assert sent.status_code == 200, view
    assert neighbour.workers() == workers

    os.kill(workers[-1], signal.SIGKILL)  # the next one begins on the full disk
    until(lambda: neighbour.workers() and neighbour.workers()[-1] not in workers, 60)
    until(lambda: value(neighbour, "marginalia_ready") == 1, 120)
    send(neighbour, 2)
    assert answered(neighbour) == 2
    assert value(neighbour, 'marginalia_worker_restarts_total{cause="killed"}') == 1


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_counted(server: Server) -> None:
    want = send(server, 1)
    with server.client() as http:
        assert http.get("/readyz").status_code == http.get("/livez").status_code == 200
    started_at = value(server, "process_start_time_seconds")
    workers = server.workers()
    os.kill(workers[-1], signal.SIGKILL)
    statuses: list[int] = []

    def probe(patience_s: float = 5.0) -> bool:
        """As an orchestrator asks: on a connection of its own, and not for long."""
        for path in ("/readyz", "/livez"):
            try:
                statuses.append(httpx.get(server.url + path, timeout=patience_s, trust_env=False).status_code)
            except httpx.TransportError:
                return False
        return statuses[-2:] == [200, 200]

    assert not probe(0.5)
    assert statuses == []  # nobody lives there, and nobody says so
    until(probe, 240)
    assert server.workers()[-1] not in workers

    # Its counters begin at zero with it, as its start time says; the restart is counted by its cause.
    assert answered(server) == 0
    assert value(server, "process_start_time_seconds") > started_at
    assert value(server, 'marginalia_worker_restarts_total{cause="killed"}') == 1
    assert value(server, 'marginalia_worker_restarts_total{cause="out-of-memory"}') == 0
    (died,) = server.events("worker-died")
    assert (died["pid"], died["signal"], died["cause"]) == (workers[-1], "SIGKILL", "killed")
    begun = server.events("worker-started")
    assert [line["pid"] for line in begun] == [workers[-1], server.workers()[-1]]
    assert [line["restarts"] for line in begun] == [0, 1]
    assert send(server, 1) == want
    assert answered(server) == 1


@pytest.mark.slow
def test_two_workers_are_refused(tmp_path: Path) -> None:
    """As an operator may configure BentoML: each would have metrics, a queue and a champion of its own."""
    (tmp_path / "bento.yaml").write_text("services: {marginalia: {workers: 2}}")
    with pytest.raises(AssertionError, match=r"2 workers are configured.*set workers to 1"):
        start({"BENTOML_CONFIG": str(tmp_path / "bento.yaml")})
