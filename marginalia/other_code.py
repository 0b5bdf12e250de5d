"""A checkout's own code where another copy of it is what runs, as in an experiment's folder after an edit."""

from pathlib import Path

_ROOMS = ("marginalia", "pipeline", "training", "export", "serving")
_RUNNING = Path(__file__).parents[1]


def warning(folder: Path, running: Path = _RUNNING) -> str | None:
    """What to tell where `folder` is a checkout whose code is not that of `running`; None where there is nothing to tell."""
    if not (folder / "marginalia/__main__.py").is_file() or folder.resolve() == running.resolve():
        return None
    files = (file.relative_to(folder) for room in _ROOMS for file in sorted((folder / room).rglob("*.py")))
    for file in files:
        other = running / file
        if not other.is_file() or other.read_bytes() != (folder / file).read_bytes():
            return (
                f"the code of {running} is what runs, and {file} here is not the same; "
                "to run the code of this folder, start the command with PYTHONPATH=."
            )
    return None
