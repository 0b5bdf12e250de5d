"""params.yaml as it is shipped is complete and the one set of defaults; DVC tracks the values of the project's own file."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from pipeline import config
from pipeline.config import presets
from pipeline.config.load import SHIPPED
from pipeline.config.renamed import RENAMED
from tests.support import tiny_settings

ROOT = Path(__file__).parents[3]


def test_the_shipped_settings_are_the_repositorys() -> None:
    assert SHIPPED.read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert presets.names() == sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))


def test_no_setting_has_a_second_default() -> None:
    sections: list[type[BaseModel]] = [config.Params]
    while sections:
        section = sections.pop()
        for name, field in section.model_fields.items():
            assert field.is_required(), f"{section.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                sections.append(field.annotation)


@pytest.mark.parametrize(
    "key", ["launch", "train.seed", "train.s4mc.alpha", "data.lists.val", "parity.half.class_drop"]
)
def test_a_missing_key_is_refused_with_its_name_and_its_shipped_value(key: str) -> None:
    *sections, last = key.split(".")
    settings = copy.deepcopy(tiny_settings.SHIPPED)
    section = settings
    for name in sections:
        section = section[name]
    value = section.pop(last)
    file = Path("params.yaml")
    with pytest.raises(config.ConfigError) as told:
        config.parse(yaml.safe_dump(settings), file)
    assert str(told.value) == f"{file}: missing key '{key}'; add it, as shipped: {last}: {json.dumps(value)}"


def test_a_missing_section_is_refused_with_its_name() -> None:
    text = yaml.safe_dump({k: v for k, v in tiny_settings.SHIPPED.items() if k != "gate"})
    with pytest.raises(config.ConfigError, match="missing key 'gate'; add it with all its keys"):
        config.parse(text)


def test_a_projects_file_may_say_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump({"data": {"source": "voc", "path": "src"}, "train": {"s4mc": {"alpha": 0.3}}}))
    params = config.load(file)
    assert (params.data.source, params.data.path, params.train.s4mc.alpha) == ("voc", "src", 0.3)
    shipped = config.load(ROOT / "params.yaml")
    assert params.gate == shipped.gate
    assert params.train.s4mc.alpha_end == shipped.train.s4mc.alpha_end


OLD = {
    "preset": "paper", "streams": "v2", "corrmatch": "mended", "corrmatch_start": 0.85, "combine": ["j1", "j2"],
    "bar": "auto", "threshold": 0.95, "alpha": 0.4, "alpha_end": 0.0, "ohem_sure": 0.7, "lr": 0.001, "collapse_steps": 9,
}  # fmt: skip


def test_a_setting_of_an_earlier_version_is_refused_with_its_new_name(tmp_path: Path) -> None:
    tiny_settings.write(file := tmp_path / "params.yaml", train=OLD)
    with pytest.raises(config.ConfigError) as told:
        config.load(file)
    lines = str(told.value).splitlines()
    assert len(lines) == len(OLD)
    for sentence in (
        "train.alpha is now train.s4mc.alpha", "train.bar is now train.threshold_rule", "train.lr is now train.optimizer.lr",
        "train.corrmatch is now train.corrmatch.variant (mended: corrected)",
    ):  # fmt: skip
        assert f"{file}: {sentence}" in lines


def test_every_new_name_of_a_setting_exists() -> None:
    for new in RENAMED.values():
        value = tiny_settings.SHIPPED
        for part in new.partition(" ")[0].split("."):
            value = value[part]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {sorce: voc}", "params.yaml: unknown key 'data.sorce'; did you mean 'source'"),
        ("data: [1]", "params.yaml: data"),
        ("- 1", "expected sections"),
        ("data: {", "not valid YAML"),
    ],
)
def test_what_is_said_is_still_checked(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(config.ConfigError, match=message):
        config.load(file)
