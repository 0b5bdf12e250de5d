"""Whether the model that is served still answers at all."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Executor

from export.bundle.bundle import BundleError
from export.runtime.runtime import Runtime
from serving.model.manager import ModelManager
from serving.telemetry import metrics


class ModelHealth:
    """Distinguishes an image that the model cannot take from a model that fails on everything: a lost GPU, for example.

    `on_lost` is called in the second case, from one of the threads of `workers`, where the test runs too.
    """

    def __init__(self, manager: ModelManager, workers: Executor) -> None:
        self.on_lost: Callable[[], None] = lambda: None
        self.lost: Runtime | None = None
        self._manager = manager
        self._workers = workers
        self._testing = False

    @property
    def is_good(self) -> bool:
        """False once the model that is served fails also on what it passed when it was loaded."""
        return self.lost is None or self.lost is not self._manager.current

    def doubt(self, runtime: Runtime) -> None:
        """A run failed: test the model, unless a test is under way."""
        if self._testing:
            return
        self._testing = True
        with contextlib.suppress(RuntimeError):  # the pool is closing
            self._workers.submit(self._test, runtime)

    def _test(self, runtime: Runtime) -> None:
        try:
            runtime.warm_up()
        except BundleError as error:
            self.lost = runtime
            metrics.failure("model-lost", error, bundle=runtime.bundle.manifest.id)
            metrics.ready(self.is_good)
            self.on_lost()
        finally:
            self._testing = False
