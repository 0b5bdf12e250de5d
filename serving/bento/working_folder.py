"""Keeps code of the current folder out of the service.

BentoML puts the folder that it works in first among those that modules are imported from, in its own process and in the
worker's. So it works in a folder of ours without code, and the worker goes back to the one that the service was started
in, where `.marginalia/engines` and the settings' relative paths are.
"""

import os
from pathlib import Path

_WITHOUT_CODE = Path(__file__).parents[1] / "web"
_STARTED_IN = "_MARGINALIA_STARTED_IN"  # no MARGINALIA_*: those are settings


def options() -> list[str]:
    """Options of `bentoml serve`; the worker, which inherits the environment, finds its way back by it."""
    os.environ[_STARTED_IN] = str(Path.cwd())
    os.environ["PYTHONSAFEPATH"] = "1"  # the worker is started by `python -m`, which would look here first, too
    return ["--working-dir", str(_WITHOUT_CODE)]


def go_back() -> None:
    """In the worker: work where the service was started; nothing to do where it was not by `marginalia serve`."""
    if started_in := os.environ.get(_STARTED_IN):
        os.chdir(started_in)
