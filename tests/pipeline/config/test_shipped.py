"""params.yaml as it is shipped: the one set of defaults, for projects that say only what differs."""

from pathlib import Path

import pytest
import yaml

from pipeline import config
from pipeline.config import presets
from pipeline.config.load import SHIPPED

ROOT = Path(__file__).parents[3]


def test_the_shipped_settings_are_the_repositorys() -> None:
    assert SHIPPED.read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert presets.names() == sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))


def test_a_key_that_is_left_out_has_its_shipped_value(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump({"data": {"source": "voc", "path": "src"}}))
    params = config.load(file)

    assert (params.data.source, params.data.path) == ("voc", "src")
    shipped = config.load(ROOT / "params.yaml")
    assert params.train == shipped.train
    assert params.data.classes == shipped.data.classes


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
