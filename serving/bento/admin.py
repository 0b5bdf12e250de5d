"""A second listener beside BentoML's, in the same event loop: no crowd at the one keeps operators out of the other."""

import asyncio
import contextlib
import socket
from contextlib import AbstractContextManager

import uvicorn
from starlette.types import ASGIApp

from serving.bento.uvicorn_protocol import Connection
from serving.settings import Settings
from serving.telemetry import metrics


class _Beside(uvicorn.Server):
    """A server that leaves signals to the main one, which ends it."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


class AdminServer:
    """Serves `application` at `settings.admin`; its connections are counted and bounded apart from all others."""

    def __init__(self, settings: Settings, application: ASGIApp) -> None:
        class Own(Connection):
            front = staticmethod(lambda application: application)

        Own.settings = settings
        self._settings = settings
        config = uvicorn.Config(application, http=Own, lifespan="off", log_config=None, server_header=False)
        self._server = _Beside(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen. Raises OSError where it cannot."""
        assert self._settings.admin is not None
        host, port = self._settings.admin
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._task = asyncio.get_running_loop().create_task(self._server.serve([listener]))
        metrics.event("admin-listens", address=self._settings.admin_address)

    async def stop(self) -> None:
        """End it and its connections; probes are short, so nobody is waited for long."""
        if self._task is None:
            return
        self._server.config.timeout_graceful_shutdown = 1
        self._server.should_exit = True
        await self._task
