"""Resume state: one file in a work folder outside DVC's outputs, keyed by everything that shapes the run."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline import files

WORK = Path(".marginalia/work")


class CheckpointError(ValueError):
    """A checkpoint belongs to another run; the message lists the differences."""


def key(identity: dict[str, Any]) -> str:
    """Sixteen hex digits for a run: equal identities (config, split, data, start weights) share a work folder."""
    return hashlib.sha256(describe(identity).encode()).hexdigest()[:16]


def describe(identity: dict[str, Any]) -> str:
    """The identity as stored inside a checkpoint and compared on load."""
    return json.dumps(identity, sort_keys=True, default=str)


def folder(identity: dict[str, Any], root: Path = WORK) -> Path:
    return root / key(identity)


def discard(work: Path) -> None:
    """Remove a finished run's state: the next run with the same settings starts anew, perhaps with other code."""
    shutil.rmtree(work, ignore_errors=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Temporary name, fsync, rename: a kill at any moment leaves the previous checkpoint or this one, never a torn file."""
    with files.replacing(path) as handle:
        torch.save(state, handle)


def load(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state in `path`, or None where there is none. Only tensors and plain values are unpickled.

    Raises:
        CheckpointError: the file was written by a run with another identity, naming what differs.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    theirs, ours = json.loads(state["identity"]), json.loads(describe(identity))
    different = [f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in ours if theirs.get(k) != ours[k]]
    if different:
        raise CheckpointError(f"{path} belongs to another run ({'; '.join(different)}); delete it to start afresh")
    return state
