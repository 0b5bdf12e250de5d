"""The models of the service: the current one, the previous one, one on trial, one in the shadow; and what changes them.

One change at a time: the watcher that follows the champion pointer, or a load that somebody asks for. A candidate is
opened, verified, warmed up and judged (`serving.model.checks`) beside the current model, and only then takes its
place; whatever
is wrong with it, the current model serves on. Only a rollback waits for nobody, since it is the way out, also where a
candidate hangs: what is being loaded meanwhile is refused. At most three models are in memory while that happens (and the
shadow's), two afterwards; an older one is freed when the last request that started with it ends.

An operator's choice (load, rollback) holds until the pointer next changes, or the service starts anew.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export.bundle.bundle import BundleError, open_bundle
from export.runtime.runtime import ProviderError, Runtime
from serving.model import checks
from serving.model.champion import PathError, PointerError, bundle_folder, named, shown
from serving.model.idle_priority import quietly
from serving.model.shadow import Shadow
from serving.settings import Settings
from serving.telemetry import metrics

RETRY_S = 60.0  # the longest pause between two attempts at a champion that would not load
EVENTS = 20


class Busy(RuntimeError):
    """Another change is under way."""


class NoPrevious(RuntimeError):
    """There is no model to go back to."""


def open_runtime(
    settings: Settings, folder: Path | None = None, threads: int | None = None, like: Runtime | None = None
) -> Runtime:
    """Find (the champion, unless `folder` is given), verify, load and warm up, also for the sizes that `like` met lately.

    Raises PointerError, BundleError or ProviderError.
    """
    runtime = Runtime(
        open_bundle(folder or bundle_folder(settings)),
        provider=settings.provider,
        precision=settings.precision,
        threads=threads or settings.threads,
    )
    runtime.warm_up(list(like.recent) if like else ())
    return runtime


def cause(error: Exception) -> str:
    """Why a candidate was refused, one of `metrics.CAUSES`."""
    if isinstance(error, checks.Refused):
        return error.cause
    kinds = {PointerError: "pointer", BundleError: "bundle", ProviderError: "provider"}
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "failed")


class Claim:
    """What one of two sides takes first: the loader at the moment of the swap, or its caller when the time is up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self) -> bool:
        """True for the first who asks."""
        return self._lock.acquire(blocking=False)


