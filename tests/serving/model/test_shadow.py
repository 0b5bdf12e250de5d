"""serving.model.shadow: agreement against a slow count, and that no request is ever later or lost for it."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.bundle.bundle import Bundle
from export.runtime.runtime import Runtime
from serving.model.shadow import WAITING, Shadow, ShadowAgreement
from serving.telemetry import metrics
from tests.support import admin_client, live_server, tiny_onnx
from tests.support.image_files import save
from tests.support.live_server import Server, until

RAW = {"Content-Type": "application/octet-stream"}
IMAGES = [np.random.default_rng(i).integers(0, 256, (40 + 10 * i, 64, 3), dtype=np.uint8) for i in range(3)]
Labels = NDArray[np.uint8]


def counted(pairs: list[tuple[Labels, Labels]], classes: list[int]) -> tuple[float, dict[int, float]]:
    """The slow way: (equal pixels / pixels, by class those that both / either call so)."""
    flat = [(int(a), int(b)) for ours, theirs in pairs for a, b in zip(ours.ravel(), theirs.ravel(), strict=True)]
    union = {i: sum(i in pair for pair in flat) for i in classes}
    both = {i: sum(pair == (i, i) for pair in flat) for i in classes}
    return sum(a == b for a, b in flat) / len(flat), {i: both[i] / union[i] for i in classes if union[i]}


@pytest.fixture(scope="module")
def server() -> Server:
    return live_server.kept()


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with admin_client.client(server) as client:
        yield client


@pytest.fixture(scope="module")
def two(server: Server) -> tuple[Bundle, Bundle]:
    home = server.folder / "shadowed"
    return tiny_onnx.write(home / "a"), tiny_onnx.write(home / "b", model_bytes=tiny_onnx.model(180.0))


def answered(http: httpx.Client) -> int:
    return sum(int(admin_client.metric(http, "marginalia_shadow_images_total", result=r)) for r in metrics.SHADOWED)


def test_agreement_over_http(server: Server, http: httpx.Client, two: tuple[Bundle, Bundle]) -> None:
    ours, theirs = two
    classes = {c.id: c.name for c in ours.manifest.classes}
    assert admin_client.load(http, admin_client.below(server, ours.folder), allow_class_change=True).status_code == 200
    shown = http.post("/v1/models/shadow", json={"bundle": admin_client.below(server, theirs.folder)})
    assert shown.json()["shadow"]["bundle"] == theirs.manifest.id
    assert shown.json()["shadow"]["agreement"] is None
    assert admin_client.metric(http, "marginalia_model_info", slot="shadow", bundle=theirs.manifest.id) == 1
    scored = admin_client.metric(http, "marginalia_shadow_images_total", result="scored")
    for image_HWC in IMAGES:
        before = answered(http)
        answer = http.post("/v1/segment", content=save(Image.fromarray(image_HWC)), headers=RAW)
        assert answer.headers["x-bundle-id"] == ours.manifest.id  # the shadow answers nobody
        until(lambda before=before: answered(http) == before + 1)
    runtimes = [Runtime(bundle, provider="cpu", threads=1) for bundle in two]
    pairs = [tuple(runtime.segment(image).label_HW for runtime in runtimes) for image in IMAGES]
    share, each = counted(pairs, list(classes))  # type: ignore[arg-type]
    assert 0 < share < 1
    found = until(lambda: (card := http.get("/v1/models").json()["shadow"]) and card["images"] == 3 and card)
    assert found["against"] == ours.manifest.id
    assert found["agreement"] == pytest.approx(share)
    assert found["agreement_by_class"] == pytest.approx({classes[i]: value for i, value in each.items()})
    assert admin_client.metric(http, "marginalia_shadow_agreement") == pytest.approx(share)
    for i, value in each.items():
        name = classes[i]
        assert admin_client.metric(http, "marginalia_shadow_class_agreement", class_name=name) == pytest.approx(value)
    assert admin_client.metric(http, "marginalia_shadow_images_total", result="scored") == scored + 3

    ended = http.post("/v1/models/shadow", json={"bundle": None}).json()
    assert ended["shadow"] is None
    assert ended["events"][-1]["event"] == "shadow-ended"
    text = http.get("/metrics").text
    assert 'slot="shadow"' not in text
    assert "marginalia_shadow_agreement " not in text.replace("# HELP marginalia_shadow_agreement ", "").replace(
        "# TYPE marginalia_shadow_agreement ", ""
    )


def test_a_shadow_that_takes_over_is_no_shadow_any_more(
    server: Server, http: httpx.Client, two: tuple[Bundle, Bundle]
) -> None:
    assert admin_client.load(http, admin_client.below(server, two[0].folder)).status_code == 200
    path = admin_client.below(server, two[1].folder)
    assert http.post("/v1/models/shadow", json={"bundle": path}).json()["shadow"]["path"] == path
    now = admin_client.load(http, path).json()
    assert (now["current"]["path"], now["shadow"]) == (path, None)


def test_a_bad_shadow_is_refused(server: Server, http: httpx.Client) -> None:
    broken = tiny_onnx.write(server.folder / "shadowed" / "broken", model_bytes=tiny_onnx.model(shift=30))
    response = http.post("/v1/models/shadow", json={"bundle": admin_client.below(server, broken.folder)})
    assert (response.status_code, live_server.error(response)) == (422, "bundle-refused")
    state = http.get("/v1/models").json()
    assert (state["shadow"], state["candidate"]) == (None, None)
    assert (state["events"][-1]["source"], state["events"][-1]["cause"]) == ("shadow", "bundle")


class Held:
    """A runtime that waits for the test inside `segment`, and may then fail."""

    def __init__(self, bundle: Bundle, fails: bool = False) -> None:
        self.bundle, self.fails = bundle, fails
        self.inside, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def segment(self, image_HWC: Labels) -> object:
        self.inside.release()
        assert self.go.acquire(timeout=60)
        if self.fails:
            raise RuntimeError("the candidate's own trouble")
        return Runtime(self.bundle, provider="cpu", threads=1).segment(image_HWC)


@pytest.fixture
def made(tmp_path: Path) -> Bundle:
    return tiny_onnx.write(tmp_path / "bundle")


LABEL = np.zeros((4, 6), np.uint8)
IMAGE = np.zeros((4, 6, 3), np.uint8)


def test_what_finds_the_shadow_busy_is_dropped_at_once(made: Bundle) -> None:
    held = Held(made)
    shadow = Shadow(lambda: held, share=1.0)  # type: ignore[arg-type, return-value]
    shadow.opened.result(60)
    shadow.offer(IMAGE, LABEL, made.manifest)
    assert held.inside.acquire(timeout=60)  # it works on the first
    for _ in range(WAITING + 7):
        shadow.offer(IMAGE, LABEL, made.manifest)  # would wait for ever if it waited
    assert shadow.report().dropped == 7
    for _ in range(WAITING + 1):
        held.go.release()
    until(lambda: shadow.report().scored == WAITING + 1)
    huge = np.broadcast_to(np.zeros(3, np.uint8), (8000, 8000, 3))
    shadow.offer(huge, LABEL, made.manifest)
    assert shadow.report().dropped == 8
    shadow.close(wait=True)
    shadow.offer(IMAGE, LABEL, made.manifest)
    assert shadow.report().dropped == 8


def test_a_failing_shadow_is_told_once_and_goes_on(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(metrics, "failure", lambda kind, error, **facts: told.append(f"{kind}: {error}"))
    held = Held(made, fails=True)
    shadow = Shadow(lambda: held, share=1.0)  # type: ignore[arg-type, return-value]
    shadow.opened.result(60)
    for count in (1, 2):
        held.go.release()
        shadow.offer(IMAGE, LABEL, made.manifest)
        until(lambda count=count: shadow.report().failed == count)
    held.fails = False
    held.go.release()
    shadow.offer(IMAGE, LABEL, made.manifest)
    until(lambda: shadow.report().scored == 1)
    assert told == ["shadow-failed: the candidate's own trouble"]
    shadow.close(wait=True)


def test_a_share_of_the_images_is_offered_on(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([0.0, 0.29, 0.3, 0.99, 0.1])
    monkeypatch.setattr("serving.model.shadow.random.random", lambda: next(drawn))
    held = Held(made)
    shadow = Shadow(lambda: held, share=0.3)  # type: ignore[arg-type, return-value]
    shadow.opened.result(60)
    for _ in range(5):
        shadow.offer(IMAGE, LABEL, made.manifest)
        held.go.release()
        until(lambda: shadow._waiting.empty())
    until(lambda: shadow.report().scored == 3)
    shadow.close(wait=True)


@pytest.mark.skipif(sys.platform != "linux", reason="niceness by thread is Linux's")
def test_it_is_opened_and_run_at_the_lowest_priority(made: Bundle) -> None:
    seen: list[int] = []

    def open_candidate() -> Runtime:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return Runtime(made, provider="cpu", threads=1)

    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    shadow = Shadow(open_candidate, share=1.0)
    shadow.opened.result(60)
    shadow.close(wait=True)
    assert seen == [19]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine


@pytest.mark.parametrize("chunk", [1, 14, 1 << 20])
def test_classes_are_matched_by_name_and_a_swap_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """The shadow has the same names under other ids, and one that the served model does not know."""
    monkeypatch.setattr("serving.model.shadow._CHUNK", chunk)
    ours = tiny_onnx.write(tmp_path / "ours").manifest
    names = ["blue", "dark", "extra", "red"]
    theirs = tiny_onnx.write(
        tmp_path / "theirs", classes=[{"id": i, "name": n, "color": [i, i, i]} for i, n in enumerate(names)]
    ).manifest
    rng = np.random.default_rng(1)
    label_HW, shadow_HW = (rng.integers(0, 4, (9, 7)).astype(np.uint8) for _ in range(2))
    counts = ShadowAgreement(ours)
    counts.add(label_HW, shadow_HW, theirs)
    translated = np.array([3, 0, 99, 1], np.uint8)[shadow_HW]
    share, each = counted([(label_HW, translated)], [0, 1, 2, 3])
    found, by_name = counts.shares()
    assert found == pytest.approx(share)
    assert by_name == pytest.approx({tiny_onnx.CLASSES[i]["name"]: value for i, value in each.items()})
    assert ShadowAgreement(ours).shares() == (None, {})


def test_no_error_was_internal(server: Server) -> None:
    assert server.events("internal-error") == []
    assert "Traceback" not in server.log()
