"""Kill -9 at random moments, writes of the checkpoint among them (there is one after every step)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests/support/training/killed_training.py"


def run(folder: Path, kills: int) -> dict[str, torch.Tensor]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder / "work"), str(folder / "out.pt"), str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) == kills
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_twenty_kills_leave_the_weights_and_the_curve_of_an_undisturbed_run(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    whole, killed = run(tmp_path / "a", 0), run(tmp_path / "b", 20)
    assert set(whole) == set(killed)
    for name, value in whole.items():
        assert torch.equal(value, killed[name]), name
    left = [path.name for path in (tmp_path / "b/work").iterdir()]
    assert "checkpoint.pt" in left
