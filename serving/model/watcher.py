"""Follows the champion pointer: what the gate promotes is served within seconds."""

import contextlib
import threading
import time
from collections.abc import Callable

from serving.model import checks
from serving.model.backoff import Backoff
from serving.model.champion import PathError, PointerError, bundle_folder, named, read_pointer
from serving.model.events import Candidate, ChampionRefused, ShadowRefused
from serving.model.manager import Busy, Change, ModelManager
from serving.settings import Settings
from serving.telemetry import metrics


class ChampionWatcher:
    """Loads the champion (or the pinned bundle) at the start, and each later one when the pointer changes.

    A pointer counts as done only when its bundle answers: one that fails is tried again after growing pauses, since the
    reason may pass (a folder still being copied, no free file handle). The same failure is reported once, and what the
    checks refused is not tried again before the pointer changes. An operator's choice (load, rollback) holds until then.
    """

    def __init__(self, models: ModelManager, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._models = models
        self._settings = settings
        self._backoff = Backoff(clock)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="champion-watcher", daemon=True)

    def start(self) -> None:
        """Load in the background, then watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after what it is loading."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        metrics.ready(False)
        shadow = self._settings.shadow
        while True:
            self.refresh()
            if shadow is not None and self._start_shadow(shadow):
                shadow = None
            if self._stop.wait(self._settings.poll_s):
                return

    def refresh(self) -> None:
        """Look once; load what the pointer names unless that has been done. Raises nothing for a bad bundle."""
        pointer = read_pointer(self._settings)
        if self._models.is_settled(pointer):
            self._backoff.reset()
            return
        if not self._backoff.is_due(pointer):
            return

        candidate = Candidate(source="pointer", path=str(self._settings.champions))
        with contextlib.suppress(Busy), self._models.changing(candidate) as change:  # if busy, the next look follows it
            if read_pointer(self._settings) == pointer and not self._models.is_settled(pointer):
                self._follow(pointer, change)

    def _follow(self, pointer: bytes, change: Change) -> None:
        try:
            folder = bundle_folder(self._settings)
            change.candidate = Candidate(source="pointer", path=str(folder))
            self._models.install(change, folder)
        except Exception as error:  # the watcher must outlive any bad candidate
            self._failed(change, error)
            return

        self._models.settle(pointer, change)
        self._backoff.reset()

    def _failed(self, change: Change, error: Exception) -> None:
        if not isinstance(error, PointerError):  # a pointer that cannot be read for a moment is no new choice
            self._models.settle(None, change)

        is_final = isinstance(error, checks.CandidateRefused)
        retry_s, is_new = self._backoff.fail(error, final=is_final)
        if is_new:
            refused = ChampionRefused.of(change.candidate, error, self._models.current, retry_s=retry_s)
            self._models.events.add_refusal(refused, error)

    def _start_shadow(self, path: str) -> bool:
        """Start MARGINALIA_SHADOW; False where another change is under way, and it has to be tried again."""
        if self._models.shadow is not None:
            return True  # an operator has chosen one meanwhile
        try:
            self._models.start_shadow(named(self._settings, path))
        except Busy:
            return False
        except (PathError, FileNotFoundError) as error:
            self._models.events.add(ShadowRefused(error=f"MARGINALIA_SHADOW: {error}"))
        except Exception:
            pass  # reported already, and the service does not need a shadow
        return True
