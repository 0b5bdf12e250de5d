"""The command line as a whole: quick to start, the same options everywhere, and one command for each stage."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import marginalia as package
from marginalia import cli, stages
from tests.support import tiny_gate, tiny_onnx
from tests.support.command_line import marginalia

ROOT = Path(__file__).parents[2]
# What commands do their work with, but not what Typer itself needs: to print a help text, none of it is imported.
HEAVY = ("numpy", "torch", "yaml", "PIL", "pyarrow", "onnxruntime", "bentoml", "matplotlib", "dvc")


def commands(group: TyperGroup, *words: str) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, *words, name)
        else:
            yield (*words, name), command


ALL = dict(commands(get_command(cli.app)))


def test_the_version_is_the_distributions(capsys):
    assert marginalia("--version") == 0
    assert capsys.readouterr().out == f"marginalia {version('marginalia-seg')}\n"
    assert package.__version__ == version("marginalia-seg")


@pytest.mark.parametrize("words", [("--help",), ("stage", "--help"), ("stage", "train", "--help"), ("serve", "--help")])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys; from marginalia import cli\n"
        "try: cli.app(sys.argv[1:])\n"
        f"except SystemExit: print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_stage_of_dvc_yaml_has_its_command_and_no_other_is_there():
    listed = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert {words[-1] for words in ALL if words[0] == "stage"} == set(listed)
    for name, body in listed.items():
        call = f"marginalia stage {name}"
        assert body.get("do", body)["cmd"] in (call, f"{call} ${{key}}", f"${{launch}} -m {call}")


def test_every_stage_runs_under_its_own_name(monkeypatch):
    ran = []
    monkeypatch.setattr(stages.stage, "run", lambda name, *_, **__: ran.append(name) or stages.Exit.DONE)
    names = [words[-1] for words in ALL if words[0] == "stage"]
    for name in names:
        assert marginalia("stage", name, *(["base"] if name == "ingest" else [])) == 0
    assert ran == names


@pytest.mark.parametrize("words", sorted(ALL), ids=" ".join)
def test_every_command_says_what_it_does_and_offers_json_or_is_a_stage(words):
    command = ALL[words]
    assert command.help
    options = {name for option in command.params for name in option.opts}
    without = words[0] == "stage" or words in {("serve",), ("data-report",)}
    assert ("--json" in options) != without


def test_json_is_all_of_standard_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tiny_onnx.write(tmp_path / "bundle").folder
    assert marginalia("verify", folder, "--json") == 0
    assert [c["name"] for c in json.loads(capsys.readouterr().out)["classes"]] == ["dark", "red", "green", "blue"]
    assert marginalia("history", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"champions": [], "current": None}
    assert marginalia("onnx", folder, "-o", "whole.onnx", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == "whole.onnx"
    assert marginalia("preset", "--json") == 0
    assert "edge" in json.loads(capsys.readouterr().out)


def test_the_report_is_json_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_gate.write_run(tmp_path, "one", tiny_gate.counts((0.9, 0.8, 0.7)))
    assert marginalia("report", "--json") == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "marginalia: reports/gate.json is not there yet; run `dvc repro gate`\n")


def test_a_preset_is_written_on_demand_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = (ROOT / "params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(shipped, encoding="utf-8")
    assert marginalia("preset", "edge") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) != yaml.safe_load(shipped)
    assert Path("params.yaml").read_text(encoding="utf-8") == shipped
    assert marginalia("preset", "edge", "--write") == 0
    assert Path("params.yaml").read_text(encoding="utf-8") == printed
    assert marginalia("preset", "edgy") == 1
    assert "did you mean 'edge'?" in capsys.readouterr().err


# What each command needs beyond the base, and the line that it ends with where that is missing.
MISSING = {
    ("stage", "ingest", "base"): ("pyarrow", "train"),
    ("stage", "index"): ("pyarrow", "train"),
    ("stage", "split"): ("pyarrow", "train"),
    ("stage", "screen"): ("pyarrow", "train"),
    ("stage", "train"): ("torch", "train"),
    ("stage", "evaluate"): ("torch", "train"),
    ("stage", "export"): ("torch", "train"),
    ("stage", "parity"): ("torch", "train"),
    ("stage", "predict"): ("torch", "train"),
    ("stage", "suspects"): ("torch", "train"),
    ("stage", "drift"): ("pyarrow", "train"),
    ("stage", "rank"): ("pyarrow", "train"),
    ("stage", "data_report"): ("pyarrow", "train"),
    ("add-dump", "x.zip"): ("pyarrow", "train"),
    ("import-labels", "x.zip"): ("pyarrow", "train"),
    ("export-labels", "--format", "coco", "-o", "x"): ("pyarrow", "train"),
    ("data-report",): ("pyarrow", "train"),
    ("compare",): ("matplotlib", "train"),
    ("headroom",): ("matplotlib", "train"),
    ("rescore",): ("torch", "train"),
    ("preset", "edge"): ("ruamel", "train"),
    ("onnx", "x", "-o", "y"): ("onnx", "train"),
    ("bento", "x"): ("bentoml", "serve"),
    ("serve",): ("bentoml_cli", "serve"),
}


@pytest.mark.parametrize("words", MISSING, ids=" ".join)
def test_a_missing_extra_is_one_line(words, tmp_path):
    module, extra = MISSING[words]
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"  # what `import` then raises is what it raises where it is absent
        "from marginalia import cli; cli.app(sys.argv[1:])"
    )
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}", *words],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"marginalia: {module}")
    assert lines[0].endswith(f": not installed; pip install 'marginalia-seg[{extra}]'")
