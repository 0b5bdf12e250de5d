"""A project of labels for each test: written once, copied, and entered."""

import shutil
from pathlib import Path

import pytest

from tests.support.label_project import write_label_project


@pytest.fixture(scope="session")
def label_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_label_project(tmp_path_factory.mktemp("labels"))


@pytest.fixture
def root(label_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, which is the working folder."""
    shutil.copytree(label_project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"
