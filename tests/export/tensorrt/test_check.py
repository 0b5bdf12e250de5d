"""export.tensorrt.check: what the command says where there is no card."""

from pathlib import Path

import pytest

from export.tensorrt import installation
from tests.support import tiny_onnx
from tests.support.command_line import marginalia


def test_command_without_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_onnx.write(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    nothing = installation.Installation(
        cards=(), modules={}, looked_for={"CUDA driver libcuda.so.1": "not found: [no such file]"}
    )
    monkeypatch.setattr(installation, "look", lambda: nothing)
    assert marginalia("engines", str(made.folder)) == 1
    said = capsys.readouterr().err
    assert "CUDA driver libcuda.so.1: not found: [no such file]" in said
    assert "no card present" in said
    assert marginalia("engines", str(made.folder), "--precision", "fp16") == 1
    assert "model.fp16.onnx: not in this bundle; it has fp32, tf32" in capsys.readouterr().err
    assert marginalia("engines", str(tmp_path / "none")) == 1
    assert "no bundle folder here" in capsys.readouterr().err
    assert marginalia("engines", str(made.folder), "--max-batch", "0") == 2
    assert not (tmp_path / "reports").exists()
