"""The models of the service: the current one, the previous one, and one in the shadow; and what changes them.

One change at a time: the watcher that follows the champion pointer, or a load that an operator asks for. A candidate is
opened, verified, warmed up and checked (`serving.model.loader`) beside the current model, and only then takes its place;
if anything is wrong with it, the current model serves on. Only a rollback never waits, since it is the way out, also
where a candidate hangs: what is being loaded meanwhile is refused. At most three models are in memory while that happens
(and the shadow's), two afterwards; an older one is freed when the last request that started with it ends.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from export.bundle.bundle import open_bundle
from export.runtime.runtime import Runtime
from serving.model import checks, loader
from serving.model.champion import read_pointer
from serving.model.claim import Claim
from serving.model.events import (
    BundleLoaded,
    BundleRefused,
    BundleSame,
    Candidate,
    EventLog,
    RolledBack,
    ShadowEnded,
    ShadowStarted,
)
from serving.model.shadow import Shadow
from serving.settings import Settings
from serving.telemetry import metrics


class Busy(RuntimeError):
    """Another change is under way."""


class NoPrevious(RuntimeError):
    """There is no model to go back to."""


@dataclass
class Change:
    """A change under way: what is being loaded, and whether a rollback has come in between."""

    candidate: Candidate
    overtaken: bool = False


class ModelManager:
    """Holds the models and changes them, from any thread.

    There are two locks. `_turn` is held from the beginning to the end of a change that takes its time (a load, the
    watcher's, a shadow's); it is never waited for: a second change raises Busy. `_lock` guards `current`, `previous`,
    `shadow`, the change under way and the settled pointer for the moment in which they are exchanged, so that they are
    observed to change together; nothing slow happens under it. It may be taken inside the turn, never the turn inside it, and
    a rollback takes it alone. `current` is also read without: a request reads it once, and keeps the model that it got.
    """

    def __init__(self, settings: Settings) -> None:
        self.current: Runtime | None = None
        self.previous: Runtime | None = None
        self.shadow: Shadow | None = None
        self.events = EventLog(settings)
        self._settings = settings
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._change: Change | None = None
        self._settled_pointer: bytes | None = None  # needs no more doing: its bundle is served, or was overruled

    @property
    def candidate(self) -> Candidate | None:
        """What is being loaded now."""
        change = self._change
        return change.candidate if change else None

    def models(self) -> tuple[Runtime | None, Runtime | None]:
        """(current, previous), of one moment."""
        with self._lock:
            return self.current, self.previous

    def close(self) -> None:
        """End the shadow, and wait for it."""
        if self.shadow is not None:
            self.shadow.close(wait=True)

    def load(self, folder: Path, *, allow_class_change: bool = False, claim: Claim | None = None) -> None:
        """Put the bundle in `folder` in the current one's place if it passes; what is served already stays.

        Without its `claim` the swap does not happen.

        Raises:
            Busy; CandidateRefused, BundleError, ProviderError, or what else the candidate's runtime fails with.
        """
        with self.changing(Candidate(source="load", path=str(folder))) as change:
            pointer = read_pointer(self._settings)
            with self._reporting(change):
                self.install(change, folder, allow_class_change=allow_class_change, claim=claim)
            self.settle(pointer, change)

    def rollback(self) -> None:
        """Exchange the current and the previous model; the pointer as it stands is not followed again.

        Also while another change is under way, which is then refused as "late".

        Raises:
            NoPrevious.
        """
        pointer = read_pointer(self._settings)
        with self._lock:
            if self.previous is None or self.current is None:
                raise NoPrevious("there is no previous model; load one by POST /v1/models/load")
            if self._change is not None:
                self._change.overtaken = True
            self._settled_pointer = pointer
            fresh, old = self.previous, self.current
            self.current, self.previous = fresh, old

        self._after_exchange(fresh)
        metrics.swapped("rolled-back")
        self.events.add(RolledBack(bundle=fresh.bundle.manifest.id, before=old.bundle.manifest.id))

    def start_shadow(self, folder: Path, claim: Claim | None = None) -> None:
        """Run the bundle in `folder` in the shadow of the current one.

        What fails verification leaves the shadow that runs. What passes ends it before it is loaded, since two would be
        one too many in memory; if it then does not load, there is no shadow.

        Raises:
            Busy; CandidateRefused (too late), BundleError, ProviderError.
        """
        with self.changing(Candidate(source="shadow", path=str(folder))) as change, self._reporting(change):
            open_bundle(folder)
            self._end_shadow()
            self._open_shadow(folder, claim)

    def end_shadow(self) -> None:
        """Run none. Raises Busy."""
        with self._taking_turn():
            self._end_shadow()

    @contextmanager
    def _taking_turn(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise Busy("another model is being loaded; try again when it is done")
        try:
            yield
        finally:
            self._turn.release()

    @contextmanager
    def changing(self, candidate: Candidate) -> Iterator[Change]:
        """The turn, for one change. Raises Busy."""
        with self._taking_turn():
            change = Change(candidate)
            with self._lock:
                self._change = change
            try:
                yield change
            finally:
                with self._lock:
                    self._change = None

    def install(
        self, change: Change, folder: Path, *, allow_class_change: bool = False, claim: Claim | None = None
    ) -> None:
        """Load the bundle in `folder` and put it in the current one's place; the caller has the turn.

        Raises:
            CandidateRefused, BundleError, ProviderError, or what else the candidate's runtime fails with.
        """
        old = self.current
        allow_class_change = allow_class_change or self._settings.allow_class_change
        fresh = loader.open_candidate(self._settings, folder, old, allow_class_change=allow_class_change)
        source = change.candidate.source
        if loader.is_same(fresh, old):
            metrics.swapped("same")
            self.events.add(BundleSame(bundle=fresh.bundle.manifest.id, source=source))
            return

        if old is not None:
            checks.compare_speed(fresh, old, self._settings.max_slowdown)
        if claim is not None:
            claim.take_in_time()
        self._exchange(fresh, change)

        self._after_exchange(fresh)
        metrics.swapped("loaded")
        metrics.ready(True)
        self.events.add(
            BundleLoaded(
                bundle=fresh.bundle.manifest.id,
                before=old.bundle.manifest.id if old else None,
                source=source,
                provider=fresh.provider,
                precision=fresh.precision,
                passed_over=fresh.passed_over or None,
                threads=fresh.threads,
            )
        )

    def _exchange(self, fresh: Runtime, change: Change) -> None:
        """Raises CandidateRefused where a rollback has come in between."""
        with self._lock:
            if change.overtaken:
                late = "the service was rolled back while it was loaded; load it again if wanted"
                raise checks.CandidateRefused("late", late)
            self.previous = self.current
            self.current = fresh

    def _after_exchange(self, current: Runtime) -> None:
        shadow = self.shadow
        if shadow is not None and shadow.opened.result().bundle.manifest.id == current.bundle.manifest.id:
            self._end_shadow()  # it would be compared with itself
        self._publish()

    def is_settled(self, pointer: bytes) -> bool:
        """Whether nothing is left to be done about that content of the champion pointer."""
        return pointer == self._settled_pointer

    def settle(self, pointer: bytes | None, change: Change) -> None:
        """That content of the pointer is done with (None: none is), unless a rollback has settled it since."""
        with self._lock:
            if not change.overtaken:
                self._settled_pointer = pointer

    @contextmanager
    def _reporting(self, change: Change) -> Iterator[None]:
        """Reports the candidate's failure, which goes on to the caller."""
        try:
            yield
        except Exception as error:
            self.events.add_refusal(BundleRefused.of(change.candidate, error, self.current), error)
            raise

    def _open_shadow(self, folder: Path, claim: Claim | None) -> None:
        fresh = Shadow(lambda: loader.open_runtime(self._settings, folder, threads=1), self._settings.shadow_share)
        try:
            opened = fresh.opened.result()
            if claim is not None:
                claim.take_in_time()
        except Exception:
            fresh.close()
            raise

        with self._lock:
            self.shadow = fresh
        self._publish()
        self.events.add(ShadowStarted(bundle=opened.bundle.manifest.id))

    def _end_shadow(self) -> None:
        with self._lock:
            ended = self.shadow
            self.shadow = None
        if ended is None:
            return

        ended.close()
        metrics.agreed(None, {})
        self._publish()
        self.events.add(ShadowEnded(bundle=ended.opened.result().bundle.manifest.id))

    def _publish(self) -> None:
        with self._lock:
            shadow = self.shadow.opened.result() if self.shadow else None
            held = {"current": self.current, "previous": self.previous, "shadow": shadow}
            facts = {name: (r.bundle.manifest.id, r.provider, r.precision) for name, r in held.items() if r}
            metrics.models(facts)
