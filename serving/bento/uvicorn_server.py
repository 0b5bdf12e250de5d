"""How the server ends: readiness fails, no connection is accepted any more, and whoever was let in gets an answer.

uvicorn 0.51 closes its own descriptor of the listening socket, which BentoML's parent holds too: callers would be let in
by the kernel until the parent ends, and reset then. It also closes connections whose first request is on its way.
BentoML hands neither a server class nor its time limit through, so `install` puts ours where BentoML looks for uvicorn's.
"""

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable, Iterable

import uvicorn

from serving.bento.admin import AdminServer
from serving.bento.parent import Parent
from serving.bento.uvicorn_protocol import Connection
from serving.jobs.routes import JobRoutes
from serving.settings import Settings
from serving.telemetry import metrics

LINGER_S = 1.0  # for a request that is on its way over a connection without one
_STEP_S = 0.02


class Server(uvicorn.Server):
    """uvicorn's server with an end that resets nobody who was accepted."""

    settings: Settings
    on_drain: Callable[[], None]
    admin: AdminServer | None
    jobs: JobRoutes

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._parent = Parent()
        if self._parent.pipe is not None:
            asyncio.get_running_loop().add_reader(self._parent.pipe, self._on_parents_end)
        await super().startup(sockets)
        if self.admin is not None:
            await self.admin.start()
        self.jobs.start()

    def _on_parents_end(self) -> None:
        """SIGTERM follows where it ends; where it was killed, this is all."""
        if self._parent.pipe is not None:
            asyncio.get_running_loop().remove_reader(self._parent.pipe)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        type(self).on_drain()
        limit_s = self.settings.drain_limit_s
        metrics.event(
            "draining",
            connections=len(self.server_state.connections),
            requests=len(self.server_state.tasks),
            limit_s=limit_s,
        )
        await self._stop_listening(sockets or ())
        await self._wait_for_first_requests()
        await self.jobs.stop()  # they go on at the next start; nobody waits here for their answers
        self.config.timeout_graceful_shutdown = limit_s  # type: ignore[assignment]  # a float is as good
        cut = asyncio.get_running_loop().call_later(limit_s, self._tell_of_cut)
        await super().shutdown(sockets)
        cut.cancel()
        if self.admin is not None:  # last, so that probes and metrics follow the end
            await self.admin.stop()
        metrics.event("drained")

    async def _stop_listening(self, sockets: Iterable[socket.socket]) -> None:
        """Accept what the kernel has let in, then close the socket for all processes that hold it.

        Where only this worker ends, it stays open: the next one finds its callers in the queue.
        """
        loop = asyncio.get_running_loop()
        for sock in sockets:
            if self._parent.ends or self._parent.pipe is None:
                while select.select([sock], [], [], 0)[0]:
                    await asyncio.sleep(0)  # the loop accepts
                with contextlib.suppress(OSError):  # not everywhere for a listening socket
                    sock.shutdown(socket.SHUT_RDWR)
            loop.remove_reader(sock)

    async def _wait_for_first_requests(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + LINGER_S
        await asyncio.sleep(_STEP_S)  # what was accepted last becomes a connection meanwhile
        while loop.time() < until and any(_is_idle(each) for each in self.server_state.connections):
            await asyncio.sleep(_STEP_S)

    def _tell_of_cut(self) -> None:
        metrics.event("drain-cut", requests=len(self.server_state.tasks), reason="MARGINALIA_DRAIN_S is over")


def _is_idle(connection: object) -> bool:
    return isinstance(connection, Connection) and not connection.busy


def install(settings: Settings, on_drain: Callable[[], None], admin: AdminServer | None, jobs: JobRoutes) -> None:
    """Make BentoML's worker serve with `Server`, `admin` beside it and the jobs begun; `on_drain` is called when it begins
    to end."""
    Server.jobs = jobs
    Server.admin = admin
    Server.settings = settings
    Server.on_drain = staticmethod(on_drain)
    uvicorn.Server = Server  # type: ignore[misc]
