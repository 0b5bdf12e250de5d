"""The rooms' direction of import, and dvc.yaml's dependencies against what each stage really imports."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import tiny_settings

ROOT = Path(__file__).parents[2]
ROOMS = ("pipeline", "training", "export", "serving")
# What a stage uses and its numbers do not depend on: settings are tracked by value, paths by dvc.yaml itself.
UNTRACKED = ("pipeline.config", "pipeline.console", "pipeline.paths", "pipeline.stage")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
}


@functools.cache
def imports(name: str, *, types: bool = True) -> set[str]:
    """Modules of this repository that `name` imports, packages' __init__ included; `types`: also for type checkers alone."""
    return imported_by(ast.parse(MODULES[name].read_text(encoding="utf-8")), name, types=types)


def nodes(tree: ast.AST, types: bool) -> Iterator[ast.AST]:
    pending = [tree]
    while pending:
        node = pending.pop()
        if types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            pending += ast.iter_child_nodes(node)


def imported_by(tree: ast.AST, name: str, *, types: bool = True) -> set[str]:
    found: set[str] = set()
    for node in nodes(tree, types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            base = node.module or ""
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    found = {module for module in found if module in MODULES}
    parents = {module.rsplit(".", up)[0] for module in found for up in range(1, module.count(".") + 1)}
    return found | parents


def reached(*starts: str) -> set[str]:
    seen: set[str] = set()
    todo = list(starts)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += imports(name)
    return seen


RUNTIME = {name for name in MODULES if name.startswith(("export.bundle", "export.runtime"))}


def allowed(name: str) -> set[str]:
    """Rooms a module may import from: pipeline <- training <- export; pipeline <- export.{bundle,runtime} <- serving."""
    room = name.partition(".")[0]
    if room == "pipeline":
        return {"pipeline"}
    if room == "training":
        return {"pipeline", "training"}
    if room == "serving":
        return {"pipeline", "export", "serving"}
    return {"pipeline", "training", "export"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_forbidden_arrow(name):
    for other in imports(name):
        assert other.partition(".")[0] in allowed(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("serving") or n in RUNTIME))
def test_what_serves_reaches_no_torch_and_no_training(name):
    for module in reached(name):
        assert not module.startswith("training"), f"{name} reaches {module}"
        text = MODULES[module].read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (torch|pyarrow|dvc|onnx|matplotlib)\b", text, re.M), (
            f"{name} reaches {module}"
        )


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("pipeline")))
def test_the_pipeline_imports_no_torch_and_no_web_framework(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) (torch|starlette|bentoml)\b", text, re.M)


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}))
def test_a_folder_says_what_belongs_there_and_holds_at_most_14_modules(folder):
    held = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(held) <= 14, (
        f"{folder.relative_to(ROOT)} holds {len(held)} modules: give some of them a room of their own"
    )
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert said, f"{folder.relative_to(ROOT)}/__init__.py does not say what belongs there"


def test_no_file_reaches_itself_through_its_imports():
    """Imports that stand in a function or serve types alone count too; a package's own __init__ does not."""
    direct = {name: imports(name) - {name} for name in MODULES}
    rooms = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    for start in MODULES.keys() - rooms:
        seen, todo = set(), list(direct[start] - rooms)
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += direct[name] - rooms
        assert start not in seen, f"{start} is part of a circle of imports"


@functools.cache
def stages() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def command_of(line: str) -> ast.FunctionDef:
    """The function of marginalia/stages.py that a `cmd:` of dvc.yaml calls."""
    name = re.fullmatch(r"(?:\$\{launch\} -m )?marginalia stage (\w+)(?: \$\{key\})?", line).group(1)
    tree = ast.parse((ROOT / "marginalia/stages.py").read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


@functools.cache
def sources(stage: str) -> set[str]:
    """Files that a stage runs, but for packages' __init__ that hold their sentence alone."""
    seen: set[str] = set()
    todo = list(imported_by(command_of(body_of(stage)["cmd"]), stage))
    while todo:
        name = todo.pop()
        if name not in seen and not name.startswith(UNTRACKED):
            seen.add(name)
            todo += imports(name, types=False)
    paths = [MODULES[name] for name in seen]
    return {p.relative_to(ROOT).as_posix() for p in paths if p.name != "__init__.py" or not says_only(p)}


def says_only(path: Path) -> bool:
    return len(ast.parse(path.read_text(encoding="utf-8")).body) <= 1


def body_of(stage: str) -> dict:
    body = stages()[stage]
    return body.get("do", body)


def code(stage: str) -> list[str]:
    """Dependencies of a stage that are code."""
    return [path for path in body_of(stage)["deps"] if path.startswith(tuple(f"{room}/" for room in ROOMS))]


@pytest.mark.parametrize("stage", sorted(stages()))
def test_a_stage_depends_on_all_the_code_that_it_imports_and_on_nothing_beside_it(stage):
    for path in code(stage):
        assert (ROOT / path).exists(), f"dvc.yaml {stage}: no {path}"
    for source in sources(stage):
        assert any(source == path or source.startswith(f"{path}/") for path in code(stage)), (
            f"dvc.yaml {stage}: {source}"
        )
    for path in code(stage):
        used = [source for source in sources(stage) if source == path or source.startswith(f"{path}/")]
        assert used, f"dvc.yaml {stage}: {path} is not imported"


def test_what_only_draws_tells_or_sets_is_no_dependency_of_the_training():
    for path in code("train"):
        assert "report" not in path
        assert not f"{path}/".startswith(("pipeline/config", "pipeline/console", "marginalia"))
    assert not any("matplotlib" in (ROOT / source).read_text(encoding="utf-8") for source in sources("train"))


@pytest.mark.parametrize("stage", sorted(stages()))
def test_a_stage_names_only_parameters_that_exist(stage):
    body = stages()[stage]
    known = tiny_settings.params().model_dump()
    for item in body.get("do", body).get("params", []):
        keys = next(iter(item.values())) if isinstance(item, dict) else [item]
        if isinstance(item, dict) and "dumps.yaml" in item:
            continue
        for key in keys:
            section = known
            for part in key.split("."):
                assert part in section, f"dvc.yaml {stage}: params.yaml has no {key}"
                section = section[part]
