"""The BentoML service: what BentoML has to know, and `serving.bento.worker` where it runs.

Start it by `marginalia serve`, or by hand with `bentoml serve serving.bento.service:Marginalia`.
"""

import functools
import sys
from typing import TYPE_CHECKING

import bentoml

from serving import settings
from serving.bento import parent, supervision, usage, working_folder
from serving.telemetry import log

if TYPE_CHECKING:
    from serving.bento.worker import Worker

usage.turn_off_tracking()  # here for a user who types `bentoml serve`, which imports this module first of ours
_settings = settings.from_environment()
# BentoML imports this module in the process that watches the workers, too; what only they need is not imported there.
_in_worker = getattr(sys.modules["__main__"].__spec__, "name", "") == "_bentoml_impl.worker.service"


def _refuse_absent_provider() -> None:
    """End `bentoml serve` with the reason when the provider named in MARGINALIA_PROVIDER does not run here.

    Leaving before the worker is started is a clean refusal. A worker that leaves is started again for ever, so there the
    watcher's event has to do. What else is wrong (no champion yet) may pass.
    """
    from export.bundle.bundle import BundleError
    from export.runtime.runtime import ProviderError
    from serving.model import loader
    from serving.model.champion import PointerError

    try:
        loader.open_runtime(_settings)
    except ProviderError as error:
        raise SystemExit(f"marginalia: {error}") from error
    except (PointerError, BundleError, OSError):
        return


@functools.cache
def _worker() -> "Worker":
    from serving.bento.worker import Worker

    return Worker(_settings)


if _in_worker:
    working_folder.go_back()
    log.take_over()
    supervision.count_in_process()
    supervision.choose_temporary_folder()
    _worker()
else:
    log.take_over()
    supervision.supervise()
    parent.announce_end()
    if _settings.provider not in ("auto", "cpu"):
        _refuse_absent_provider()


# BentoML's own request metrics and access log repeat whatever path a caller sends, as a label and unescaped: off.
@bentoml.service(
    name="marginalia",
    workers=1,
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Marginalia:
    """Serves the champion's bundle; see /v1/openapi.json."""

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    def start(self) -> None:
        """BentoML's hook, before the first request. Raises RuntimeError where the routes would be missing."""
        if not _in_worker:  # BentoML's alone: ours are put in where its worker process makes a server
            raise RuntimeError(
                "run it by `marginalia serve` or `bentoml serve`: another server would not have its routes"
            )
        _worker().start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        """BentoML's hook, after the last one."""
        _worker().stop()

    def __is_ready__(self) -> bool:
        """Asked by GET /readyz."""
        return _worker().ready

    def __is_alive__(self) -> bool:
        """Asked by GET /livez."""
        return _worker().alive
