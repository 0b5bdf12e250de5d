"""Which edits start a killed training anew: those that can change its numbers, and no others."""

import shutil
from pathlib import Path

import pytest

from training.engine import source_identity

ROOT = Path(__file__).parents[3]


class Copied:
    """A copy of the repository's rooms, to be edited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for room in ("pipeline", "training"):
            shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
        self.digest = source_identity.digest(repository=folder)

    def changed_by(self, file: str, old: str, new: str) -> bool:
        """Whether an edit of one file changes the identity; the file is put back."""
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        after = source_identity.digest(repository=self.folder)
        path.write_text(text, encoding="utf-8")
        return after != self.digest


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Copied:
    return Copied(tmp_path_factory.mktemp("repository"))


def test_the_same_sources_have_the_same_identity_wherever_they_stand(copied):
    assert copied.digest == source_identity.digest()


@pytest.mark.parametrize(
    "file",
    [
        "pipeline/imaging/resize.py", "pipeline/imaging/decode.py", "pipeline/storage/shards.py", "training/train.py",
        "training/inference.py", "training/engine/trainer.py", "training/methods/step.py", "training/methods/s4mc_triton.py",
        "training/models/pretrained.py",
    ],
)  # fmt: skip
def test_an_edit_of_what_trains_changes_the_identity(copied, file):
    assert copied.changed_by(file, "\nimport ", "\nCHANGED = 1\nimport ")


@pytest.mark.parametrize(
    "file",
    [
        "training/reports/curves.py", "training/reports/training.py", "training/evaluate.py", "training/predict.py",
        "pipeline/console.py", "pipeline/stage.py", "pipeline/config/train.py", "pipeline/imaging/polygonize.py",
        "pipeline/ingest/split.py",
    ],
)  # fmt: skip
def test_an_edit_of_what_reports_shows_or_sets_does_not(copied, file):
    assert not copied.changed_by(file, "\nfrom ", "\nCHANGED = 1\nfrom ")


def test_comments_docstrings_and_layout_do_not_count(copied):
    file = "pipeline/imaging/resize.py"
    text = (copied.folder / file).read_text(encoding="utf-8")
    assert not copied.changed_by(file, "\nimport ", "\n\n# A comment.\nimport ")
    assert not copied.changed_by(file, text[:30], text[:3] + "Said in other words: " + text[3:30])


def test_a_users_own_network_counts_with_what_it_imports_in_the_project(tmp_path):
    (tmp_path / "my_net.py").write_text("import torch\n\ndef Net(n):\n    from my_blocks import deep\n")
    (tmp_path / "my_blocks").mkdir()
    (tmp_path / "my_blocks/__init__.py").write_text("")
    (tmp_path / "my_blocks/deep.py").write_text("WIDTH = 8\n")
    before = source_identity.digest("my_net:Net", project=tmp_path)
    assert before != source_identity.digest("FPN", project=tmp_path)
    (tmp_path / "my_blocks/deep.py").write_text("WIDTH = 16\n")
    assert source_identity.digest("my_net:Net", project=tmp_path) != before
    (tmp_path / "my_blocks/deep.py").write_text("WIDTH = 8  # a comment\n")
    assert source_identity.digest("my_net:Net", project=tmp_path) == before


def test_imports_for_type_checkers_do_not_count(tmp_path):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {}\n"
    (tmp_path / "net.py").write_text(text.format("shown"))
    (tmp_path / "shown.py").write_text("A = 1\n")
    assert set(source_identity.sources(["net"], [tmp_path])) == {"net"}
