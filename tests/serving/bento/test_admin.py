"""serving.bento.admin: operators reach a real server at a port of their own, whatever happens at the callers'."""

import contextlib
import signal
import socket
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.bento.run import StartError, main
from tests.support import admin_client, live_server
from tests.support.image_files import save
from tests.support.live_server import TOKEN, Server, error, free_port, until

PICTURE = save(Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8)))
HEAD = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(PICTURE)
ROOM = 8


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(port: int) -> Iterator[Server]:
    settings = {
        "MARGINALIA_ADMIN_ADDRESS": f"127.0.0.1:{port}",
        "MARGINALIA_MAX_CONNECTIONS": str(ROOM),
        "MARGINALIA_CHANGE_TOKEN": TOKEN,
    }
    own = live_server.start(settings)
    yield own
    own.stop()


@pytest.fixture
def admin(server: Server, port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
        yield client


def test_each_port_answers_its_own(http: httpx.Client, admin: httpx.Client) -> None:
    answers = set(http.get("/v1/openapi.json").json()["paths"])
    operations = set(admin.get("/v1/openapi.json").json()["paths"])
    jobs = {"/v1/jobs", "/v1/jobs/{id}", "/v1/jobs/{id}/result"}
    assert answers == {"/v1/segment", "/v1/segment/batch", "/v1/model", "/v1/openapi.json"} | jobs
    assert {"/v1/models", "/v1/models/load", "/v1/statistics"} < operations
    assert answers & operations == {"/v1/openapi.json"}
    for path in ("/metrics", "/v1/models", "/v1/statistics", "/v1/models/load"):
        assert error(http.get(path)) == "not-found"
    assert error(admin.post("/v1/segment", content=PICTURE)) == "not-found"
    for client in (http, admin):
        assert [client.get(path).status_code for path in ("/livez", "/readyz", "/healthz")] == [200, 200, 200]
    assert "marginalia_ready 1.0" in admin.get("/metrics").text


def test_changes_need_their_token_there_too(admin: httpx.Client) -> None:
    change = {"json": {"bundle": None}}
    assert error(admin.post("/v1/models/shadow", **change)) == "unauthorized"
    assert admin.post("/v1/models/shadow", **change, headers=admin_client.AUTH).status_code == 200


def turned_away(admin: httpx.Client) -> float:
    """Connections that were refused, or pushed out before their request came."""
    return sum(
        admin_client.metric(admin, "marginalia_rejected_total", reason=why) for why in ("overloaded", "connections")
    )


def test_a_crowd_at_the_callers_port_keeps_no_operator_out(server: Server, admin: httpx.Client) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3 * ROOM):
            made = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60))
            with contextlib.suppress(OSError):  # pushed out already
                made.sendall(HEAD + PICTURE[:100])
        until(lambda: turned_away(admin) >= 2 * ROOM)  # so there was no room at the callers' port
        for path in ("/livez", "/readyz", "/metrics", "/v1/models"):  # each over a new connection
            assert httpx.get(f"{admin.base_url}{path}", trust_env=False, timeout=30).status_code == 200


def test_it_says_not_ready_while_the_service_ends(server: Server, admin: httpx.Client) -> None:
    """The last test of this server. What is under way holds the end; meanwhile probes are answered."""
    with socket.create_connection(("127.0.0.1", server.port), 60) as uploading:
        uploading.sendall(HEAD + PICTURE[:100])
        until(lambda: httpx.get(server.url + "/readyz", trust_env=False).status_code == 200)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: admin.get("/readyz").status_code == 503)
        assert admin.get("/livez").status_code == 200
        assert "marginalia_ready 0.0" in admin.get("/metrics").text
        uploading.sendall(PICTURE[100:])
        assert uploading.recv(100).startswith(b"HTTP/1.1 200")
    server.process.wait(60)
    with pytest.raises(httpx.TransportError):
        admin.get("/livez")


def test_a_port_that_is_taken_or_the_callers_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = live_server.shared()
    monkeypatch.setenv("MARGINALIA_CHAMPIONS", str(own.folder / "champions" / "champion.json"))
    port = free_port()
    for wrong, said in (
        (port, f"port {port} is the one for callers"),
        (own.port, f"port {own.port} .Address already in use"),
    ):
        monkeypatch.setenv("MARGINALIA_ADMIN_ADDRESS", f"127.0.0.1:{wrong}")
        with pytest.raises(StartError, match=f"{said}.*; set MARGINALIA_ADMIN_ADDRESS"):
            main("127.0.0.1", port)
