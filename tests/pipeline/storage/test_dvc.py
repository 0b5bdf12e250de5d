"""What DVC does to a champion's folder when it tracks it with links, as DVC advises for large data."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.bundle import bundle
from pipeline.storage import dvc
from serving.model import loader
from serving.settings import Settings
from tests.support import live_server, tiny_onnx


def run_dvc(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_a_champion_that_dvc_made_links_of_is_still_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    """`marginalia add-dump` tracks the champion, which the service opens anew at its next start."""
    monkeypatch.chdir(tmp_path)
    run_dvc("init", "-q", "--no-scm")
    run_dvc("config", "cache.type", link)
    folder = tiny_onnx.write(tmp_path / "champions/first/bundle").folder
    live_server.point(tmp_path / "champions", folder)
    before = bundle.open_bundle(folder)

    assert dvc.track([tmp_path / "champions/first"]) is None
    facts = [path.lstat() for path in folder.iterdir()]
    assert all(path.is_symlink() for path in folder.iterdir()) == (link == "symlink")
    assert all(fact.st_nlink > 1 for fact in facts) == (link == "hardlink")

    assert bundle.open_bundle(folder) == before
    opened = loader.open_runtime(Settings(champions=tmp_path / "champions/champion.json", provider="cpu", threads=1))
    assert opened.segment(np.full((8, 8, 3), (200, 30, 30), np.uint8)).label_HW.tolist() == [[1] * 8] * 8

    run_dvc("checkout", "-q", "--relink")
    assert bundle.open_bundle(folder) == before


def test_dvc_runs_no_code_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` looks there first."""
    monkeypatch.chdir(tmp_path)
    run_dvc("init", "-q", "--no-scm")
    for name in ("secrets", "numpy", "configobj"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the current folder was run')\n")
    (tmp_path / "dump.tar").write_bytes(b"images")
    assert dvc.track([Path("dump.tar")]) is None
    assert dvc.tracked(Path("dump.tar"))
