"""serving.telemetry.prediction_stats: windows and histograms against a slow count, bounds, and that drift can read them."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pipeline.drift import stage
from pipeline.storage.served_statistics import ServedStatistics
from serving.telemetry import prediction_stats
from serving.telemetry.prediction_stats import (
    AREA_EDGES,
    BUNDLES,
    CONFIDENCE_EDGES,
    SAMPLE,
    WINDOW_S,
    WINDOWS,
    OpenWindow,
    PredictionCollector,
)
from tests.support import admin_client, live_server, tiny_onnx, tiny_settings
from tests.support.image_files import save
from tests.support.live_server import Server, until

CLASSES = ("road", "tree", "sky")


def shares(rng: np.random.Generator, alpha: tuple[float, ...] = (1, 1, 1)) -> dict[str, float]:
    return dict(zip(CLASSES, rng.dirichlet(alpha).tolist(), strict=True))


def slow_bin(value: float, edges: tuple[float, ...]) -> int:
    for i in range(len(edges) - 1):
        if edges[i] <= value < edges[i + 1]:
            return i
    return len(edges) - 2


def test_counts_by_window_and_bundle() -> None:
    rng, now = np.random.default_rng(0), [10 * WINDOW_S + 1.0]
    seen = PredictionCollector(clock=lambda: now[0])
    images: list[tuple[str, int, dict[str, float], float]] = []
    for i in range(150):
        bundle, one, confidence = f"id{i % 3 // 2}", shares(rng), float(rng.random())
        if i == 0:
            one, confidence = {"road": 0.0, "tree": 1.0, "sky": 0.0}, 1.0  # the ends of the range
        if i == 2:
            one, confidence = {"road": 0.1, "tree": 0.3, "sky": 0.6}, 0.5  # on the edges themselves
        images.append((bundle, int(now[0]) // WINDOW_S * WINDOW_S, one, confidence))
        seen.add(bundle, one, confidence)
        now[0] += 20
    found = json.loads(seen.text())
    assert (found["format"], found["images"], found["window_s"]) == (1, 150, WINDOW_S)
    assert (found["edges"]["area"], found["edges"]["confidence"]) == (list(AREA_EDGES), list(CONFIDENCE_EDGES))
    assert (found["started"], found["written"]) == (10 * WINDOW_S + 1, now[0])
    for part in found["bundles"]:
        mine = [image for image in images if image[0] == part["bundle"]]
        assert (part["classes"], part["images"]) == (list(CLASSES), len(mine))
        assert [w["start"] for w in part["windows"]] == sorted({image[1] for image in mine})
        for window in part["windows"]:
            here = [image for image in mine if image[1] == window["start"]]
            assert window["images"] == len(here)
            area_counts = [[0] * (len(AREA_EDGES) - 1) for _ in CLASSES]
            confidence_counts = [0] * (len(CONFIDENCE_EDGES) - 1)
            for _, _, one, confidence in here:
                confidence_counts[slow_bin(confidence, CONFIDENCE_EDGES)] += 1
                for k, name in enumerate(CLASSES):
                    area_counts[k][slow_bin(one[name], AREA_EDGES)] += 1
            assert window["area"]["counts"] == area_counts
            assert window["confidence"]["counts"] == confidence_counts
            assert window["area"]["sum"] == pytest.approx([sum(one[2][n] for one in here) for n in CLASSES], abs=1e-5)
            assert window["confidence"]["sum"] == pytest.approx(sum(one[3] for one in here), abs=1e-5)
            rows = [[*area, c] for area, c in zip(*(window["sample"][k] for k in ("area", "confidence")), strict=True)]
            assert rows == [pytest.approx([*one[2].values(), one[3]], abs=1e-5) for one in here]  # all, while few


def test_the_text_is_the_record_that_drift_reads() -> None:
    rng, now = np.random.default_rng(4), [0.0]
    collector = PredictionCollector(clock=lambda: now[0])
    for i in range(40):
        collector.add(f"id{i % 2}", shares(rng), float(rng.random()))
        now[0] += WINDOW_S / 5
    text = collector.text()
    assert ServedStatistics.model_validate_json(text).model_dump() == json.loads(text)


def test_memory_is_bounded() -> None:
    now = [0.0]
    seen = PredictionCollector(clock=lambda: now[0])
    for _ in range(WINDOWS + 5):
        for _ in range(2):
            seen.add("a", {"x": 1.0}, 0.5)
        now[0] += WINDOW_S
    for i in range(BUNDLES - 1):
        seen.add(f"b{i}", {"x": 1.0}, 0.5)
    found = json.loads(seen.text())
    assert found["bundles"][0]["bundle"] == "a"
    windows = found["bundles"][0]["windows"]
    assert [w["start"] for w in windows] == [i * WINDOW_S for i in range(5, WINDOWS + 5)]
    assert found["bundles"][0]["images"] == 2 * (WINDOWS + 5)
    seen.add("b0", {"x": 1.0}, 0.5)
    seen.add("new", {"x": 1.0}, 0.5)
    assert [b["bundle"] for b in json.loads(seen.text())["bundles"]] == ["b1", "b2", "b0", "new"]
    window = OpenWindow(0, 1)
    for i in range(SAMPLE + 100):
        window.add(np.array([i / 1000]), 0.5)
    sample = window.record().sample
    assert len(sample.area) == len(sample.confidence) == SAMPLE
    assert len({row[0] for row in sample.area}) == SAMPLE


def test_each_image_has_the_same_chance_to_be_in_the_sample() -> None:
    total, windows = 2 * SAMPLE, 300
    kept = np.zeros(total)
    for start in range(windows):
        window = OpenWindow(start, 1)
        for i in range(total):
            window.add(np.array([i / total]), 0.5)
        kept[(np.array(window.record().sample.area)[:, 0] * total).round().astype(int)] += 1
    share = kept / windows
    spread = (0.5 * 0.5 / windows) ** 0.5
    assert np.abs(share - 0.5).max() < 4.5 * spread
    assert np.abs(share.reshape(8, -1).mean(1) - 0.5).max() < 4.5 * spread / (total / 8) ** 0.5


def test_a_clock_that_goes_back_and_an_answer_with_some_classes_only() -> None:
    now = [5.0 * WINDOW_S]
    seen = PredictionCollector(clock=lambda: now[0])
    seen.add("a", {"x": 0.25, "y": 0.75}, 0.5)
    now[0] -= 2 * WINDOW_S
    seen.add("a", {"y": 1.0}, 0.5)
    (window,) = json.loads(seen.text())["bundles"][0]["windows"]
    assert (window["start"], window["images"], window["area"]["sum"]) == (5 * WINDOW_S, 2, [0.25, 1.75])


@pytest.mark.parametrize(("moved", "drifted"), [((1.0, 1.0, 1.0), False), ((1.0, 1.0, 6.0), True)])
def test_drift_tells_windows_apart(moved: tuple[float, ...], drifted: bool) -> None:
    """The energy test of pipeline.drift.stage on the sample's rows, grouped by window: two days against a third."""
    rng, now = np.random.default_rng(3), [0.0]
    seen = PredictionCollector(clock=lambda: now[0])
    for window in range(12):
        for _ in range(20):
            seen.add("a", shares(rng, moved if window >= 8 else (1.0, 1.0, 1.0)), float(rng.beta(8, 2)))
        now[0] += WINDOW_S
    (part,) = json.loads(seen.text())["bundles"]
    rows: list[Any] = []
    dumps, groups = [], []
    for i, window in enumerate(part["windows"]):
        sample = window["sample"]
        rows += [[*area, c] for area, c in zip(sample["area"], sample["confidence"], strict=True)]
        dumps += [stage.BASE if i < 8 else "now"] * len(sample["confidence"])
        groups += [str(window["start"])] * len(sample["confidence"])
    names = (np.array(part_, dtype=np.str_) for part_ in (dumps, groups, ["unlabelled"] * len(rows)))
    finding = stage.compare(stage.Cloud(np.array(rows), *names), "now", tiny_settings.pool())
    assert finding.rule == "groups"
    assert finding.drifted is drifted


