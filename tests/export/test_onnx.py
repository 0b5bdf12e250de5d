"""Stage `export`: the draft bundle, its report, and what is refused."""

import json
from pathlib import Path

import onnx
import pytest

from export.bundle import bundle
from export.tensorrt import installation
from pipeline.storage import atomic
from tests.support import tiny_project
from tests.support.command_line import marginalia


def test_stage_makes_a_valid_bundle_and_report() -> None:
    root = tiny_project.exported()
    opened = bundle.open_bundle(root / "models/exported")
    scores, said = atomic.read_json(root / "reports/scores.json"), atomic.read_json(root / "reports/export.json")
    assert [c.name for c in opened.manifest.classes] == tiny_project.NAMES
    assert opened.manifest.metrics["miou"] == scores["miou"]
    assert opened.manifest.test_hash == scores["test_hash"]
    assert (opened.manifest.input.long_side, opened.manifest.input.stride) == (96, 32)
    assert said["draft"] == opened.manifest.id
    assert said["weights"] == atomic.sha256(root / "models/student/student.safetensors")
    inside = {p.key: p.value for p in onnx.load_from_string(opened.read_model()).metadata_props}
    assert json.loads(inside["classes"]) == tiny_project.NAMES
    assert json.loads(inside["palette"])[3] == [240, 220, 40]
    assert json.loads(inside["input"])["long_side"] == 96
    assert (inside["data_hash"], inside["weights"]) == ("d" * 64, said["weights"])


def test_scores_of_other_weights_are_refused_before_tracing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_project.write(tmp_path)
    scores = atomic.read_json(tiny_project.exported() / "reports/scores.json")
    atomic.write_json(Path("reports/scores.json"), scores | {"weights": "0" * 64})
    assert marginalia("stage", "export") == 1
    assert "run the evaluate stage again" in capsys.readouterr().err
    assert not Path("models/exported").exists()


def test_tensorrt_report_says_what_was_looked_for() -> None:
    said = installation.look().model_dump(mode="json")
    assert set(said["looked_for"]) == {
        "CUDA driver libcuda.so.1", "nvidia-smi -L", "device files /dev/nvidia0..",
        "Python module tensorrt", "Python module tensorrt_rtx",
    }  # fmt: skip
    assert said["usable"] == bool(said["cards"] and said["modules"])
    if not said["cards"]:
        assert said["says"].startswith("no card present")
        assert said["looked_for"]["CUDA driver libcuda.so.1"].startswith(("not found", "answers"))
