"""Commands in a folder that somebody sent: none of its files is imported, whatever library's name it has."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import live_server, tiny_onnx, tiny_project, tiny_source
from tests.support.image_files import save

TRAP = "open(__file__ + '.was_run', 'w').close()\nraise SystemExit('code was run')\n"
# All that Python brings, what we need, and our own: whichever a command imports first.
LIBRARIES = (
    "numpy",
    "typer",
    "click",
    "rich",
    "pydantic",
    "yaml",
    "PIL",
    "onnxruntime",
    "openvino",
    "pyarrow",
    "torch",
)
OWN = ("pipeline", "export", "training", "serving")
CONSOLE_SCRIPT = [str(Path(sys.executable).with_name("marginalia"))]
MODULE = [sys.executable, "-m", "marginalia"]
STANDARD = sorted(sys.stdlib_module_names)


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """A folder with a bundle, a settings file and a trap for each library."""
    tiny_onnx.write(tmp_path / "bundle")
    tiny_source.write_source(tmp_path / "source", {"a": 3, "b": 2, "c": 2})
    tiny_source.write_project(tmp_path, tmp_path / "source")
    for name in (*STANDARD, *LIBRARIES):
        (tmp_path / f"{name}.py").write_text(TRAP)
    for name in OWN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(TRAP)
    return tmp_path


def was_run(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.rglob("*.was_run"))


def run(command: list[str], *words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [*command, *words], cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert was_run(folder) == []
    return done


@pytest.mark.parametrize("command", [CONSOLE_SCRIPT, MODULE], ids=["script", "module"])
def test_a_bundle_that_somebody_sent(sent: Path, command: list[str]) -> None:
    done = run(command, "verify", "bundle", folder=sent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "every checksum holds" in done.stdout


@pytest.mark.parametrize("command", [CONSOLE_SCRIPT, MODULE], ids=["script", "module"])
def test_stages(sent: Path, command: list[str]) -> None:
    for words in (("stage", "pull"), ("stage", "ingest", "base")):
        done = run(command, *words, folder=sent)
        assert (done.returncode, done.stderr) == (0, "")


OWN_NETWORK = """
import my_layers

def net(n_classes):
    return my_layers.Net(n_classes)
"""
LAYERS = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, n_classes):
        super().__init__(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, n_classes, 1))
"""


@pytest.mark.slow
def test_a_users_own_network_is_loaded_from_the_project_by_training(tmp_path: Path) -> None:
    """With what it imports itself; the settings name it. Nothing else of the folder is imported."""
    tiny_project.write_data(tmp_path, tiny_project.PARTS)
    train = {"method": "supervised", "steps": 2, "batch_labelled": 2, "crop": [64, 64], "val_every": 2}
    model = {"architecture": "my_nets:net", "weights": None}
    params = tiny_project.write_params(tmp_path, train=train)
    tiny_project.write_params(tmp_path, train=train, model=params.model.model_dump() | model)
    (tmp_path / "my_nets.py").write_text(OWN_NETWORK)
    (tmp_path / "my_layers.py").write_text(LAYERS)
    (tmp_path / "my_other.py").write_text(TRAP)
    tiny_onnx.write(tmp_path / "bundle")

    for command, words in ((MODULE, ("stage", "train")), (CONSOLE_SCRIPT, ("stage", "evaluate"))):
        done = run(command, *words, folder=tmp_path)
        assert done.returncode == 0, done.stderr

    for name in ("my_nets", "my_layers"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    assert run(CONSOLE_SCRIPT, "verify", "bundle", folder=tmp_path).returncode == 0


@pytest.mark.slow
def test_the_service(sent: Path) -> None:
    """BentoML and the worker that it starts look for modules where they work; the worker's relative paths still hold."""
    image = save(Image.fromarray(np.zeros((8, 8, 3), np.uint8)))
    raw = {"Content-Type": "application/octet-stream"}
    settings = {"PYTHONPATH": "", "MARGINALIA_STATISTICS": "statistics", "MARGINALIA_STATISTICS_EVERY_S": "0.2"}
    server = live_server.start(settings, ["-m", "marginalia", "serve", "--port", "{port}"], cwd=sent)
    try:
        with server.client() as http:
            assert http.post("/v1/segment", content=image, headers=raw).status_code == 200
        live_server.until(lambda: any(sent.glob("statistics/*")))
    finally:
        server.stop()
    assert was_run(sent) == []
