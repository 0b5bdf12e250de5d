"""Every preset is an overlay of params.yaml that composes and builds; the memory that their comments promise."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from benchmarks import memory
from pipeline import config
from pipeline.config import presets
from tests.support import tiny_settings

BASE = tiny_settings.FILE


def leaves(settings: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{section}{key}.")
        else:
            yield section + key, value


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_composes_and_builds(name):
    text = presets.compose(name, BASE)
    params = config.parse(text)
    assert params == config.Params.model_validate(config.merge(tiny_settings.SHIPPED, overlay(name)))
    assert text.count("#") == BASE.read_text().count("#"), "params.yaml's comments stay"
    model = memory.network(params.model)
    assert params.input.stride % model.step == 0
    assert all(side % model.step == 0 for side in params.train.crop)
    assert model.step == params.model.step


def overlay(name: str) -> dict[str, Any]:
    return yaml.safe_load(presets.read(name))


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_holds_only_what_differs_and_says_what_it_is_for(name):
    shipped = dict(leaves(tiny_settings.SHIPPED))
    for key, value in leaves(overlay(name)):
        assert key in shipped, key
        assert value != shipped[key], f"{key} is what params.yaml has"
    head = presets.read(name).split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"Use: marginalia preset {name} --write" in head.replace("\n# ", " ")
    assert "Memory:" in head


def test_the_presets():
    assert set(presets.names()) == {
        "demo-cpu", "one-gpu", "resnet50-os16", "resnet101-os16", "resnet50-os8", "resnet101-os8", "dinov2-small-frozen",
        "dinov2-small", "edge",
    }  # fmt: skip
    assert overlay("demo-cpu") == {}, "params.yaml as shipped is the demo"


def test_a_preset_changes_the_projects_own_settings_and_nothing_beside_them(tmp_path):
    mine = BASE.read_text().replace("  seed: 0\n  val: 0.1", "  seed: 7  # mine\n  val: 0.1")
    (tmp_path / "params.yaml").write_text(mine)
    composed = presets.compose("resnet101-os8", tmp_path / "params.yaml")
    assert "  seed: 7  # mine\n" in composed
    changed = [new for old, new in zip(mine.splitlines(), composed.splitlines(), strict=True) if old != new]
    assert len(changed) == len(list(leaves(overlay("resnet101-os8"))))


def test_a_preset_that_does_not_fit_the_projects_settings_is_refused(tmp_path):
    tiny_settings.write(tmp_path / "params.yaml", train={"accumulate": 3, "batch_labelled": 6, "batch_unlabelled": 6})
    with pytest.raises(config.ConfigError, match="accumulate 3 does not divide batch_labelled 8"):
        presets.compose("one-gpu", tmp_path / "params.yaml")


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(config.ConfigError, match="no preset 'resnet50'; did you mean 'resnet50-os8'"):
        presets.compose("resnet50", BASE)
    with pytest.raises(config.ConfigError, match="choose demo-cpu, dinov2-small"):
        presets.compose("../params", BASE)


def test_memory_grows_as_it_must():
    """A frozen encoder keeps no activations, twice the pixels twice as many; a weight that trains costs 20 bytes."""
    model = tiny_settings.model(architecture="FPN", encoder="resnet10t", weights=None)
    one = memory.activations(model, 4, (64, 64))
    two = memory.activations(model, 4, (64, 128))
    assert two.encoder == pytest.approx(2 * one.encoder, rel=0.02)
    assert memory.activations(model.model_copy(update={"freeze": True}), 4, (64, 64)).encoder == 0
    net = memory.network(model, 4)
    n = sum(p.numel() for p in net.parameters())
    assert memory.fixed(net) == pytest.approx(20 * n, rel=0.02)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_listed_with_one_sentence(name):
    """Wherever the lines of its comment end."""
    purpose = presets.purpose(name)
    assert 20 < len(purpose) < 130
    assert not set(purpose) & {"#", "\n"}
    assert "Use:" not in purpose
