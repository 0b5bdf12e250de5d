"""The model that is being served, and the watcher that puts the next champion in its place."""

import threading
from pathlib import Path

from export.bundle import BundleError, open_bundle
from export.runtime import ProviderError, Runtime
from pipeline import files
from serving import observe
from serving.settings import Settings


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
        raise PointerError(f"{pointer}: no champion yet; run `dvc repro`, or name a bundle in MARGINALIA_BUNDLE")
    try:
        named = Path(files.read_json(pointer)["bundle"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise PointerError(f"{pointer}: not a champion pointer ({error!r}); run the gate stage again") from error
    return named if named.is_absolute() else pointer.absolute().parent.parent / named


def open_runtime(settings: Settings) -> Runtime:
    """Find, verify, load and warm up. Raises PointerError, BundleError or ProviderError."""
    runtime = Runtime(open_bundle(bundle_folder(settings)), provider=settings.provider, threads=settings.threads)
    runtime.warm_up()
    return runtime


class Slot:
    """Holds the current `Runtime`. Reading `runtime` is atomic: a request keeps the one that it started with."""

    def __init__(self, settings: Settings) -> None:
        self.runtime: Runtime | None = None
        self._settings = settings
        self._seen: bytes | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="champion-watcher", daemon=True)

    def start(self) -> None:
        """Load in the background, then watch the pointer (a pinned bundle is loaded once)."""
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
            if self._settings.bundle is None:
                self.refresh()

    def refresh(self) -> None:
        """Look once. A pointer seen before is passed over; a bad bundle leaves the old model serving, with an event."""
        try:
            pointer = b"" if self._settings.bundle else self._settings.champions.read_bytes()
        except OSError:
            pointer = b"absent"
        if pointer == self._seen:
            return
        self._seen = pointer
        try:
            fresh = open_runtime(self._settings)
        except Exception as error:  # the watcher must outlive any bad candidate
            observe.swapped("refused")
            serving = self.runtime.bundle.manifest.id if self.runtime else None
            if isinstance(error, PointerError | BundleError | ProviderError):
                observe.event("bundle-refused", error=str(error), still_serving=serving)
            else:
                observe.failure("bundle-refused", error, still_serving=serving)
            return
        old, self.runtime = self.runtime, fresh
        observe.swapped("loaded")
        observe.ready(True)
        observe.event(
            "bundle-loaded",
            bundle=fresh.bundle.manifest.id,
            before=old.bundle.manifest.id if old else None,
            provider=fresh.provider,
            threads=fresh.threads,
        )
