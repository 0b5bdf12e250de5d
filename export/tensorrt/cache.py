"""Built TensorRT engines beside each other in a folder, each under a key of all that it depends on.

An engine fits one card, driver and TensorRT; it never goes into a bundle. The cache only saves time: whatever is wrong
with it, the engine is built anew. Its checksums guard against accidents, so the folder must be as safe as the code.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from export.tensorrt import builder
from export.tensorrt.installation import EngineError
from export.tensorrt.profile import Profile
from pipeline import paths
from pipeline.storage import atomic

HERE = paths.ENGINES
KEPT_ASIDE, KEPT = 4, 32  # files of each kind in a cache folder; the oldest go first
WAIT = 1800.0  # seconds for another process that builds the same engine; a large network takes minutes
_HEADER_LIMIT = 1 << 16
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Key:
    """All that an engine depends on. Another value of any field is another engine."""

    module: str
    version: str
    card: str
    compute_capability: str
    driver: str
    onnx_sha256: str
    precision: str
    profile: Profile
    recipe: int = builder.RECIPE

    @property
    def about(self) -> dict[str, Any]:
        """The key as it comes back from JSON."""
        about: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return about

    @property
    def digest(self) -> str:
        """The engine's file name without its suffix."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def machine(self) -> dict[str, Any]:
        """The part that timings of kernels depend on."""
        return {k: self.about[k] for k in ("module", "version", "card", "compute_capability", "driver")}


class _Unusable(Exception):
    """A file of the cache that must not be used, and how to call it: "damaged" or "stale"."""

    def __init__(self, kind: Literal["damaged", "stale"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _read(path: Path, about: dict[str, Any]) -> bytes:
    """The payload of a file written by `_write` for `about`. Raises _Unusable, and OSError if it cannot be read."""
    with path.open("rb") as file:
        line, payload = file.readline(_HEADER_LIMIT), file.read()
    try:
        header = json.loads(line)
        wanted, found = header["sha256"], header["about"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _Unusable("damaged", f"no readable header ({error!r})") from error
    if atomic.sha256(payload) != wanted:
        raise _Unusable("damaged", f"{len(payload)} bytes do not match their checksum")
    if found != about:
        other = sorted(k for k in about if not isinstance(found, dict) or found.get(k) != about[k])
        raise _Unusable("stale", f"made for another {', '.join(other) or 'key'}")
    return payload


def _write(path: Path, about: dict[str, Any], payload: bytes) -> None:
    """One line of JSON, then the payload: in one file, so that they cannot come from two writers. Never raises."""
    header = json.dumps({"sha256": atomic.sha256(payload), "about": about}, sort_keys=True)
    try:
        with atomic.replacing(path) as file:
            file.write(header.encode() + b"\n")
            file.write(payload)
    except OSError as error:
        _log.warning("%s: cannot be kept (%s); it will be built again next time", path, error)


@contextlib.contextmanager
def _locked(path: Path, wait: float) -> Iterator[bool]:
    """Hold a lock file against other processes and threads; it ends with its holder, however that ends.

    After `wait` seconds, or where locks do not work, go on without it: files appear by rename, so two builders at once
    only do the work twice.
    """
    with contextlib.ExitStack() as stack:
        held = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
            until = time.monotonic() + wait
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = True
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        _log.warning("%s: still held after %g s; building without it", path, wait)
                        break
                    time.sleep(0.05)
        except OSError as error:
            _log.warning("%s: cannot be locked (%s); going on without it", path, error)
        yield held


def _prune(folder: Path, pattern: str, keep: int) -> None:
    """Remove all but the `keep` files last touched. Another process may do the same at the same time."""
    with contextlib.suppress(OSError):
        for old in sorted(folder.glob(pattern), key=lambda p: p.stat().st_mtime_ns, reverse=True)[keep:]:
            old.unlink(missing_ok=True)


def default_folder() -> Path:
    """`.marginalia/engines` here, or the user's cache folder where that cannot be written."""
    try:
        HERE.mkdir(parents=True, exist_ok=True)
        if os.access(HERE, os.W_OK):
            return HERE
    except OSError:
        pass
    named = Path(os.environ.get("XDG_CACHE_HOME") or "")  # a relative one is to be ignored, says the specification
    try:
        return (named if named.is_absolute() else Path.home() / ".cache") / "marginalia" / "engines"
    except RuntimeError:  # a user without a home
        return HERE


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder of engines that several processes may share. Trouble with it is logged, never raised."""

    folder: Path
    wait: float = WAIT

    def path(self, key: Key) -> Path:
        return self.folder / f"{key.digest}.engine"

    def _set_aside(self, path: Path, trouble: _Unusable) -> None:
        """Keep a bad file for whoever asks what happened; remove it where even that fails."""
        _log.warning("%s: %s (%s); set aside, built anew", path, trouble.kind, trouble)
        aside = path.with_name(f"{path.name}.{time.time_ns()}.{trouble.kind}")
        try:
            path.replace(aside)
            os.utime(aside)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        _prune(self.folder, f"*.{trouble.kind}", KEPT_ASIDE)

    def _fetch(self, path: Path, about: dict[str, Any]) -> bytes | None:
        try:
            return _read(path, about)
        except FileNotFoundError:
            return None
        except _Unusable as trouble:
            self._set_aside(path, trouble)
        except OSError as error:
            _log.warning("%s: cannot be read (%s); built anew", path, error)
        return None

    def obtain(
        self,
        key: Key,
        make: Callable[[bytes], builder.Built],
        load: Callable[[bytes], Any],
        *,
        rebuild: bool = False,
    ) -> tuple[Any, bool]:
        """The loaded engine for `key`, and whether its file was used.

        Args:
            make: timings of earlier builds on this machine (may be empty) -> engine and timings.
            load: serialised engine -> engine, None when it does not suit this machine after all.
            rebuild: build even if there is a file.

        Raises:
            EngineError: `make` raises it, or what was built just now cannot be loaded.
        """
        path = self.path(key)
        with _locked(path.with_suffix(".lock"), self.wait) as alone:
            if not rebuild and (payload := self._fetch(path, key.about)) is not None:
                if (engine := load(payload)) is not None:
                    with contextlib.suppress(OSError):
                        os.utime(path)  # in use: others are removed before it
                    return engine, True
                self._set_aside(path, _Unusable("stale", "TensorRT does not take it"))
            if alone:
                _prune(self.folder, f".{path.name}.*.part", 0)  # of a builder that was killed
            machine = hashlib.sha256(json.dumps(key.machine, sort_keys=True).encode()).hexdigest()[:32]
            timings = self.folder / f"{machine}.timings"
            built = make(self._fetch(timings, key.machine) or b"")
            if (engine := load(built.engine)) is None:
                raise EngineError(f"an engine built just now cannot be loaded by {key.module} {key.version}")
            _write(path, key.about, built.engine)
            if built.timings:
                _write(timings, key.machine, built.timings)
            _prune(self.folder, "*.engine", KEPT)
            return engine, False
