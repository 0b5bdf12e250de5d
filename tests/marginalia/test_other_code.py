"""A checkout with other code than what runs says so; everything else is silent."""

import shutil
import subprocess
import sys
from pathlib import Path

from marginalia import other_code

ROOT = Path(__file__).parents[2]


def test_only_other_code_is_reported(tmp_path: Path) -> None:
    assert other_code.warning(tmp_path) is None
    assert other_code.warning(ROOT) is None
    for room in ("marginalia", "pipeline"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    assert other_code.warning(tmp_path) is None
    with (tmp_path / "pipeline/paths.py").open("a") as file:
        file.write("EDITED = 1\n")
    said = other_code.warning(tmp_path)
    assert said is not None
    assert "pipeline/paths.py" in said
    assert other_code.warning(tmp_path, tmp_path) is None


def test_a_stage_says_it(tmp_path: Path) -> None:
    (tmp_path / "marginalia").mkdir()
    (tmp_path / "marginalia/__main__.py").write_text("EDITED = 1\n")
    script = Path(sys.executable).with_name("marginalia")
    done = subprocess.run([script, "stage", "pull"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "marginalia: warning: the code of " in done.stderr
    assert "PYTHONPATH=." in done.stderr