@pytest.fixture(scope="module")
def server() -> Server:
    """One that nobody else asks: a window keeps a random sample of its images once it has seen more than it holds."""
    return live_server.start(live_server.KEPT)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with admin_client.client(server) as client:
        yield client


def test_the_service_shows_and_dumps_what_it_answered(server: Server, http: httpx.Client) -> None:
    image_HWC = np.random.default_rng(9).integers(0, 256, (48, 64, 3), dtype=np.uint8)  # the model's own size
    picture = save(Image.fromarray(image_HWC))
    before = http.get("/v1/statistics").json()
    raw = {"Content-Type": "application/octet-stream"}
    answers = [
        http.post("/v1/segment", content=picture, headers=raw | {"Accept": "application/json"}) for _ in range(3)
    ]
    answer = answers[0].json()
    after = until(lambda: (now := http.get("/v1/statistics").json())["images"] == before["images"] + 3 and now)
    (part,) = (b for b in after["bundles"] if b["bundle"] == answer["bundle"])
    assert part["classes"] == [item["name"] for item in tiny_onnx.CLASSES]
    assert part["windows"][-1]["sample"]["area"][-1] == pytest.approx([c["share"] for c in answer["classes"]], abs=1e-5)
    assert part["windows"][-1]["sample"]["confidence"][-1] == pytest.approx(answer["confidence"], abs=1e-5)
    (file,) = until(lambda: list((server.folder / "statistics").glob("predictions-*.json")))
    until(lambda: json.loads(file.read_text())["images"] == after["images"])
    now = http.get("/v1/statistics").json()
    assert json.loads(file.read_text()) | {"written": 0} == now | {"written": 0}
    assert "picture" not in file.read_text()


def test_the_end_writes_what_is_left_and_a_bad_folder_is_told(tmp_path: Path) -> None:
    told: list[OSError] = []
    seen = PredictionCollector(clock=time.time)
    dump = prediction_stats.StatisticsWriter(seen, tmp_path / "s", 3600, told.append)
    dump.start()
    seen.add("a", {"x": 1.0}, 0.5)
    dump.stop()
    assert dump.path is not None
    assert json.loads(dump.path.read_text())["images"] == 1
    (tmp_path / "file").write_text("")
    blocked = prediction_stats.StatisticsWriter(seen, tmp_path / "file", 3600, told.append)
    blocked.start()
    blocked.stop()
    assert len(told) == 1
    nowhere = prediction_stats.StatisticsWriter(seen, None, 3600, told.append)
    nowhere.start()
    nowhere.stop()
    assert nowhere.path is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "s"]
