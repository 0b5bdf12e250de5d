"""One class below its bar fails the run although the mean passes."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import parity_metrics, parity_verdict
from export.bundle import bundle
from export.bundle.manifest import MODEL
from pipeline.storage import atomic
from tests.support import tiny_project, tiny_settings
from tests.support.command_line import marginalia


def test_the_mean_passes_and_one_class_does_not() -> None:
    pairs = np.diag([100_000, 100_000, 100_000, 1000])
    pairs[3] = [30, 0, 0, 970]
    same = parity_metrics.Agreement(pairs)
    measured = parity_metrics.Measured(same, same, pairs, pairs, 30, 30, 0, 1.0, 1)
    bars = tiny_settings.parity()
    assert same.overall >= bars.agreement
    failures = parity_verdict.judge(measured, tiny_project.NAMES, bars)
    assert len(failures) == 2  # once on each grid
    assert all("'lamp' agrees on 0.970000" in f and "overall 0.99990" in f for f in failures)


def test_through_the_stage_with_a_real_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rare class's bias is lowered in the graph only; near-ties on its rim are not forgiven."""
    shutil.copytree(tiny_project.exported(), tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    opened = bundle.open_bundle(Path("models/exported"))
    proto = onnx.load_from_string(opened.read_model())
    (bias,) = [t for t in proto.graph.initializer if list(t.dims) == [4] and "segmentation_head" in t.name]
    value = numpy_helper.to_array(bias).copy()
    value[3] -= 0.2
    bias.CopyFrom(numpy_helper.from_array(value, bias.name))
    description = opened.manifest.description(options=())
    bundle.create(Path("models/exported"), {MODEL: proto.SerializeToString()}, description, card="changed")
    tiny_project.write_params(Path(), parity={"agreement": 0.9, "class_agreement": 0.99, "miou_drop": 100})
    assert marginalia("stage", "parity") == 3
    said = atomic.read_json(Path("reports/parity.json"))
    assert said["grid"]["agreement"] >= 0.9
    assert said["failures"]
    assert all("'lamp'" in failure for failure in said["failures"])
    assert "lamp" in capsys.readouterr().err
