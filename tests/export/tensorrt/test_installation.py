"""export.tensorrt.installation: which of TensorRT's modules is taken, and why none."""

import json
from pathlib import Path

import pytest

from export.tensorrt import installation
from export.tensorrt.installation import EngineError


def test_without_a_module_each_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installed package whose libraries are missing fails like this; the next one is tried."""
    broken = tmp_path / "tensorrt_of_tests"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installation, "MODULES", ("tensorrt_of_tests", "no_such_module"))
    with pytest.raises(EngineError, match=r"libnvinfer\.so\.11.*No module named 'no_such_module'.*extra `gpu`"):
        installation.load()
    monkeypatch.setattr(installation, "MODULES", ("tensorrt_of_tests", "json"))
    assert installation.load() is json
