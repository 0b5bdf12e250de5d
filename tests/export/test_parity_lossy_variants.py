"""An int8 form under the accuracy bar, or not faster, is not written into the bundle; the report says why."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import parity, parity_metrics, parity_verdict
from export.bundle import bundle
from export.bundle.manifest import Option
from pipeline import paths
from pipeline.storage import atomic
from tests.support import tiny_project, tiny_settings
from tests.support.command_line import marginalia

BASE = parity_verdict.BASE
INT8 = Option(runtime="onnxruntime", device="cpu", precision="int8", file="model.int8.onnx")


def measured(wrong: int) -> parity_metrics.Measured:
    pairs = np.diag([50_000, 30_000, 15_000, 5000])
    pairs[3, 3], pairs[3, 0] = 5000 - wrong, wrong
    same = parity_metrics.Agreement(pairs)
    truth = np.diag([50_000, 30_000, 15_000, 5000])
    return parity_metrics.Measured(same, same, truth, pairs, 0, wrong, 0, 1.0, 1, same)


@pytest.mark.parametrize(
    ("wrong", "seconds", "said"),
    [
        (40, 0.5, None),
        (40, 0.95, "1.05 times the speed of fp32 in ONNX Runtime, below parity.speedup 1.1"),
        (1500, 0.5, "below parity.int8.agreement 0.99"),
        (900, 0.5, "'lamp' loses 18.00 points of IoU, more than parity.int8.class_drop 2"),
    ],
)
def test_slow_or_wrong_forms_stay_out(
    monkeypatch: pytest.MonkeyPatch, wrong: int, seconds: float, said: str | None
) -> None:
    bars = tiny_settings.parity(int8={"agreement": 0.99, "class_agreement": 0.5, "miou_drop": 10, "class_drop": 2})
    records = parity_verdict.judge_all(
        {parity_verdict.BASE: measured(0), INT8: measured(wrong)},
        {parity_verdict.BASE: 1.0, INT8: seconds},
        tiny_project.NAMES,
        bars,
    )
    assert records[0].left_out is None
    if said is None:
        assert records[1].left_out is None
        assert records[1].speedup == 2.0
    else:
        assert said in records[1].left_out


def spoilt(model: bytes) -> bytes:
    """An int8 graph whose classifier prefers one class: accurate it is not."""
    proto = onnx.load_from_string(model)
    kinds = {t.name: t for t in proto.graph.initializer}
    (classifier,) = [node for node in proto.graph.node if node.op_type == "Conv" and node.input[1] in kinds]
    bias = kinds[classifier.input[2]]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.array([9, 0, 0, 0], np.float32), bias.name))
    return proto.SerializeToString()


@pytest.mark.parametrize("good", [True, False])
def test_through_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: bool) -> None:
    """fp32 passes either way and makes a bundle; the int8 file is in it only if it was admitted."""
    shutil.copytree(tiny_project.exported(), tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    draft = bundle.open_bundle(paths.DRAFT)
    assert "model.int8.onnx" in draft.models
    if not good:
        models = {name: draft.read_model(name) for name in draft.models}
        models["model.int8.onnx"] = spoilt(models["model.int8.onnx"])
        bundle.create(paths.DRAFT, models, draft.manifest.description(), card="spoilt")
    monkeypatch.setattr(
        parity, "seconds", lambda runtimes, images: {o: 0.5 if o.precision == "int8" else 1.0 for o in runtimes}
    )
    loose = {"agreement": 0.9, "class_agreement": 0.0, "miou_drop": 10, "class_drop": 50}
    tiny_project.write_params(Path(), parity={"int8": loose})
    assert marginalia("stage", "parity") == 0
    made, said = bundle.open_bundle(Path("bundle")), atomic.read_json(Path("reports/parity.json"))
    row = next(r for r in said["options"] if r["name"] == "onnxruntime cpu int8")
    assert ("model.int8.onnx" in made.models) == good
    assert (row["left_out"] is None) == good
    assert said["bundle"] == made.manifest.id
    listed = {str(o): o for o in made.manifest.options}
    assert listed["onnxruntime cpu fp32"].speedup == 1.0
    if good:
        assert listed["onnxruntime cpu int8"].speedup == 2.0
        assert listed["onnxruntime cpu int8"].agreement == pytest.approx(row["grid"]["agreement"], abs=1e-6)
    else:
        assert "below parity.int8.agreement" in row["left_out"]
