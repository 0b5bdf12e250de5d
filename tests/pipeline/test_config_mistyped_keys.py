"""A mistyped key in params.yaml stops every data stage before any work, with the nearest key suggested."""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

from tests.support import tiny_source
from tests.support.command_line import marginalia

STAGES: dict[str, Callable[[], int]] = {
    "pull": lambda: marginalia("stage", "pull"),
    "ingest": lambda: marginalia("stage", "ingest", "base"),
    "index": lambda: marginalia("stage", "index"),
    "split": lambda: marginalia("stage", "split"),
    "add-dump": lambda: marginalia("add-dump", "."),
}
WRONG = {
    "ingest: {max_pixel: 5}": ("ingest.max_pixel", "'max_pixels'"),
    "data: {lists: {labeled: a.txt}}": ("data.lists.labeled", "'labelled'"),
    "splitt: {seed: 1}": ("splitt", "'split'"),
    "split: {val: 1.5}": ("split.val", "1.5"),
    "data: [1": ("params.yaml", "not valid YAML"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("text", WRONG)
def test_refused_before_any_work(tmp_path: Path, stage: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_source.write_project(tmp_path, tmp_path)
    (tmp_path / "params.yaml").write_text(text)
    with chdir(tmp_path):
        assert STAGES[stage]() == 1
    error = capsys.readouterr().err
    assert all(part in error for part in WRONG[text]), error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dumps.yaml", "params.yaml"]


def test_another_params_file_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chdir(tmp_path):
        assert marginalia("stage", "pull", "--params", "mine.yaml") == 1
    assert "mine.yaml: not found" in capsys.readouterr().err
