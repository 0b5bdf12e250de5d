"""What the worker process holds from its start to its end: the models, the application over them, its statistics."""

import gc
import os
import signal
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import settings
from serving.bento import uvicorn_protocol, uvicorn_server
from serving.bento.admin import AdminServer
from serving.http import app
from serving.model.manager import ModelManager
from serving.model.watcher import ChampionWatcher
from serving.telemetry import metrics, prediction_stats, tracing

_PROBES = ("/livez", "/readyz", "/healthz")


class Front:
    """Hands a connection's requests to our application, all but the probes; what else there is (the server's start and
    end, websockets) never comes here.

    So BentoML's own addresses are closed, and no path with a newline meets its router, which has no match for it.
    """

    def __init__(self, bentoml: ASGIApp, ours: ASGIApp, is_draining: Callable[[], bool]) -> None:
        self._bentoml, self._ours, self._is_draining = bentoml, ours, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            """While the server ends, each answer is the last one of its connection, and says so."""
            if message["type"] == "http.response.start" and self._is_draining():
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await (self._bentoml if scope["path"] in _PROBES else self._ours)(scope, receive, send_last)


class Worker:
    """Made once a process, before the server is: the first model begins to load at once, beside the rest of the start."""

    def __init__(self, chosen: settings.Settings) -> None:
        gc.disable()  # until `start`: what is imported stays, and looking for garbage among it takes 0.1 s
        if others := settings.ignored():
            metrics.event("variables-ignored", names=others, reason="set by Kubernetes for a service of this name")
        self.models = ModelManager(chosen)
        self._watcher = ChampionWatcher(self.models, chosen)
        self._watcher.start()
        ours, self.handler, jobs = app.build(chosen, self.models)
        self.handler.health.on_lost = _leave
        self._draining = False
        uvicorn_protocol.install(chosen, lambda bentoml: Front(bentoml, ours, lambda: self._draining))
        uvicorn_server.install(chosen, self._drain, self._admin(chosen), jobs)
        self._writer = prediction_stats.StatisticsWriter(
            metrics.STATISTICS,
            chosen.statistics,
            chosen.statistics_every_s,
            lambda error: metrics.event("statistics-failed", error=str(error)),
        )

    def start(self) -> None:
        """Before the first request: keep the garbage collector from pausing requests.

        Full collections took 80 to 440 ms with the defaults; frozen start-up objects and rare full rounds cure it.
        """
        tracing.recorder()
        self._writer.start()
        gc.collect()
        gc.freeze()
        gc.enable()
        gc.set_threshold(5000, 10, 100_000)

    def _admin(self, chosen: settings.Settings) -> AdminServer | None:
        if chosen.admin is None:
            return None
        return AdminServer(chosen, app.build_admin(chosen, self.models, lambda: self.ready, lambda: self.alive))

    def _drain(self) -> None:
        """From now on it is not ready; what is under way goes on."""
        self._draining = True
        metrics.ready(False)

    def stop(self) -> None:
        """End the watcher, let the running work finish, write the statistics."""
        self._watcher.stop()
        self.models.close()
        self.handler.close()
        self._writer.stop()

    @property
    def ready(self) -> bool:
        """True once a warmed-up model answers, until the server begins to end."""
        return self.models.current is not None and self.alive and not self._draining

    @property
    def alive(self) -> bool:
        """False once a restart is the only way to answer again."""
        return self.handler.health.is_good


def _leave() -> None:
    """End this process: BentoML's watcher looks every 10 s and starts another, which opens the card anew."""
    os.kill(os.getpid(), signal.SIGTERM)
