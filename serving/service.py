"""The BentoML service: lifecycle and probes around `serving.app`.

Start it by `marginalia serve`, or by hand with `bentoml serve serving.service:Marginalia`.
"""

import contextlib
import gc
import os
import signal
import sys

import bentoml
from starlette.types import ASGIApp, Receive, Scope, Send

from export.bundle import BundleError
from export.runtime import ProviderError
from serving import app, connections, observe, settings, slots, spans, statistics
from serving.pointer import PointerError

_settings = settings.from_environment()


def _refuse_absent_provider() -> None:
    """End `bentoml serve` with the reason when the provider named in MARGINALIA_PROVIDER does not run here.

    BentoML imports this module before it starts its worker, and leaving then is a clean refusal. A worker that leaves is
    started again for ever, so there the watcher's event has to do. What else is wrong (no champion yet) may pass.
    """
    in_worker = getattr(sys.modules["__main__"].__spec__, "name", "") == "_bentoml_impl.worker.service"
    if in_worker or _settings.provider in ("auto", "cpu"):
        return
    try:
        slots.open_runtime(_settings)
    except ProviderError as error:
        raise SystemExit(f"marginalia: {error}") from error
    except (PointerError, BundleError, OSError):
        return


_refuse_absent_provider()
_slot = slots.Slot(_settings)
_app, _desk = app.build(_settings, _slot)
connections.install(_settings)


def _leave() -> None:
    """End this worker: BentoML's watcher looks every 10 s and starts another, which opens the card anew."""
    os.kill(os.getpid(), signal.SIGTERM)


_dump = statistics.Dump(
    observe.STATISTICS,
    _settings.statistics,
    _settings.statistics_every_s,
    lambda error: observe.event("statistics-failed", error=str(error)),
)

_PROBES = ("/livez", "/readyz", "/healthz")


async def _end_timer(send: Send) -> None:
    """Let a request outlive BentoML's timer, as a huge image may (`large_timeout_s`); our own deadlines end it.

    The timer asks nothing more once the application has sent something, and it looks before the server does: a message
    that the server refuses, as no ASGI message has this type, is enough.
    """
    with contextlib.suppress(RuntimeError):
        await send({"type": "marginalia.has-its-own-deadlines"})


class Front:
    """Hands everything but the probes to our application.

    Mounting it instead would leave BentoML's own addresses open, and its router has no match for a path with a newline.
    """

    def __init__(self, app: ASGIApp, ours: ASGIApp) -> None:
        self._bentoml, self._ours = app, ours

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        mine = scope["type"] == "http" and scope["path"] not in _PROBES
        if mine and scope["method"] == "POST":
            await _end_timer(send)
        await (self._ours if mine else self._bentoml)(scope, receive, send)


# BentoML's own request metrics and access log repeat whatever path a caller sends, as a label and unescaped: off.
# Its timer per request is never cancelled and keeps the request's objects alive until it fires, so it must not be long;
# our own deadlines (body, then work) always come first.
@bentoml.service(
    name="marginalia",
    workers=1,
    traffic={"timeout": _settings.body_timeout_s + max(_settings.timeout_s, _settings.load_timeout_s) + 5},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Marginalia:
    """Serves the champion's bundle; see /v1/openapi.json."""

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    def start(self) -> None:
        """Begin loading and watching; keep the garbage collector from pausing requests.

        Full collections took 80 to 440 ms with the defaults; frozen start-up objects and rare full rounds cure it.
        """
        observe.set_up_logging()
        if others := settings.ignored():
            observe.event("variables-ignored", names=others, reason="set by Kubernetes for a service of this name")
        _desk.on_lost = _leave
        spans.recorder()
        _slot.start()
        _dump.start()
        gc.collect()
        gc.freeze()
        gc.set_threshold(5000, 10, 100_000)

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        """End the watcher, let the running work finish, write what it saw."""
        _slot.stop()
        _desk.close()
        _dump.stop()

    def __is_ready__(self) -> bool:
        """True once a warmed-up model answers."""
        return _slot.runtime is not None and _desk.healthy

    def __is_alive__(self) -> bool:
        """False once a restart is the only way to answer again."""
        return _desk.healthy


Marginalia.add_asgi_middleware(Front, ours=_app)  # type: ignore[attr-defined]
