"""Every stage ends one way: what it tells, where it tells it, and with which exit code."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.table import Table

from pipeline import config, stage
from pipeline.stage import EXTRAS, Exit, Result
from tests.support import tiny_project

ROOT = Path(__file__).parents[2]
PACKAGES = ("marginalia", "pipeline", "training", "export", "serving")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def raising(error: BaseException) -> Result:
    raise error


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!;~ ]", line)[0].lower() for line in requirements}


def test_a_stage_gets_the_settings_and_its_result_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_project.write_params(tmp_path, evaluate={"batch": 3})

    def count(params, dump):
        table = Table("dump", "batch")
        table.add_row(dump, str(params.evaluate.batch))
        return Result((table, "one [line] :smile:"), ("look at it",))

    assert stage.run("count", count, "spring") is Exit.DONE
    told = capsys.readouterr()
    assert re.search(r"spring *│ 3", told.out)
    assert "one [line] :smile:" in told.out
    assert re.search(r"^count: \d+\.\d s$", told.out, re.M)
    assert told.err == "marginalia: warning: look at it\n"


def test_every_wrong_setting_is_a_line_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert stage.run("never", raising) is Exit.FAILED
    assert (
        capsys.readouterr().err
        == "marginalia: params.yaml: not found; run from the project's folder or pass --params\n"
    )
    with pytest.raises(config.ConfigError):
        tiny_project.write_params(tmp_path, evaluate={"batch": 0, "bootstrap": 0})
    assert stage.run("never", raising) is Exit.FAILED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("marginalia: params.yaml: evaluate.b") for line in lines)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a.png: is empty; send it again"), 1, "a.png: is empty; send it again"),
        (RuntimeError("the card is full"), 1, "the card is full"),
        (FileNotFoundError(2, "No such file or directory", "x.npz"), 1, "[Errno 2] No such file or directory: 'x.npz'"),
        (ValueError(), 1, "ValueError()"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx.helper"), 1,
         "onnx.helper: not installed; pip install 'marginalia-seg[train]'"),
        (ModuleNotFoundError("No module named 'bentoml'", name="bentoml"), 1,
         "bentoml: not installed; pip install 'marginalia-seg[serve]'"),
        (stage.Interrupted("stopped at step 7; the same command resumes"), 75,
         "stopped at step 7; the same command resumes"),
        (KeyboardInterrupt(), 75, "interrupted; the same command starts again"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_an_exit_code(error, code, line, capsys):
    assert stage.attempt(lambda: raising(error)) == code
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"marginalia: {line}\n")


def test_a_refusal_is_told_after_the_table(capsys):
    assert stage.attempt(lambda: Result(("the table",), (), ("mIoU fell",), Exit.REFUSED)) == 3
    assert capsys.readouterr() == ("the table\n", "marginalia: mIoU fell\n")


def test_a_record_takes_the_place_of_the_table(capsys):
    assert stage.attempt(lambda: Result(("the table",), record={"b": 1, "a": [None]}, as_json=True)) == 0
    assert capsys.readouterr().out == '{\n  "a": [\n    null\n  ],\n  "b": 1\n}\n'


@pytest.mark.parametrize("name", ["pipeline.ingest.check", "a_module_of_nobody"])
def test_a_module_that_no_extra_brings_keeps_its_traceback(name):
    with pytest.raises(ModuleNotFoundError):
        stage.attempt(lambda: raising(ModuleNotFoundError(f"No module named {name!r}", name=name)))


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        stage.attempt(lambda: raising(KeyError("x")))


def test_development_mode_shows_where_an_error_came_from():
    code = "from pipeline import stage; raise SystemExit(stage.attempt(lambda: int('x')))"
    for options, traceback in (((), False), (("-X", "dev"), True)):
        done = subprocess.run(
            [sys.executable, *options, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == traceback
        assert done.stderr.endswith("marginalia: invalid literal for int() with base 10: 'x'\n")


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"].keys() - {"dev", "docs"}))
def test_an_extra_is_known_by_the_modules_that_it_brings(extra):
    modules = importlib.metadata.packages_distributions()
    for wanted in distributions(PROJECT["optional-dependencies"][extra]) - {"marginalia-seg"}:
        brought = {name for name, of in modules.items() if wanted in {d.lower().replace("_", "-") for d in of}}
        if brought:
            assert brought & set(EXTRAS[extra]), f"{wanted} of [{extra}]"


def test_every_import_is_of_the_base_or_of_an_extra():
    modules = importlib.metadata.packages_distributions()
    base = {name for name, of in modules.items() if distributions(PROJECT["dependencies"]) & {d.lower() for d in of}}
    known = {name for names in EXTRAS.values() for name in names} | base | {"pydantic_core"} | set(PACKAGES)
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                    assert name in known, f"{file.relative_to(ROOT)} imports {name}, which no extra of EXTRAS brings"
