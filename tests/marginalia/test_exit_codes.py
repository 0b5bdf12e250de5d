"""Every exit code, from a real process: 0 done, 1 failed, 2 usage, 3 refused, 75 interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.storage import atomic
from tests.support import tiny_gate, tiny_onnx, tiny_project, tiny_source

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "marginalia"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def marginalia(*words: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240
    )


def one_line(text: str) -> bool:
    return text.startswith("marginalia: ") and text.endswith("\n") and text.count("\n") == 1


def test_0_what_went_well(tmp_path: Path):
    bundle = tiny_onnx.write(tmp_path / "bundle").folder
    done = marginalia("verify", bundle, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    tiny_source.write_source(tmp_path / "source", {"a": 3, "b": 2, "c": 2})
    tiny_source.write_project(tmp_path, tmp_path / "source")
    done = marginalia("stage", "pull", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "data/pulled/base.tar").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("stage", "pull"),
        ("stage", "ingest", "spring"),
        ("verify", "nowhere"),
        ("report",),
        ("rollback",),
        ("drift", "--serving", "nowhere.json"),
        ("import-labels", "nowhere.zip"),
        ("predict", "nowhere", "nothing.png", "-o", "out"),
    ],
)
def test_1_what_cannot_be_done_is_one_line(tmp_path: Path, words: tuple[str, ...]):
    done = marginalia(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr), done.stderr


@pytest.mark.parametrize(
    "words", [("stage",), ("stage", "dance"), ("stage", "ingest"), ("verify",), ("export-labels", "--format", "docx")]
)
def test_2_what_nobody_can_mean(tmp_path: Path, words: tuple[str, ...]):
    done = marginalia(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage: marginalia" in done.stderr + done.stdout


def test_3_a_refused_challenger(tmp_path: Path):
    tiny_project.write_params(tmp_path)
    tiny_gate.write_run(tmp_path, "one", tiny_gate.counts((0.9, 0.8, 0.7)), passed=False)
    done = marginalia("stage", "gate", cwd=tmp_path)
    assert done.returncode == 3
    assert "gate: refused" in done.stdout
    assert one_line(done.stderr), done.stderr
    assert atomic.read_json(tmp_path / "reports/gate.json")["verdict"] == "refused"


def test_3_a_dump_that_is_held_back(tmp_path: Path):
    parts = [("labelled", "base", "a", 8), *(("unlabelled", "base", group, 8) for group in "bcd")]
    tiny_project.write_data(tmp_path, [*parts, ("unlabelled", "dusk", "n", 10)], dark=["dusk"])
    tiny_project.write_params(tmp_path, pool={"permutations": 199, "policy": "hold"})
    done = marginalia("stage", "screen", cwd=tmp_path)
    assert done.returncode == 3
    assert one_line(done.stderr), done.stderr
    assert "held back by pool.policy: hold: dusk" in done.stderr


def test_75_an_interrupt_at_the_keyboard(tmp_path: Path):
    tiny_project.write_params(tmp_path)
    os.mkfifo(tmp_path / "statistics.json")  # reading it waits for a writer
    process = subprocess.Popen(
        [*COMMAND, "drift", "--serving", "statistics.json"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    writer = None
    while process.poll() is None and writer is None:
        with contextlib.suppress(OSError):  # there is no reader yet
            writer = os.open(tmp_path / "statistics.json", os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert one_line(err), err


@pytest.mark.slow
def test_75_a_training_that_is_told_to_stop(tmp_path: Path):
    tiny_project.write_data(tmp_path, tiny_project.PARTS)
    train = {
        "method": "supervised",
        "steps": 100_000,
        "checkpoint_every": 100_000,
        "batch_labelled": 2,
        "crop": [64, 64],
    }
    tiny_project.write_params(tmp_path, train=train)
    process = subprocess.Popen(
        [*COMMAND, "stage", "train"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    live = tmp_path / "reports/train/live/metrics.json"
    while process.poll() is None and not live.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (75, "")
    assert one_line(err), err
    assert "the same command resumes" in err
