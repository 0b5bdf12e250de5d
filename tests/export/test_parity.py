"""Parity on a real exported network, and on graphs made wrong on purpose."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import parity, parity_metrics, parity_verdict
from export.bundle import bundle
from export.bundle.manifest import MODEL
from pipeline import config
from pipeline.storage import atomic, manifest
from tests.support import tiny_project, tiny_settings
from tests.support.command_line import marginalia

NAMES = tiny_project.NAMES


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(tiny_project.exported(), tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


def rebundle(change: dict[str, np.ndarray] | None = None, *, long_side: int | None = None) -> None:
    """The project's bundle again, with some initializers replaced or another input policy."""
    opened = bundle.open_bundle(Path("models/exported"))
    proto = onnx.load_from_string(opened.read_model())
    for tensor in proto.graph.initializer:
        if change and tensor.name in change:
            tensor.CopyFrom(numpy_helper.from_array(change[tensor.name], tensor.name))
    policy = opened.manifest.input.model_copy(update={"long_side": long_side or opened.manifest.input.long_side})
    description = opened.manifest.description(options=(), input=policy)
    bundle.create(Path("models/exported"), {MODEL: proto.SerializeToString()}, description, card="changed")


def head_bias() -> tuple[str, np.ndarray]:
    proto = onnx.load_from_string(bundle.open_bundle(Path("models/exported")).read_model())
    found = [t for t in proto.graph.initializer if list(t.dims) == [4] and "segmentation_head" in t.name]
    assert len(found) == 1, [t.name for t in found]
    return found[0].name, numpy_helper.to_array(found[0]).copy()


def test_the_exported_network_passes_its_bars(project: Path) -> None:
    assert marginalia("stage", "parity") == 0
    said = atomic.read_json(Path("reports/parity.json"))
    assert said["passed"]
    assert said["failures"] == []
    for place in ("grid", "original"):
        assert said[place]["agreement"] >= 0.999
        assert set(said[place]["per_class"]) == set(NAMES)
        assert all(v is None or v >= 0.99 for v in said[place]["per_class"].values())
    assert said["images"] == 11
    assert abs(said["miou_drop"]) < 0.1
    scores = atomic.read_json(Path("reports/scores.json"))
    assert said["miou_torch"] == pytest.approx(scores["miou"], abs=0.05)  # the same images, the same rule
    assert said["largest_confidence_gap"] <= 1
    assert said["serving_path_agreement"] >= 0.999
    assert said["bundle"] == bundle.open_bundle(Path("bundle")).manifest.id
    assert said["weights"] == atomic.sha256(Path("models/student/student.safetensors"))
    rows = [r for r in manifest.read(Path("data/split/manifest.parquet")) if r.split == "test"]
    assert said["original"]["pixels"] == sum(r.height * r.width for r in rows)


def test_a_shifted_bias_fails_with_names_and_numbers(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, bias = head_bias()
    bias[1] += 0.5
    rebundle({name: bias})
    assert marginalia("stage", "parity") == 3
    said = atomic.read_json(Path("reports/parity.json"))  # written although it failed
    assert not said["passed"]
    told = " ".join(capsys.readouterr().err.split())
    assert "agreement" in told
    assert f"below parity.agreement {tiny_settings.parity().agreement:g}" in told
    assert said["differing_pixels"] > said["near_ties_among_them"]


def test_another_input_policy_in_the_bundle_is_seen(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The graph is right but serving would scale images otherwise: train/serve skew."""
    rebundle(long_side=48)
    assert marginalia("stage", "parity") == 3
    assert "input policy" in capsys.readouterr().err
    assert atomic.read_json(Path("reports/parity.json"))["grid"]["agreement"] >= 0.999


def test_a_damaged_bundle_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path("models/exported/model.onnx")
    model.write_bytes(model.read_bytes()[:-1])
    assert marginalia("stage", "parity") == 1
    assert "model.onnx" in capsys.readouterr().err


def measured(pairs: np.ndarray) -> parity_metrics.Measured:
    same = parity_metrics.Agreement(pairs)
    return parity_metrics.Measured(same, same, pairs, pairs, 0, int(pairs.sum() - np.trace(pairs)), 0, 1.0, 1)


def test_bars_are_inclusive_and_each_is_checked() -> None:
    bars = tiny_settings.parity(agreement=0.99, class_agreement=0.9, miou_drop=0.5)
    exact = np.array([[90, 10, 0], [0, 899, 1], [0, 0, 100]])
    assert (
        parity_verdict.judge(measured(np.diag([5, 5, 0])), NAMES[:3], bars) == []
    )  # a class torch never answers is not judged
    assert (
        parity_verdict.judge(measured(exact), NAMES[:3], bars) == []
    )  # 0.99 overall and 0.9 for the first class: just met
    one_less = exact.copy()
    one_less[0] = [89, 11, 0]
    told = "\n".join(parity_verdict.judge(measured(one_less), NAMES[:3], bars))
    assert "'sky' agrees on 0.890000" in told
    assert "agreement 0.989091 is below" in told
    worse = replace(
        measured(exact), torch_KK=np.diag([100, 100, 0]), runtime_KK=np.array([[98, 2, 0], [0, 100, 0], [0, 0, 0]])
    )
    assert [f for f in parity_verdict.judge(worse, NAMES[:3], bars) if "mIoU falls by" in f]
    told = parity_verdict.judge(worse, NAMES[:3], replace_bars(bars, class_drop=1.9, miou_drop=100))
    assert [f for f in told if "'sky' loses 2.00 points of IoU, more than parity.class_drop 1.9" in f], told
    assert not [f for f in parity_verdict.judge(worse, NAMES[:3], replace_bars(bars, class_drop=2.1)) if "loses" in f]
    skewed = replace(measured(exact), served=0.98)
    assert [f for f in parity_verdict.judge(skewed, NAMES[:3], bars) if "input policy" in f]


def replace_bars(bars: config.Parity, **changes: float) -> config.Parity:
    return bars.model_copy(update=changes)


def test_images_are_picked_evenly_and_by_id(tmp_path: Path) -> None:
    rows = tiny_project.write_data(tmp_path, [("test", "base", "d", 10)])
    picked = parity.pick(rows, 4)
    assert len({r.id for r in picked}) == 4
    assert picked == parity.pick(rows[::-1], 4)
    assert parity.pick(rows, 99) == sorted(rows, key=lambda r: r.id)
