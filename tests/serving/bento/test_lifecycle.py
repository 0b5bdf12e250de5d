"""What a running server does around requests: metrics, the next champion, a bad champion, the end."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from export.runtime.runtime import Runtime
from pipeline.storage import atomic
from serving import settings
from serving.bento import run
from serving.model import loader
from serving.model.manager import ModelManager
from serving.model.watcher import ChampionWatcher
from serving.telemetry import metrics
from tests.support import live_server, tiny_onnx
from tests.support.image_files import save
from tests.support.live_server import ROOT, Server, error, until

PICTURE = save(Image.fromarray(np.random.default_rng(2).integers(0, 256, (60, 80, 3), dtype=np.uint8)))
RAW = {"Content-Type": "application/octet-stream"}


def samples(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with server.client() as http:
        text = http.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(server: Server) -> None:
    def value(name: str, **labels: str) -> float:
        return found.get((name, tuple(sorted(labels.items()))), 0.0)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return found.get(key, 0.0) - before.get(key, 0.0)

    found = before = samples(server)
    with server.client() as http:
        for accept in ("image/png", "image/png", "application/json", "image/jpeg"):
            assert http.post("/v1/segment", content=PICTURE, headers=RAW | {"Accept": accept}).status_code == 200
        assert http.post("/v1/segment", content=b"no image", headers=RAW).status_code == 400
    found = samples(server)
    assert grown("marginalia_requests_total", answer="mask", status="2xx") == 2
    assert grown("marginalia_requests_total", answer="json", status="2xx") == 1
    assert grown("marginalia_requests_total", answer="overlay", status="2xx") == 1
    assert grown("marginalia_requests_total", answer="mask", status="4xx") == 1
    assert grown("marginalia_rejected_total", reason="not-an-image") == 1
    for phase in ("queue", "decode", "run", "encode"):
        assert grown("marginalia_phase_seconds_count", phase=phase) == 4
    assert grown("marginalia_confidence_count") == 4
    assert grown("marginalia_batch_size_sum") == 4
    assert value("marginalia_queue_length") == 0
    shares = [grown("marginalia_class_area_share_total", class_name=c["name"]) for c in tiny_onnx.CLASSES]
    assert sum(shares) == pytest.approx(4)
    assert value("marginalia_ready") == 1
    until(lambda: samples(server)["marginalia_in_flight", ()] == 0)


@pytest.fixture
def first_again(server: Server) -> Iterator[Path]:
    """The champions folder; afterwards the first champion serves again."""
    champions = server.folder / "champions"
    yield champions
    first = champions / "first" / "bundle"
    live_server.point(champions, first)
    wanted = tiny_onnx.bundle.open_bundle(first).manifest.id
    with server.client() as http:
        until(lambda: http.get("/v1/model").json()["bundle"] == wanted)


def test_a_new_champion_is_swapped_in_without_a_failed_request(server: Server, first_again: Path) -> None:
    second = tiny_onnx.write(first_again / "second" / "bundle", model_bytes=tiny_onnx.model(250.0))
    seen: list[tuple[int, str, bytes]] = []
    stop = threading.Event()

    def hammer() -> None:
        with server.client() as http:
            while not stop.is_set():
                response = http.post("/v1/segment", content=PICTURE, headers=RAW)
                seen.append((response.status_code, response.headers.get("x-bundle-id", ""), response.content))

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(seen) > 5)
    live_server.point(first_again, second.folder)
    until(lambda: any(entry[1] == second.manifest.id for entry in seen))
    stop.set()
    for thread in threads:
        thread.join()
    assert {status for status, _, _ in seen} == {200}
    by_bundle: dict[str, set[bytes]] = {}
    for _, bundle_id, body in seen:
        by_bundle.setdefault(bundle_id, set()).add(body)
    assert len(by_bundle) == 2
    assert all(len(bodies) == 1 for bodies in by_bundle.values())  # never one model's id on the other's answer
    assert len(set.union(*by_bundle.values())) == 2


def test_a_bad_champion_never_replaces_a_good_one(server: Server, first_again: Path) -> None:
    def refused() -> float:
        return samples(server).get(("marginalia_swaps_total", (("result", "refused"),)), 0.0)

    with server.client() as http:
        serving = http.get("/v1/model").json()["bundle"]
        broken = tiny_onnx.write(first_again / "broken" / "bundle", model_bytes=tiny_onnx.model(7.0))
        (broken.folder / "model.onnx").write_bytes(b"damaged")
        wrong_ids = tiny_onnx.write(first_again / "ids" / "bundle", model_bytes=tiny_onnx.model(shift=40))
        for named in (broken.folder, wrong_ids.folder, first_again / "absent" / "bundle"):
            before = refused()
            live_server.point(first_again, named)
            until(lambda before=before: refused() == before + 1)
            assert server.events("bundle-refused")[-1]["still_serving"] == serving
            assert http.post("/v1/segment", content=PICTURE, headers=RAW).headers["x-bundle-id"] == serving
            assert http.get("/readyz").status_code == 200
        for text in ("{}", "not json", "[1]", '{"bundle": 5}'):
            before = refused()
            atomic.write_text(first_again / "champion.json", text)
            until(lambda before=before: refused() == before + 1)
        before = refused()
        (first_again / "champion.json").unlink()
        until(lambda: refused() == before + 1)
        assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200


@pytest.mark.slow
def test_started_by_hand_tracks_nothing_and_ends_on_sigterm() -> None:
    """`bentoml serve` typed by a person. The debug variable makes BentoML print what it would send."""
    server = live_server.start(
        {
            "__BENTOML_DEBUG_USAGE": "true",
            "MARGINALIA_POLL_S": "0.1",
            "MARGINALIA_STATISTICS": "{folder}/statistics",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",  # nobody there: the service must not mind
        },
        ["-m", "bentoml", "serve", "serving.bento.service:Marginalia", "--host", "127.0.0.1", "--port", "{port}"],
    )
    workers = server.workers()
    assert workers
    with server.client() as http:
        assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200
    assert server.stop() == 0
    (dump,) = (server.folder / "statistics").iterdir()
    assert atomic.read_json(dump)["images"] == 1
    for pid in workers:
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists())
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/livez", trust_env=False)
    assert "bundle-loaded" in server.log()
    assert "Tracking" not in server.log()


def test_the_service_waits_for_its_first_champion(tmp_path: Path) -> None:
    """In one process, without a server around it: 503 before there is a model, 200 after."""
    program = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from starlette.testclient import TestClient
from serving.http import app
from serving import settings
from serving.model.manager import ModelManager
from serving.model.watcher import ChampionWatcher
from tests.support import live_server, tiny_onnx
folder = Path({str(tmp_path)!r})
chosen = settings.Settings(champions=folder / "champions" / "champion.json", poll_s=0.05)
models = ModelManager(chosen)
watcher = ChampionWatcher(models, chosen)
web, handler, _ = app.build(chosen, models)
watcher.start()
http = TestClient(web)
answer = http.get("/v1/model")
print(answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"])
made = tiny_onnx.write(folder / "champions" / "one" / "bundle")
live_server.point(folder / "champions", made.folder)
live_server.until(lambda: models.current)
print(http.get("/v1/model").json()["bundle"] == made.manifest.id)
watcher.stop()
handler.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["503 no-model 1", "True"]


@pytest.mark.parametrize("pinned", [False, True])
def test_a_passing_failure_does_not_lose_a_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """The folder is away for a while: tried again after 1, 2, 4 ... 60 seconds of a clock that the test moves."""
    now, told = [0.0], []
    monkeypatch.setattr(metrics, "event", lambda kind, **facts: told.append((kind, facts)))
    made = tiny_onnx.write(tmp_path / "champions" / "one" / "bundle")
    live_server.point(tmp_path / "champions", made.folder)
    away = made.folder.rename(tmp_path / "away")
    pin = {"bundle": made.folder} if pinned else {}
    chosen = settings.Settings(champions=tmp_path / "champions" / "champion.json", provider="cpu", threads=1, **pin)
    models = ModelManager(chosen)
    watcher = ChampionWatcher(models, chosen, clock=lambda: now[0])
    opened = loader.open_runtime
    tries: list[float] = []

    def counting(these: settings.Settings, folder: Path, **rest: Any) -> Runtime:
        tries.append(now[0])
        return opened(these, folder, **rest)

    monkeypatch.setattr(loader, "open_runtime", counting)
    while now[0] < 250:
        watcher.refresh()
        now[0] += 0.5
    assert tries == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    assert [kind for kind, _ in told] == ["bundle-refused"]  # not once a try
    away.rename(made.folder)
    watcher.refresh()
    assert models.current is None
    now[0] = 303
    watcher.refresh()
    assert models.current is not None
    assert models.current.bundle.manifest.id == made.manifest.id
    now[0] = 1000
    watcher.refresh()
    assert len(tries) == 11  # what is served is not opened again


def test_serving_imports_neither_torch_nor_onnx_nor_the_data_side() -> None:
    program = (
        "import sys, serving.bento.service, serving.bento.worker, serving.bento.run\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'timm', 'dvc', 'pyarrow', 'matplotlib', 'training'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_start_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARGINALIA_CHAMPIONS", str(tmp_path / "champion.json"))
    with pytest.raises(run.StartError, match=r"no champion yet; run `dvc repro`"):
        run.prepare()
    with pytest.raises(run.StartError, match="no bundle folder here"):
        run.prepare(tmp_path / "absent")
    with pytest.raises(run.StartError, match="no bundle folder here"):
        run.prepared(tmp_path / "absent")  # in a process of its own
    monkeypatch.setenv("MARGINALIA_MAX_PIXEL", "5")
    with pytest.raises(run.StartError, match="did you mean MARGINALIA_MAX_PIXELS"):
        run.prepare()


def test_no_error_was_internal(server: Server) -> None:
    """Runs late in this file: whatever the tests sent, nothing failed inside."""
    assert server.events("internal-error") == []
    assert not re.search(r"Traceback|ERROR", server.log())
    with server.client() as http:
        assert error(http.get("/v1/nothing")) == "not-found"
