"""What the process that watches the worker does beside BentoML: logs how workers begin and end, and counts restarts.

BentoML's own way of counting over several workers, Prometheus's multiprocess files, is off: they are mapped below
BENTOML_HOME, so that a full disk there kills each worker that counts; two services of one user share and erase them; and
what a dead worker has written stays. One worker needs no files, and there is one: a model is loaded once, and its
admission, its champion and its statistics hold for the whole service.
"""

import functools
import os
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

from export.runtime import container
from serving.telemetry import log, restarts

Watcher = Any  # circus.watcher.Watcher: circus has no types

_MULTIPROCESS = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")


def count_in_process() -> None:
    """In the worker, before `prometheus_client` is imported: count in memory, not in files."""
    for name in _MULTIPROCESS:
        os.environ.pop(name, None)


def choose_temporary_folder() -> None:
    """In the worker: begin also where no disk has room. BentoML's client of the service to itself makes a folder, and
    Python looks for a place for it by writing a file."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.environ.get("TMPDIR", "/tmp")
        log.event(
            "disk-full", folder=tempfile.tempdir, reason="no file can be written; set TMPDIR to where there is room"
        )


@functools.cache
def supervise() -> None:
    """In the parent, before it starts a worker: log and count workers, and leave BentoML's metrics folder alone.

    More than one worker is refused when the first would be started.
    """
    import bentoml.serving
    from bentoml._internal.utils import circus

    # It would empty the folder that another service may count in.
    bentoml.serving.ensure_prometheus_dir = _no_metrics_folder  # type: ignore[assignment]
    start: Callable[..., None] = circus.Arbiter.start
    supervisor = Supervisor()

    def supervised_start(arbiter: circus.Arbiter, cb: Callable[[Any], Any] | None = None) -> None:
        workers = sum(watcher.numprocesses for watcher in arbiter.watchers)
        if workers > 1:
            raise SystemExit(
                f"marginalia: {workers} workers are configured, and each would load the model, admit requests and count on "
                "its own; set workers to 1, and start several services with a proxy before them"
            )
        for watcher in arbiter.watchers:
            supervisor.attach(watcher)

        def tell(started: Any) -> None:
            log.event("listening", addresses=[_address(each.host, each.port) for each in arbiter.sockets.values()])
            if cb is not None:
                cb(started)

        start(arbiter, tell)

    circus.Arbiter.start = supervised_start  # type: ignore[method-assign, assignment] # BentoML makes its arbiter of this class itself


def _no_metrics_folder() -> str:
    return ""


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Supervisor:
    """Follows the workers of one parent, one after the other."""

    def __init__(self, oom_kills: Callable[[], int] = container.oom_kills) -> None:
        self._oom_kills = oom_kills
        self._oom_kills_before = oom_kills()
        self._restarts = dict.fromkeys(restarts.CAUSES, 0)
        self._started: dict[int, float] = {}  # by process id

    def attach(self, watcher: Watcher) -> None:
        """Be told by circus of what becomes of this watcher's processes."""
        watcher.hooks |= {
            "before_spawn": self.before_spawn,
            "after_spawn": self.after_spawn,
            "after_reap": self.after_reap,
        }

    def before_spawn(self, watcher: Watcher, **_: Any) -> bool:
        """Tell the worker that comes of those before it."""
        watcher.env[restarts.VARIABLE] = restarts.stated(self._restarts)
        self._oom_kills_before = self._oom_kills()
        return True

    def after_spawn(self, pid: int, **_: Any) -> bool:
        """A worker has begun."""
        self._started[pid] = time.monotonic()
        log.event("worker-started", pid=pid, restarts=sum(self._restarts.values()))
        return True

    def after_reap(self, watcher: Watcher, process_pid: int, exit_code: int | None, **_: Any) -> None:
        """A worker has ended; `exit_code` is minus the signal where one ended it, None where nobody knows."""
        alive_s = time.monotonic() - self._started.pop(process_pid, time.monotonic())
        facts: dict[str, Any] = {"pid": process_pid, "alive_s": round(alive_s, 1)}
        facts |= _ending(exit_code)
        if not watcher.is_active():
            log.event("worker-ended", **facts)
            return

        cause = self._cause(exit_code)
        self._restarts[cause] += 1
        log.event("worker-died", **facts, cause=cause, restarts=sum(self._restarts.values()))

    def _cause(self, exit_code: int | None) -> str:
        if exit_code is None:
            return "failed"
        if exit_code == -signal.SIGKILL and self._oom_kills() > self._oom_kills_before:
            return "out-of-memory"
        if exit_code in (0, -signal.SIGTERM):
            return "left"
        return "killed" if exit_code < 0 else "failed"


def _ending(exit_code: int | None) -> dict[str, Any]:
    """For the log: the signal by its name, or the exit code."""
    if exit_code is None or exit_code >= 0:
        return {"exit_code": exit_code}
    try:
        return {"signal": signal.Signals(-exit_code).name}
    except ValueError:  # a real-time signal has none
        return {"signal": -exit_code}
