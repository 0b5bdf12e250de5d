"""The model that is being served, and the watcher that puts the next champion in its place."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from export.bundle import BundleError, open_bundle
from export.runtime import ProviderError, Runtime
from pipeline import files
from serving import observe
from serving.settings import Settings

RETRY_S = 60.0  # the longest pause between two attempts at a champion that would not load


class PointerError(ValueError):
    """The champion pointer cannot be followed; the message names the file."""


def bundle_folder(settings: Settings) -> Path:
    """The folder to serve: the pinned bundle, else the one that the champion pointer names.

    The pointer's paths are relative to the folder that holds `champions/`, wherever the service was started.

    Raises:
        PointerError: no pointer, or one that is not ours.
    """
    if settings.bundle is not None:
        return settings.bundle
    pointer = settings.champions
    if not pointer.is_file():
        raise PointerError(
            f"{pointer}: no champion yet; run `dvc repro`, or `dvc repro -f -s gate` where that says nothing has "
            "changed, or name a bundle in MARGINALIA_BUNDLE"
        )
    try:
        named = Path(files.read_json(pointer)["bundle"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        advice = "move it away and run `dvc repro -f -s gate`"
        raise PointerError(f"{pointer}: not a champion pointer ({error!r}); {advice}") from error
    return named if named.is_absolute() else pointer.absolute().parent.parent / named


def open_runtime(settings: Settings) -> Runtime:
    """Find, verify, load and warm up. Raises PointerError, BundleError or ProviderError."""
    runtime = Runtime(
        open_bundle(bundle_folder(settings)),
        provider=settings.provider,
        precision=settings.precision,
        threads=settings.threads,
    )
    runtime.warm_up()
    return runtime


class Slot:
    """Holds the current `Runtime`. Reading `runtime` is atomic: a request keeps the one that it started with."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.runtime: Runtime | None = None
        self._settings = settings
        self._clock = clock
        self._loaded: bytes | None = None  # the pointer whose bundle is served
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
        """End the watcher."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        observe.ready(False)
        self.refresh()
        while not self._stop.wait(self._settings.poll_s):
            self.refresh()

    def refresh(self) -> None:
        """Look once. What is served already is passed over; a bad bundle leaves the old model serving, with an event.

        A pointer counts as done only when its bundle answers: one that fails is tried again after 1, 2, 4 ... 60 s, since
        the reason may pass (a folder still being copied, no free file handle). The same failure is told once.
        """
        try:
            pointer = b"" if self._settings.bundle else self._settings.champions.read_bytes()
        except OSError:
            pointer = b"absent"
        if pointer == self._loaded:
            self._failing = None
            return
        if pointer != self._failing:
            self._failing, self._failures, self._said = pointer, 0, ""
        elif self._clock() < self._again_at:
            return
        try:
            fresh = open_runtime(self._settings)
        except Exception as error:  # the watcher must outlive any bad candidate
            self._failed(error)
            return
        old, self.runtime = self.runtime, fresh
        self._loaded, self._failing = pointer, None
        observe.swapped("loaded")
        observe.ready(True)
        observe.event(
            "bundle-loaded",
            bundle=fresh.bundle.manifest.id,
            before=old.bundle.manifest.id if old else None,
            provider=fresh.provider,
            precision=fresh.precision,
            passed_over=fresh.passed_over or None,
            threads=fresh.threads,
        )

    def _failed(self, error: Exception) -> None:
        pause = min(RETRY_S, 2.0 ** min(self._failures, 10))
        self._failures += 1
        self._again_at = self._clock() + pause
        said = repr(error)
        if said == self._said:
            return
        self._said = said
        observe.swapped("refused")
        serving = self.runtime.bundle.manifest.id if self.runtime else None
        if isinstance(error, PointerError | BundleError | ProviderError):
            observe.event("bundle-refused", error=str(error), still_serving=serving, retry_s=pause)
        else:
            observe.failure("bundle-refused", error, still_serving=serving, retry_s=pause)