class Slot:
    """Holds the models. Reading `runtime`, the current one, is atomic: a request keeps the one that it started with."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.runtime: Runtime | None = None
        self.previous: Runtime | None = None
        self.candidate: dict[str, Any] | None = None  # what is on trial now: who asked, where it lies, since when
        self.shadow: Shadow | None = None
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._settings = settings
        self._clock = clock
        self._turn = threading.Lock()  # held by whoever changes the models
        self._held = threading.Lock()  # held for the moment of an exchange: both names are seen to change at once
        self._rollbacks = 0  # whoever changes the models began at one count, and is too late at another
        self._settled: bytes | None = None  # the pointer that needs no more doing: its bundle is served, or overruled
        self._failing: bytes | None = None  # the pointer that would not load, how often, what was said, and when next
        self._failures = 0
        self._said = ""
        self._again_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="champion-watcher", daemon=True)

    def start(self) -> None:
        """Load in the background, then watch the pointer (a pinned bundle is tried until it loads)."""
        self._thread.start()

    def stop(self) -> None:
        """End the watcher and the shadow."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        if self.shadow is not None:
            self.shadow.close(wait=True)

    def models(self) -> tuple[Runtime | None, Runtime | None]:
        """(current, previous), of one moment."""
        with self._held:
            return self.runtime, self.previous

    def load(self, folder: Path, *, allow_class_change: bool = False, claim: Claim | None = None) -> None:
        """Put the bundle in `folder` in the current one's place if it passes; what is served already stays.

        Without its `claim` the swap does not happen.

        Raises:
            Busy; trial.Refused, BundleError, ProviderError, or what else the candidate's runtime fails with.
        """
        with self._changing() as rollbacks:
            settled = self._pointer()
            try:
                self._install("load", folder, rollbacks, self._settings.allow_class_change or allow_class_change, claim)
            except Exception as error:
                self._refused(error)
                raise
            self._settle(settled, rollbacks)

    def rollback(self) -> None:
        """Exchange the current and the previous model; the pointer as it stands is not followed again.

        Also while another change is under way, which is then refused as "late".

        Raises:
            NoPrevious.
        """
        pointer = self._pointer()
        with self._held:
            if self.previous is None or self.runtime is None:
                raise NoPrevious("there is no previous model; load one by POST /v1/models/load")
            self._rollbacks += 1
            self._settled, self._failing = pointer, None
            self.runtime, self.previous = now, before = self.previous, self.runtime
        self._exchanged(now)
        metrics.swapped("rolled-back")
        self._tell("rolled-back", bundle=now.bundle.manifest.id, before=before.bundle.manifest.id)

    def set_shadow(self, folder: Path | None, claim: Claim | None = None) -> None:
        """Run the bundle in `folder` in the shadow of the current one; None ends that.

        What fails verification leaves the shadow that runs. What passes ends it before it is loaded, since two would be
        one too many in memory; if it then does not load, there is no shadow.

        Raises:
            Busy; PathError, trial.Refused (too late), BundleError, ProviderError.
        """
        with self._changing():
            if folder is None:
                self._end_shadow()
                return
            self._on_trial("shadow", folder)
            fresh = None
            try:
                open_bundle(folder)
                self._end_shadow()
                fresh = Shadow(lambda: open_runtime(self._settings, folder, threads=1), self._settings.shadow_share)
                opened = fresh.opened.result()
                if claim is not None and not claim.take():
                    raise checks.Refused("late", "was not ready in time; raise MARGINALIA_LOAD_TIMEOUT_S")
            except Exception as error:
                if fresh is not None:
                    fresh.close()
                self._refused(error)
                raise
            self.shadow = fresh
            self._publish()
            self._tell("shadow-started", bundle=opened.bundle.manifest.id)

    def _watch(self) -> None:
        metrics.ready(False)
        wanted = self._settings.shadow
        while True:
            self.refresh()
            if wanted and self._shadowed(wanted):
                wanted = None
            if self._stop.wait(self._settings.poll_s):
                return

    def _shadowed(self, path: str) -> bool:
        """Start MARGINALIA_SHADOW; False where another change is under way, and it has to be tried again."""
        if self.shadow is not None:
            return True  # somebody's choice meanwhile
        try:
            self.set_shadow(named(self._settings, path))
        except Busy:
            return False
        except (PathError, FileNotFoundError) as error:
            self._tell("shadow-refused", error=f"MARGINALIA_SHADOW: {error}")
        except Exception:
            pass  # told already, and the service does not need it
        return True

    def refresh(self) -> None:
        """Look once. What is served already is passed over; a bad bundle leaves the old model serving, with an event.

        A pointer counts as done only when its bundle answers: one that fails is tried again after 1, 2, 4 ... 60 s, since
        the reason may pass (a folder still being copied, no free file handle). The same failure is told once, and what
        the trial refused is not tried again before the pointer changes.
        """
        if self._pointer() == self._settled:  # mostly; the turn is not taken from somebody for that
            self._failing = None
            return
        try:
            with self._changing() as rollbacks:
                self._follow(rollbacks)
        except Busy:
            return  # whoever is at it settles the pointer, or the next round does

    def _follow(self, rollbacks: int) -> None:
        pointer = self._pointer()
        if pointer == self._settled:
            return
        if pointer != self._failing:
            self._failing, self._failures, self._said = pointer, 0, ""
        elif self._clock() < self._again_at:
            return
        try:
            self._install("pointer", None, rollbacks, self._settings.allow_class_change)
        except Exception as error:  # the watcher must outlive any bad candidate
            if not isinstance(error, PointerError):  # a pointer that cannot be read for a moment is no change of mind
                self._settle(None, rollbacks)
            self._failed(error)
            return
        self._settle(pointer, rollbacks)
        self._failing = None

    def _settle(self, pointer: bytes | None, rollbacks: int) -> None:
        """What a change found out of the pointer holds, unless a rollback has settled it since."""
        with self._held:
            if rollbacks == self._rollbacks:
                self._settled = pointer

    def _pointer(self) -> bytes:
        try:
            return b"" if self._settings.bundle else self._settings.champions.read_bytes()
        except OSError:
            return b"absent"

    @contextmanager
    def _changing(self) -> Iterator[int]:
        """Take the turn; gives the count of rollbacks at which it began. Raises Busy."""
        if not self._turn.acquire(blocking=False):
            raise Busy("another model is being loaded; try again when it is done")
        try:
            yield self._rollbacks
        finally:
            self.candidate = None
            self._turn.release()

    def _install(
        self, source: str, folder: Path | None, rollbacks: int, allow_class_change: bool, claim: Claim | None = None
    ) -> None:
        self._on_trial(source, folder)
        folder = folder or bundle_folder(self._settings)
        self._on_trial(source, folder)
        old = self.runtime

        def candidate() -> Runtime:
            runtime = open_runtime(self._settings, folder, like=old)
            if old is None or old.bundle.manifest != runtime.bundle.manifest:
                checks.judge(runtime, old, allow_class_change)
            return runtime

        fresh = quietly(candidate) if old else candidate()
        if old is not None and old.bundle.manifest == fresh.bundle.manifest:
            metrics.swapped("same")
            self._tell("bundle-same", bundle=fresh.bundle.manifest.id, source=source)
            return
        if old is not None:
            checks.race(fresh, old, self._settings.max_slowdown)
        if claim is not None and not claim.take():
            raise checks.Refused("late", "was not ready in time; raise MARGINALIA_LOAD_TIMEOUT_S")
        with self._held:
            if rollbacks != self._rollbacks:
                raise checks.Refused("late", "the service was rolled back while it was loaded; load it again if wanted")
            self.runtime, self.previous = fresh, self.runtime
        self._exchanged(fresh)
        metrics.swapped("loaded")
        metrics.ready(True)
        self._tell(
            "bundle-loaded",
            bundle=fresh.bundle.manifest.id,
            before=old.bundle.manifest.id if old else None,
            source=source,
            provider=fresh.provider,
            precision=fresh.precision,
            passed_over=fresh.passed_over or None,
            threads=fresh.threads,
        )

    def _exchanged(self, now: Runtime) -> None:
        shadow = self.shadow
        if shadow is not None and shadow.opened.result().bundle.manifest.id == now.bundle.manifest.id:
            self._end_shadow()  # it would be compared with itself
        self._publish()

    def _end_shadow(self) -> None:
        with self._held:
            ended, self.shadow = self.shadow, None
        if ended is None:
            return
        ended.close()
        metrics.agreed(None, {})
        self._publish()
        self._tell("shadow-ended", bundle=ended.opened.result().bundle.manifest.id)

    def _publish(self) -> None:
        with self._held:
            shadow = self.shadow.opened.result() if self.shadow else None
            held = {"current": self.runtime, "previous": self.previous, "shadow": shadow}
            metrics.models({slot: (r.bundle.manifest.id, r.provider, r.precision) for slot, r in held.items() if r})

    def _on_trial(self, source: str, folder: Path | None) -> None:
        path = folder or self._settings.champions
        self.candidate = {"source": source, "path": str(path), "since": round(time.time(), 3)}

    def _failed(self, error: Exception) -> None:
        final = isinstance(error, checks.Refused)
        pause = math.inf if final else min(RETRY_S, 2.0 ** min(self._failures, 10))
        self._failures += 1
        self._again_at = self._clock() + pause
        said = repr(error)
        if said == self._said:
            return
        self._said = said
        self._refused(error, retry_s=None if final else pause)

    def _refused(self, error: Exception, **facts: object) -> None:
        why, trying = cause(error), self.candidate or {}
        metrics.swapped("refused", why)
        facts |= {
            "source": trying.get("source"),
            "path": trying.get("path"),
            "cause": why,
            "still_serving": self.runtime.bundle.manifest.id if self.runtime else None,
        }
        if why != "failed":
            self._tell("bundle-refused", error=str(error), **facts)
        else:
            metrics.failure("bundle-refused", error, **facts)
            self._remember("bundle-refused", error=repr(error), **facts)

    def _tell(self, kind: str, **facts: object) -> None:
        metrics.event(kind, **facts)
        self._remember(kind, **facts)

    def _remember(self, kind: str, **facts: object) -> None:
        plain = {k: shown(self._settings, v) if isinstance(v, str | Path) else v for k, v in facts.items()}
        self.events.append({"time": round(time.time(), 3), "event": kind, **plain})
