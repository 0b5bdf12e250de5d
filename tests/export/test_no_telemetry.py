"""Neither runtime reports home: each leaves an id and a queue of events below HOME where it would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.live_server import ROOT

PROGRAM = """
import numpy as np
from export.runtime import sessions
from tests.support import tiny_onnx
session = sessions.ort.InferenceSession(tiny_onnx.model(), providers=["CPUExecutionProvider"])
session.run(None, {"image": np.zeros((1, 4, 4, 3), np.uint8)})
"""


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_nothing_is_left_at_home(tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    quiet = ("CI", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY")  # they keep quiet where they see one of these
    environment = {k: v for k, v in os.environ.items() if k not in quiet and not k.startswith("XDG_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    program = PROGRAM if runtime == "onnxruntime" else "import export, openvino; openvino.Core()"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
