"""Resume state: one file in a work folder outside DVC's outputs, keyed by everything that shapes the run."""

import hashlib
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import paths
from pipeline.storage import atomic

WORK = paths.UNFINISHED


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
    with atomic.replacing(path) as handle:
        torch.save(state, handle)


class Writer:
    """Saves beside the training: the next step begins as soon as the state is copied. One write at a time, in order.

    What went wrong with a write is raised by the next call, at the latest when the block ends. Leaving the block waits.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Copy `state` to the host's memory and return; `path` is replaced when the copy has been written."""
        self.wait()
        self._last = self._pool.submit(save, path, _copied(state))

    def wait(self) -> None:
        """Return when the last state is safe on disk. Raises OSError where it could not be written."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


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


@dataclass(frozen=True)
class Unfinished:
    """What another run left in the work root; as a string, one line for the console.

    step: steps done, None where the file cannot be read. differs: names in its identity whose values are not ours,
    settings dotted as in params.yaml. size: of the file, in bytes.
    """

    folder: Path
    step: int | None
    differs: tuple[str, ...]
    size: int

    def __str__(self) -> str:
        what = "an unreadable checkpoint" if self.step is None else f"an unfinished run at step {self.step}"
        why = f", which differs in {', '.join(self.differs)}" if self.differs else ""
        return f"{self.folder}: {what}{why}; {self.size / 1e6:.1f} MB; will not be continued and may be deleted"


def unfinished(identity: dict[str, Any], root: Path = WORK) -> list[Unfinished]:
    """The runs in the work root whose identity is another one, by folder. Reads no tensors; a damaged file is listed."""
    ours = json.loads(describe(identity))
    found = []
    for path in sorted(root.glob("*/checkpoint.pt")):
        if path.parent == folder(identity, root):
            continue
        step: int | None = None
        differs: tuple[str, ...] = ()
        size = 0
        try:
            size = path.stat().st_size
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            step = int(state["step"])
            differs = tuple(_differences(json.loads(state["identity"]), ours))
        except FileNotFoundError:  # that run has just finished
            continue
        except Exception:  # whatever a damaged file makes of the unpickler: it must not stop this run
            pass
        found.append(Unfinished(path.parent, step, differs, size))
    return found


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    names = []
    for name in sorted(theirs.keys() | ours.keys()):
        one, two = theirs.get(name), ours.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            names += [f"{name}.{inner}".removeprefix("params.") for inner in _differences(one, two)]
        elif one != two:
            names.append(name)
    return names
