"""What DVC itself says of the training after an edit: a picture's code costs no new training, the trainer's does."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def dvc(project: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=project, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's graph and code, and a training that counts as done, without its data."""
    project = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml", "dumps.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, project)
    for room in ("pipeline", "training", "export"):
        shutil.copytree(ROOT / room, project / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data/split/summary.json", "data/ingested/base/rows.parquet", "reports/screen.pass"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("{}")
    for name in ("models/student/train.json", "reports/train/live/metrics.json"):
        (project / name).parent.mkdir(parents=True)
        (project / name).write_text("{}")
    for name in ("history.jsonl", "train.json"):
        (project / "reports/train" / name).write_text("{}")
    dvc(project, "init", "-q", "--no-scm")
    dvc(project, "config", "core.analytics", "false")
    dvc(project, "commit", "-q", "-f", "train")
    return project


def edit(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("EDITED = 1\n")


def test_an_edit_of_what_draws_tells_or_sets_needs_no_new_training(project: Path) -> None:
    edited = [*(project / "training/reports").glob("*.py"), *(project / "pipeline/config").glob("*.py")]
    for path in (
        *edited,
        project / "pipeline/console.py",
        project / "pipeline/stage.py",
        project / "training/evaluate.py",
    ):
        edit(path)
    cache = project / "training/engine/__pycache__"
    cache.mkdir()
    (cache / "trainer.cpython-311.pyc").write_bytes(b"compiled")
    assert "up to date" in dvc(project, "status", "train")


def test_an_edit_of_what_trains_needs_one(project: Path) -> None:
    edit(project / "pipeline/imaging/resize.py")
    said = dvc(project, "status", "train")
    assert "pipeline/imaging" in said
    assert "training/engine" not in said
