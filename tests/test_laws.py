"""The laws of the house: which room may import which, no circles, no torch where none belongs, folders one can survey."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "training", "export", "serving")
MOST_FILES = 14

# What each room may import of the others, lazily, for types or at all. `export` is two rooms: what runs a bundle, and
# what makes one.
RUNS_A_BUNDLE = ("export.bundle", "export.runtime", "export.tensorrt")
ALLOWED = {
    "pipeline": ("pipeline",),
    "training": ("pipeline", "training"),
    "runs a bundle": ("pipeline", *RUNS_A_BUNDLE),
    "export": ("pipeline", "training", "export"),
    "serving": ("pipeline", *RUNS_A_BUNDLE, "serving"),
}
TORCH = ("torch", "torchvision", "timm", "segmentation_models_pytorch", "lightning", "lightning_fabric")
# BentoML loads these by name: they are the service's start, and set what it must find set.
ENTRIES = ("serving.bento.service", "serving.bento.packed")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
PACKAGES = sorted(name for name, path in FILES.items() if path.name == "__init__.py")


def imported_names(path: Path) -> Iterator[str]:
    """Every name that the file imports anywhere, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_files(module: str) -> set[str]:
    """The modules of the house that a module names."""
    found = set()
    for name in imported_names(FILES[module]):
        known = name if name in FILES else name.rpartition(".")[0]
        if known in FILES and known != module:
            found.add(known)
    return found


def below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def room_of(module: str) -> str:
    return "runs a bundle" if below(module, RUNS_A_BUNDLE) else module.partition(".")[0]


def test_arrows_between_rooms_point_one_way() -> None:
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other in sorted(imported_files(module))
        if other != "export" and not below(other, ALLOWED[room_of(module)])
    ]
    assert wrong == []


def test_no_circle_of_files() -> None:
    """By removing, again and again, every file that imports none of those that are left."""
    left = {module: imported_files(module) for module in FILES}
    while leaves := [module for module, others in left.items() if not others & left.keys()]:
        for module in leaves:
            del left[module]
    circle = {module: sorted(others & left.keys()) for module, others in left.items()}
    assert circle == {}


def test_no_torch_where_none_belongs() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in FILES.items()
        if room_of(module) in ("pipeline", "runs a bundle", "serving")
        for name in imported_names(path)
        if below(name, TORCH)
    ]
    assert wrong == []


IMPORT_ALL = """
import importlib, json, logging, os, signal, sys, warnings
if sys.argv[1] == "with torch":
    from training.models.torchvision_operators import ensure_torchvision
    ensure_torchvision()  # timm cannot be imported without
    import segmentation_models_pytorch  # what it and its own imports set is not the house's doing
def state():
    return {
        "environment": dict(os.environ),
        "log handlers": len(logging.getLogger().handlers),
        "SIGTERM": str(signal.getsignal(signal.SIGTERM)),
        "working folder": os.getcwd(),
    }
changed = []
for name in sys.argv[2:]:
    before = state()
    importlib.import_module(name)
    after = state()
    changed += [f"{name} changes the {what}" for what in before if before[what] != after[what]]
print(json.dumps({"changed": changed, "torch": "torch" in sys.modules}))
"""


def import_all(kind: str, modules: list[str]) -> dict[str, object]:
    """Import the modules in a fresh process, one after another, and note what each changes in it."""
    command = [sys.executable, "-c", IMPORT_ALL, kind, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_torch_free_rooms_import_without_torch_and_change_nothing() -> None:
    modules = [m for m in FILES if room_of(m) in ("pipeline", "runs a bundle", "serving") and m not in ENTRIES]
    assert import_all("without torch", modules) == {"changed": [], "torch": False}


@pytest.mark.slow
def test_training_and_export_change_nothing_when_imported() -> None:
    modules = [m for m in FILES if room_of(m) in ("training", "export")]
    assert import_all("with torch", modules) == {"changed": [], "torch": True}


def test_importing_training_registers_no_operators() -> None:
    program = (
        "import torch, sys\n"
        "known = set(torch._C._dispatch_get_all_op_names())\n"
        f"for name in {[p for p in PACKAGES if p.startswith('training')]!r}: __import__(name)\n"
        "print(sorted(set(torch._C._dispatch_get_all_op_names()) - known))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def folders() -> list[Path]:
    tops = [ROOT / name for name in (*ROOMS, "marginalia", "tests", "benchmarks")]
    skipped = ("__pycache__", "golden")
    found = [path for top in tops for path in (top, *top.rglob("*")) if path.is_dir()]
    return [path for path in found if not set(path.relative_to(ROOT).parts) & set(skipped)]


def test_a_folder_can_be_surveyed() -> None:
    counts = {
        str(folder.relative_to(ROOT)): sum(p.is_file() and p.name != "__init__.py" for p in folder.iterdir())
        for folder in folders()
    }
    assert {name: count for name, count in counts.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_in_one_sentence_what_belongs_there(package: str) -> None:
    text = ast.get_docstring(ast.parse(FILES[package].read_text(encoding="utf-8"))) or ""
    first = text.partition("\n\n")[0]
    assert first.endswith("."), f"{package}: say in one sentence what belongs there"
    assert len(first.splitlines()) <= 2
