"""Neither runtime reports home: each leaves an id and a queue of events below HOME where it would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.live_server import ROOT

SESSION = """
import sys
from pathlib import Path

import numpy as np

from export.bundle.manifest import Option
from export.runtime import sessions
from tests.support import tiny_onnx

option = Option(runtime=sys.argv[1], device="cpu", precision="fp32")
session = sessions.open_session(option, tiny_onnx.model(), threads=1, long_side=64, stride=16)
session.run(np.zeros((1, 16, 16, 3), np.uint8))
"""
IMPORTS = """
import importlib, json, os, sys

environment, names = dict(os.environ), set(sys.modules)
importlib.import_module(sys.argv[1])
stubs = [name for name in set(sys.modules) - names if sys.modules[name] is None]
print(json.dumps([dict(os.environ) == environment, stubs, sorted({"onnxruntime", "openvino"} & set(sys.modules))]))
"""


def fresh(home: Path, program: str, argument: str) -> str:
    """What the program prints in a process that has `home` and none of the variables that silence the runtimes."""
    quiet = ("CI", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY")
    environment = {k: v for k, v in os.environ.items() if k not in quiet and not k.startswith("XDG_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, argument]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_session_leaves_nothing_at_home(tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    fresh(tmp_path, SESSION, runtime)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "module", ["export", "export.bundle.bundle", "export.runtime.runtime", "export.tools.predict", "export.quantize"]
)
def test_importing_changes_nothing_in_the_process(tmp_path: Path, module: str) -> None:
    """No variable, no stub in sys.modules, and no runtime either: `turn_off` and the import come with the first session."""
    assert fresh(tmp_path, IMPORTS, module).strip() == "[true, [], []]"
