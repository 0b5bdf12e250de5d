"""DVC's care for what stages do not own: dump archives and champions, so that push, clones and experiments have them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def _dvc(*arguments: str) -> str | None:
    """Run DVC here; None when it went well, else why not, in one line."""
    done = subprocess.run([sys.executable, "-P", "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return said[-1] if said else f"dvc {arguments[0]} ended with {done.returncode}"


def tracked(path: Path) -> bool:
    """Whether a .dvc file stands beside it. What is registered never changes its content, so once is enough."""
    return path.with_name(path.name + ".dvc").exists()


def track(paths: Sequence[Path]) -> str | None:
    """`dvc add` the paths that exist and are not tracked yet; writes PATH.dvc beside each, to be committed.

    None, or why it could not be done.
    """
    if not Path(".dvc").is_dir():
        return "this folder is no DVC repository"
    there = [str(path) for path in paths if path.exists() and not tracked(path)]
    return _dvc("add", "--quiet", *there) if there else None


def restore(path: Path) -> bool:
    """Bring a tracked path back from DVC's cache; False when it is not tracked or not in the cache (`dvc pull` first)."""
    return tracked(path) and _dvc("checkout", "--quiet", f"{path}.dvc") is None and path.exists()
