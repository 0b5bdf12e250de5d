"""Which source files can change a training's numbers, and their digest: a killed run is not continued by other code.

Imports are followed from the stage, also those inside functions, so that nothing is listed by hand. What only evaluates,
reports or draws is not reached. Comments, docstrings and layout do not count.
"""

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
STAGE = "training.train"
# Settings are compared by their values; the others say how a stage is started, shown and told, and where its files stand.
WITHOUT_EFFECT = (
    "pipeline.config", "pipeline.console", "pipeline.paths", "pipeline.records", "pipeline.stage",
    "training.engine.live_log",
)  # fmt: skip


def digest(architecture: str = "", repository: Path = REPOSITORY, project: Path = Path()) -> str:
    """SHA-256 over the sources that train.

    Args:
        architecture: `model.architecture`; of `some.module:Name` the user's module counts, and what it imports in `project`.
    """
    own_module, colon, _ = architecture.partition(":")
    starts = [STAGE, own_module] if colon else [STAGE]
    total = hashlib.sha256()
    for name, tree in sorted(sources(starts, (repository, project)).items()):
        total.update(f"{name}\0{_meaning(tree)}\0".encode())
    return total.hexdigest()


def sources(starts: Sequence[str], folders: Sequence[Path]) -> dict[str, ast.Module]:
    """Module name -> syntax of all that the modules `starts` import, directly or not, from `folders`; themselves included."""
    found: dict[str, ast.Module] = {}
    pending = list(starts)
    while pending:
        name = pending.pop()
        if name in found or _is_below(name, WITHOUT_EFFECT):
            continue
        if (path := _file_of(name, folders)) is not None:
            found[name] = ast.parse(path.read_bytes(), str(path))
            pending += _imports(found[name])
    return found


def _is_below(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _file_of(name: str, folders: Sequence[Path]) -> Path | None:
    """Where a module's source is; None for the standard library, installed packages and names that are no module."""
    for folder in folders:
        stem = folder / name.replace(".", "/")
        for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names that may be modules: what is imported, from where, and the packages above."""
    for node in _nodes(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            yield name
            yield from (name.rsplit(".", above)[0] for above in range(1, name.count(".") + 1))


def _nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node, but for what stands under `if TYPE_CHECKING:`, which never runs."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        pending += ast.iter_child_nodes(node)


def _meaning(tree: ast.Module) -> str:
    """The syntax as text, without docstrings, which are taken out of `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
