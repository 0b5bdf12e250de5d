"""Limits of each client, over real HTTP: whose requests count together, who is let in, and whom proxies can speak for."""

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request

from serving.admission.clients import Clients
from serving.http.requests import Problem
from serving.settings import Settings
from tests.support.image_files import save
from tests.support.live_server import error, until
from tests.support.threaded_server import LONGEST, RAW, Held, serving

PICTURE = save(Image.fromarray(np.random.default_rng(8).integers(0, 256, (60, 80, 3), dtype=np.uint8)))
SLOW = 1e-6  # images a second: what is used up in a test stays used up


@pytest.fixture
def model(tmp_path: Path) -> Held:
    return Held(tmp_path / "bundle")


def ask(http: httpx.Client, **headers: str) -> httpx.Response:
    return http.post("/v1/segment", content=PICTURE, headers=RAW | headers)


def request(host: str, authorization: str = "") -> Request:
    headers = [(b"authorization", authorization.encode())]
    return Request({"type": "http", "client": (host, 1), "headers": headers})


def test_nobody_is_limited_by_default(model: Held) -> None:
    with serving(model) as own, own.client() as http:
        assert [ask(http).status_code for _ in range(30)] == [200] * 30


def test_beyond_its_rate_a_client_gets_429_with_when_to_come_again(model: Held) -> None:
    with serving(model, client_rate=SLOW, client_burst=3) as own, own.client() as http:
        assert [ask(http).status_code for _ in range(3)] == [200] * 3
        refused = ask(http)
        assert (refused.status_code, error(refused)) == (429, "too-many-requests")
        assert int(refused.headers["retry-after"]) > 1000


def test_a_call_of_many_counts_each_image(model: Held) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(5):
            archive.writestr(f"{number}.png", PICTURE)
    with serving(model, client_rate=SLOW, client_burst=5) as own, own.client() as http:
        many = http.post("/v1/segment/batch", content=buffer.getvalue(), headers={"Content-Type": "application/zip"})
        assert many.status_code == 200
        assert error(ask(http)) == "too-many-requests"


def test_a_client_has_only_so_many_requests_under_way_and_another_is_let_in(model: Held) -> None:
    model.gate.clear()
    with (
        serving(model, client_at_once=1, trusted_proxies="127.0.0.0/8") as own,
        own.client() as http,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(ask, http, **{"X-Forwarded-For": "192.0.2.1"})
        until(lambda: own.handler.admission.requests == 1)
        refused = ask(http, **{"X-Forwarded-For": "192.0.2.1"})
        assert (refused.status_code, error(refused)) == (429, "too-many-requests")
        other = pool.submit(ask, http, **{"X-Forwarded-For": "192.0.2.2"})
        until(lambda: own.handler.admission.requests == 2)
        model.gate.set()
        assert [answer.result(LONGEST).status_code for answer in (first, other)] == [200, 200]
        assert ask(http, **{"X-Forwarded-For": "192.0.2.1"}).status_code == 200


def test_an_address_is_believed_of_trusted_proxies_only(model: Held) -> None:
    """Callers who say that they forward for others stay one client; so does what stands before a proxy's own word."""
    with serving(model, client_rate=SLOW, client_burst=1) as own, own.client() as http:
        assert ask(http, **{"X-Forwarded-For": "192.0.2.1"}).status_code == 200
        assert ask(http, **{"X-Forwarded-For": "192.0.2.2"}).status_code == 429
    with serving(model, client_rate=SLOW, client_burst=1, trusted_proxies="127.0.0.1") as own, own.client() as http:
        assert ask(http, **{"X-Forwarded-For": "198.51.100.1, 192.0.2.1"}).status_code == 200
        assert ask(http, **{"X-Forwarded-For": "198.51.100.2, 192.0.2.1"}).status_code == 429
        assert ask(http, **{"X-Forwarded-For": "192.0.2.2"}).status_code == 200


def admitted(clients: Clients, *requests: Request) -> list[bool]:
    def is_in(one: Request) -> bool:
        try:
            with clients.admit(one):
                return True
        except Problem:
            return False

    return [is_in(one) for one in requests]


def test_a_bucket_fills_with_time_up_to_the_burst() -> None:
    now = [0.0]
    clients = Clients(Settings(client_rate=0.5, client_burst=2), lambda: now[0])
    one = request("192.0.2.1")
    assert admitted(clients, one, one, one) == [True, True, False]
    now[0] = 2.0
    assert admitted(clients, one, one) == [True, False]
    now[0] = 1000.0
    assert admitted(clients, one, one, one) == [True, True, False]


def test_what_tells_clients_apart() -> None:
    """IPv6 by the network of one subscriber, an IPv4 address in either spelling, tokens only where they are checked."""
    limits = {"client_rate": SLOW, "client_burst": 1}
    by_address = Clients(Settings(**limits))
    assert admitted(by_address, request("2001:db8::1"), request("2001:db8::2"), request("2001:db8:0:1::1")) == [
        True,
        False,
        True,
    ]
    assert admitted(by_address, request("192.0.2.1"), request("::ffff:192.0.2.1")) == [True, False]

    two = request("192.0.2.9", "Bearer one"), request("192.0.2.9", "Bearer two")
    assert admitted(Clients(Settings(**limits, client_by="token", token="one\ntwo")), *two, *two) == [
        True,
        True,
        False,
        False,
    ]
    assert admitted(Clients(Settings(**limits, client_by="token")), *two) == [True, False]


def test_a_wrong_proxy_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="no address and no network"):
        Settings(trusted_proxies="10.0.0.0/8 proxy.example.org")
