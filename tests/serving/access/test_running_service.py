"""Roles, exchanged tokens, other origins' pages and the address from the environment, of a service that runs."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from pipeline.storage import atomic
from tests.support import live_server
from tests.support.image_files import save
from tests.support.live_server import Server, error, until

PICTURE = save(Image.fromarray(np.random.default_rng(8).integers(0, 256, (30, 40, 3), dtype=np.uint8)))
PAGE = "https://maps.example.org"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokens")
    (made / "callers").write_text("caller-one\ncaller-two\n")
    (made / "operators").write_text("operator-one\n")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Started by its command without options: the platform says where to listen."""
    settings = {
        "MARGINALIA_TOKEN_FILE": str(folder / "callers"),
        "MARGINALIA_CHANGE_TOKEN_FILE": str(folder / "operators"),
        "MARGINALIA_CORS_ORIGINS": f"{PAGE}, http://localhost:8080",
        "HOST": "localhost",
        "PORT": "{port}",
    }
    own = live_server.start(settings, ["-m", "marginalia", "serve"])
    yield own
    own.stop()


def asked(http: httpx.Client, token: str) -> tuple[int, int]:
    """The statuses of a request for an answer and of one that changes the models (it ends a shadow that there is not)."""
    headers = {"Authorization": f"Bearer {token}"}
    answer = http.post("/v1/segment", content=PICTURE, headers=headers | {"Content-Type": "image/png"})
    change = http.post("/v1/models/shadow", json={"bundle": None}, headers=headers)
    return answer.status_code, change.status_code


def test_tokens_are_exchanged_while_it_runs(server: Server, http: httpx.Client, folder: Path) -> None:
    assert [asked(http, name) for name in ("caller-one", "caller-two", "operator-one", "x")] == [
        (200, 403), (200, 403), (200, 200), (401, 401),
    ]  # fmt: skip
    workers = server.workers()
    atomic.write_text(folder / "callers", "caller-two\ncaller-three\n")
    (folder / "operators").write_text("operator-two\n")
    until(lambda: asked(http, "caller-three") == (200, 403))
    until(lambda: asked(http, "operator-two") == (200, 200))
    assert [asked(http, name) for name in ("caller-one", "operator-one")] == [(401, 401), (401, 401)]
    assert asked(http, "caller-two") == (200, 403)

    (folder / "callers").write_text("")  # an accident opens nothing
    until(lambda: asked(http, "x") and server.events("tokens-refused"))  # the file is looked at for a request
    assert [asked(http, name) for name in ("caller-two", "x")] == [(200, 403), (401, 401)]
    assert server.workers() == workers
    assert not any(word in server.log() for word in ("caller-", "operator-"))


def test_pages_of_the_set_origins_may_ask(http: httpx.Client) -> None:
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in (
        (PAGE, PAGE),
        ("http://localhost:8080", "http://localhost:8080"),
        ("https://evil.example", None),
    ):
        before = http.options("/v1/segment", headers=asking | {"Origin": origin})
        assert before.headers.get("access-control-allow-origin") == allowed
        assert (before.status_code == 200) == (allowed is not None)
        answer = http.get("/v1/model", headers={"Origin": origin})
        assert error(answer) == "unauthorized"  # which the page may read:
        assert answer.headers.get("access-control-allow-origin") == allowed
        assert "access-control-allow-credentials" not in answer.headers
    assert (
        "POST" in http.options("/v1/segment", headers=asking | {"Origin": PAGE}).headers["access-control-allow-methods"]
    )
    exposed = http.get("/v1/model", headers={"Origin": PAGE}).headers["access-control-expose-headers"]
    assert {"X-Bundle-Id", "X-Request-Id"} <= set(exposed.split(", "))


def test_its_own_page_alone_may_ask_where_no_origin_is_set() -> None:
    with live_server.shared().client() as http:
        answer = http.get("/v1/model", headers={"Origin": PAGE})
        assert "access-control-allow-origin" not in answer.headers
        before = http.options("/v1/segment", headers={"Origin": PAGE, "Access-Control-Request-Method": "POST"})
        assert before.status_code == 405


def test_the_description_says_that_tokens_are_asked_for(http: httpx.Client) -> None:
    assert http.get("/v1/openapi.json").json()["security"] == [{"token": []}]
