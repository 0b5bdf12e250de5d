"""The provider that was asked for by name runs, or nothing does; and only one ONNX Runtime may be installed."""

import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from export.runtime import runtime
from serving.bento import run
from tests.support import tiny_onnx
from tests.support.live_server import ROOT


def cuda_works(opened: runtime.Runtime) -> bool:
    """Asked of ONNX Runtime itself, by creating a session and looking at what it got."""
    session = onnxruntime.InferenceSession(
        opened.bundle.read_model(), providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    return bool(session.get_providers()[0] == "CUDAExecutionProvider")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_by_name_runs_or_is_refused(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "b")
    opened = runtime.Runtime(made, provider="cpu")
    assert opened.provider == "cpu"
    if cuda_works(opened):
        assert runtime.Runtime(made, provider="cuda").provider == "cuda"
        assert runtime.Runtime(made, provider="auto").provider == "cuda"
        return
    with pytest.raises(runtime.ProviderError, match="CUDA was asked for"):
        runtime.Runtime(made, provider="cuda")
    assert runtime.Runtime(made, provider="auto").provider == "cpu"  # said, not hidden


def test_tensorrt_and_nonsense_are_refused(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "b")
    with pytest.raises(runtime.ProviderError, match="tensorrt"):
        runtime.Runtime(made, provider="tensorrt")
    with pytest.raises(runtime.ProviderError, match="choose cpu"):
        runtime.Runtime(made, provider="npu")  # type: ignore[arg-type]


def test_the_service_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_onnx.write(tmp_path / "b")
    monkeypatch.setenv("MARGINALIA_PROVIDER", "tensorrt")
    with pytest.raises(run.StartError, match="tensorrt"):
        run.prepare(made.folder)
    monkeypatch.setenv("MARGINALIA_PROVIDER", "cpu")
    assert run.prepare(made.folder).bundle == made.folder


def test_the_service_started_by_hand_does_not_start(tmp_path: Path) -> None:
    """`bentoml serve` ends with the reason, instead of a server that is never ready or a worker that dies for ever."""
    made = tiny_onnx.write(tmp_path / "b")
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MARGINALIA_", "BENTOML_"))}
    own |= {
        "MARGINALIA_BUNDLE": str(made.folder),
        "MARGINALIA_PROVIDER": "tensorrt",
        "BENTOML_HOME": str(tmp_path / "h"),
    }
    command = [sys.executable, "-m", "bentoml", "serve", "serving.bento.service:Marginalia", "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "marginalia: " in done.stderr
    assert "tensorrt" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_onnxruntimes_are_refused(tmp_path: Path) -> None:
    """Both distributions on the path, as pip leaves them; pip check says nothing."""
    for name in ("onnxruntime", "onnxruntime_gpu"):
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    made = tiny_onnx.write(tmp_path / "b")
    program = (
        "import sys\nsys.path.append(sys.argv[1])\nfrom export.bundle import bundle; from export.runtime import runtime\n"
        "try:\n    runtime.Runtime(bundle.open_bundle(sys.argv[2]), provider='cpu')\n"
        "except runtime.ProviderError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "site"), str(made.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "both installed" in done.stdout
