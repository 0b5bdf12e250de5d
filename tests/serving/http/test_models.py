"""http.models: load, swap and go back over HTTP; who may, what may be named, and what never fails meanwhile."""

import asyncio
import io
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.bundle.bundle import Bundle
from export.runtime.runtime import Runtime
from serving.http import app
from serving.model import loader
from serving.model.manager import ModelManager
from serving.model.watcher import ChampionWatcher
from serving.settings import Settings
from serving.telemetry import metrics
from tests.support import admin_client, live_server, tiny_onnx
from tests.support.image_files import save
from tests.support.live_server import TOKEN, Server, error, until
from tests.support.serving.champions_folder import current_name, last_event, watched, write_champions

RAW = {"Content-Type": "application/octet-stream"}
SIZES = ((60, 80), (33, 200), (64, 64))
IMAGES = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(SIZES)]
PICTURES = [save(Image.fromarray(image_HWC)) for image_HWC in IMAGES]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A champions folder. Events are not logged."""
    monkeypatch.setattr(metrics, "event", lambda kind, **facts: None)
    return write_champions(tmp_path)


@pytest.fixture(scope="module")
def server() -> Server:
    return live_server.kept()


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with admin_client.client(server) as client:
        yield client


@pytest.fixture(scope="module")
def two(server: Server) -> tuple[Bundle, Bundle]:
    """Two bundles that answer differently."""
    home = server.folder / "swaps"
    return tiny_onnx.write(home / "a"), tiny_onnx.write(home / "b", model_bytes=tiny_onnx.model(200.0))


def ids(response: httpx.Response) -> tuple[str | None, str | None]:
    """(current, previous) of a models answer."""
    assert response.status_code == 200, response.text
    body = response.json()
    return tuple(body[slot] and body[slot]["bundle"] for slot in ("current", "previous"))  # type: ignore[return-value]


def test_steady_requests_see_nothing_of_five_swaps(
    server: Server, http: httpx.Client, two: tuple[Bundle, Bundle]
) -> None:
    golden: dict[str, list[NDArray[np.uint8]]] = {
        bundle.manifest.id: [Runtime(bundle, provider="cpu", threads=1).segment(image).label_HW for image in IMAGES]
        for bundle in two
    }
    assert not np.array_equal(*(labels[0] for labels in golden.values()))
    assert admin_client.load(http, admin_client.below(server, two[0].folder)).status_code == 200
    seen: list[tuple[int, int, str, bytes]] = []
    stop = threading.Event()

    def hammer(seed: int) -> None:
        pick = random.Random(seed)
        with admin_client.client(server) as mine:
            while not stop.is_set():
                i = pick.randrange(len(PICTURES))
                response = mine.post("/v1/segment", content=PICTURES[i], headers=RAW)
                seen.append((i, response.status_code, response.headers.get("x-bundle-id", ""), response.content))

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(5):
            fresh, old = two[(round_ + 1) % 2], two[round_ % 2]
            count = len(seen)
            until(lambda count=count: len(seen) > count + 3)
            assert ids(admin_client.load(http, admin_client.below(server, fresh.folder))) == (
                fresh.manifest.id,
                old.manifest.id,
            )
            after = http.post("/v1/segment", content=PICTURES[0], headers=RAW)
            assert after.headers["x-bundle-id"] == fresh.manifest.id
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for _, status, _, _ in seen} == {200}
    assert {bundle for _, _, bundle, _ in seen} == set(golden)
    for i, _, bundle, body in seen:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), golden[bundle][i])


def test_rollback_is_one_call_and_a_second_one_goes_forward(
    server: Server, http: httpx.Client, two: tuple[Bundle, Bundle]
) -> None:
    a, b = (bundle.manifest.id for bundle in two)
    for bundle in two:
        assert admin_client.load(http, admin_client.below(server, bundle.folder)).status_code == 200
    back = admin_client.metric(http, "marginalia_swaps_total", result="rolled-back")
    for expected in ((a, b), (b, a)):
        answer = http.post("/v1/models/rollback")
        assert ids(answer) == expected
        assert http.post("/v1/segment", content=PICTURES[0], headers=RAW).headers["x-bundle-id"] == expected[0]
        event = answer.json()["events"][-1]
        assert (event["event"], event["bundle"], event["before"]) == ("rolled-back", *expected)
        for slot, bundle in zip(("current", "previous"), expected, strict=True):
            assert admin_client.metric(http, "marginalia_model_info", slot=slot, bundle=bundle) == 1
    assert admin_client.metric(http, "marginalia_swaps_total", result="rolled-back") == back + 2


def test_what_is_served_already_does_not_push_out_the_previous(
    server: Server, http: httpx.Client, two: tuple[Bundle, Bundle]
) -> None:
    a, b = two
    for bundle in (a, b, b):
        answer = admin_client.load(http, admin_client.below(server, bundle.folder))
    assert ids(answer) == (b.manifest.id, a.manifest.id)
    assert answer.json()["events"][-1]["event"] == "bundle-same"
    assert answer.json()["candidate"] is None
    assert answer.json()["current"]["path"] == "swaps/b"
    assert str(server.folder) not in answer.text


def test_only_a_token_changes_models(server: Server, two: tuple[Bundle, Bundle]) -> None:
    changes: list[tuple[str, dict[str, Any]]] = [
        ("/v1/models/load", {"bundle": admin_client.below(server, two[0].folder)}),
        ("/v1/models/rollback", {}),
        ("/v1/models/shadow", {"bundle": None}),
    ]
    for header in ({}, {"Authorization": f"Bearer {TOKEN}x"}):
        with server.client(headers=header) as stranger:
            before = ids(stranger.get("/v1/models", headers=admin_client.AUTH))
            for path, body in changes:
                response = stranger.post(path, json=body)
                assert (response.status_code, error(response)) == (401, "unauthorized")
            assert error(stranger.get("/v1/models")) == "unauthorized"
            assert error(stranger.get("/v1/statistics")) == "unauthorized"
            assert ids(stranger.get("/v1/models", headers=admin_client.AUTH)) == before
    with live_server.shared().client() as open_to_all:
        for path, body in changes:
            for header in ({}, admin_client.AUTH):
                response = open_to_all.post(path, json=body, headers=header)
                assert (response.status_code, error(response)) == (403, "no-token")
                assert "MARGINALIA_TOKEN" in response.json()["error"]["message"]
        assert open_to_all.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("../swaps/a", 400, "bad-bundle-path"),
        ("swaps/../swaps/a", 400, "bad-bundle-path"),
        ("{folder}/swaps/a", 400, "bad-bundle-path"),
        ("", 400, "bad-bundle-path"),
        (".", 400, "bad-bundle-path"),
        ("swaps/\x00a", 400, "bad-bundle-path"),
        ("swaps/a\n", 400, "bad-bundle-path"),
        ("x" * 401, 400, "bad-bundle-path"),
        ("out/a", 400, "bad-bundle-path"),
        ("out/absent", 400, "bad-bundle-path"),
        ("round", 404, "no-bundle"),
        ("swaps/absent", 404, "no-bundle"),
        ("x" * 300, 404, "no-bundle"),
        ("swaps/a/bundle.json", 404, "no-bundle"),
        ("file:///swaps/a", 404, "no-bundle"),
        ("swaps", 422, "bundle-refused"),
    ],
)
def test_paths_stay_below_the_allowed_folder(
    server: Server, http: httpx.Client, two: tuple[Bundle, Bundle], tmp_path_factory: pytest.TempPathFactory,
    path: str, status: int, code: str,
) -> None:  # fmt: skip
    outside = tiny_onnx.write(tmp_path_factory.mktemp("outside") / "a", model_bytes=tiny_onnx.model(9.0))
    for name, target in (("out", outside.folder.parent), ("round", server.folder / "round")):
        (server.folder / name).unlink(missing_ok=True)
        (server.folder / name).symlink_to(target)
    before = ids(http.get("/v1/models"))
    for route in ("/v1/models/load", "/v1/models/shadow"):
        response = http.post(route, json={"bundle": path.replace("{folder}", str(server.folder))})
        assert (response.status_code, error(response)) == (status, code)
        assert str(server.folder) not in response.text
    assert ids(http.get("/v1/models")) == before


def test_a_link_that_stays_inside_is_followed(server: Server, http: httpx.Client, two: tuple[Bundle, Bundle]) -> None:
    (server.folder / "latest").unlink(missing_ok=True)
    (server.folder / "latest").symlink_to(two[0].folder)
    assert ids(admin_client.load(http, "latest"))[0] == two[0].manifest.id


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "application/json", 400, "bad-json"),
        (b"{", "application/json", 400, "bad-json"),
        (b"[]", "application/json", 400, "bad-json"),
        (b"{}", "application/json", 400, "bad-json"),
        (b'{"bundle": 5}', "application/json", 400, "bad-json"),
        (b'{"bundle": "\xff"}', "application/json", 400, "bad-json"),
        (b'{"bundle": "swaps/a", "force": true}', "application/json", 400, "bad-json"),
        (b'{"bundle": "swaps/a"}', "text/plain", 415, "unsupported-type"),
        (b'{"bundle": "' + b"a" * 20_000 + b'"}', "application/json", 413, "body-too-large"),
    ],
)
def test_bodies_that_are_not_understood(http: httpx.Client, body: bytes, kind: str, status: int, code: str) -> None:
    for route in ("/v1/models/load", "/v1/models/shadow"):
        response = http.post(route, content=body, headers={"Content-Type": kind})
        assert (response.status_code, error(response)) == (status, code)
    assert error(http.get("/v1/models/load")) == "method"
    assert error(http.get("/v1/models?x=1")) == "bad-query"


def test_one_change_at_a_time_and_a_load_that_comes_too_late_changes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    models, watcher = watched(home, token=TOKEN)
    opened = loader.open_runtime

    def waiting(*arguments: Any, **more: Any) -> Runtime:
        begun.set()
        assert go.wait(60)
        return opened(*arguments, **more)

    monkeypatch.setattr(loader, "open_runtime", waiting)
    asyncio.run(_meanwhile(home, models, watcher, begun, go))


async def _meanwhile(
    home: Path, models: ModelManager, watcher: ChampionWatcher, begun: threading.Event, go: threading.Event
) -> None:
    chosen = Settings(champions=home / "champion.json", token=TOKEN)
    web, handler, _ = app.build(chosen.model_copy(update={"load_timeout_s": 0.2}), models)
    patient, other, _ = app.build(chosen.model_copy(update={"load_timeout_s": 60.0}), models)

    async def ask(app: Any, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        transport, url = httpx.ASGITransport(app), f"http://here/v1/models{path}"
        async with httpx.AsyncClient(transport=transport, headers=admin_client.AUTH) as http:
            return await (http.get(url) if body is None else http.post(url, json=body))

    late = await ask(web, "/load", {"bundle": "champions/b"})
    assert (late.status_code, error(late)) == (504, "deadline")
    assert begun.wait(60)
    trying = (await ask(web, "")).json()["candidate"]
    assert (trying["source"], trying["path"]) == ("load", "champions/b")
    for path, body in (("/load", {"bundle": "champions/c"}), ("/shadow", {"bundle": None})):
        busy = await ask(patient, path, body)
        assert (busy.status_code, error(busy)) == (409, "busy")
        assert int(busy.headers["retry-after"]) > 0
    live_server.point(home, home / "c")
    watcher.refresh()  # leaves it to the next round
    assert current_name(models) == "a"
    go.set()
    for thread in threading.enumerate():
        if thread.name == "model-load":
            thread.join()
    assert (current_name(models), models.candidate, last_event(models)["cause"]) == ("a", None, "late")
    watcher.refresh()
    assert current_name(models) == "c"
    handler.close()
    other.close()


def test_no_error_was_internal(server: Server) -> None:
    assert server.events("internal-error") == []
    assert "Traceback" not in server.log()
