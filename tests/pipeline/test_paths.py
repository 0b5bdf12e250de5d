"""One file names the paths of a project: dvc.yaml says the same, and no other module spells one out."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from pipeline import paths

ROOT = Path(__file__).parents[2]
KNOWN = {path for path in vars(paths).values() if isinstance(path, Path)}


def texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """String constants that are no docstrings."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield node


def test_every_path_is_relative_and_has_one_name():
    assert all(not path.is_absolute() for path in KNOWN)
    names = [name for name, path in vars(paths).items() if isinstance(path, Path)]
    assert len(names) == len(KNOWN)


def test_what_dvc_tracks_is_named_here():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    bodies = [body.get("do", body) for body in stages.values()]
    listed = [item for body in bodies for key in ("outs", "metrics") for item in body.get(key, [])]
    written = {Path(next(iter(item)) if isinstance(item, dict) else item) for item in listed}
    unknown = {path for path in written if not {path, *path.parents} & (KNOWN - {paths.REPORTS, paths.DATA})}
    # The drift stages name their pictures after themselves, and ingest its folder after the dump.
    assert unknown <= {Path(f"reports/{name}") for name in ("screen.png", "screen", "drift.png", "screen/unusual.jpg",
                                                            "drift/unusual.jpg")}  # fmt: skip


def test_no_other_module_spells_a_path_out():
    spelled = [path.as_posix() for path in KNOWN - {paths.PARAMS} if "/" in path.as_posix() or path.suffix]
    pattern = re.compile(rf"(?<![\w/.-])({'|'.join(map(re.escape, spelled))})(?![\w-])")
    for package in ("marginalia", "pipeline", "training", "export", "serving"):
        for file in (ROOT / package).rglob("*.py"):
            if file == ROOT / "pipeline/paths.py":
                continue
            for node in texts(ast.parse(file.read_text(encoding="utf-8"))):
                found = pattern.search(node.value)
                assert not found, (
                    f"{file.relative_to(ROOT)}:{node.lineno} spells {found[0]} out: take it from pipeline.paths"
                )
