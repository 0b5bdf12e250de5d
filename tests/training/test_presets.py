"""Every preset is complete, valid and builds; the memory that their comments promise."""

from pathlib import Path

import pytest
import yaml

from benchmarks import memory
from pipeline import config
from pipeline.config import Model

PRESETS = sorted((Path(__file__).parents[2] / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_complete_valid_and_builds(path):
    text = path.read_text()
    params = config.parse(text, path)
    head = text.split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "Memory:" in head
    raw = yaml.safe_load(text)
    assert raw["model"].keys() == Model.model_fields.keys()
    assert raw["input"].keys() == config.Input.model_fields.keys()
    assert raw.keys() == config.Params.model_fields.keys()
    model = memory.network(params.model)
    assert params.input.stride % model.step == 0
    assert all(side % model.step == 0 for side in params.train.crop)
    assert model.step == params.model.step


def test_the_presets():
    assert {path.stem for path in PRESETS} == {
        "demo-cpu", "one-gpu", "resnet50-os16", "resnet101-os16", "resnet50-os8", "resnet101-os8", "dinov2-small-frozen",
        "dinov2-small", "edge",
    }  # fmt: skip
    root = Path(__file__).parents[2]
    assert config.load(root / "presets/demo-cpu.yaml") == config.load(root / "params.yaml"), "keep the two the same"


def test_memory_grows_as_it_must():
    """A frozen encoder keeps no activations, twice the pixels twice as many; a weight that trains costs 20 bytes."""
    model = Model(architecture="FPN", encoder="resnet10t", weights=None)
    one = memory.activations(model, 4, (64, 64))
    two = memory.activations(model, 4, (64, 128))
    assert two.encoder == pytest.approx(2 * one.encoder, rel=0.02)
    assert memory.activations(model.model_copy(update={"freeze": True}), 4, (64, 64)).encoder == 0
    net = memory.network(model, 4)
    n = sum(p.numel() for p in net.parameters())
    assert memory.fixed(net) == pytest.approx(20 * n, rel=0.02)
