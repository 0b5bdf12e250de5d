"""What a connection may cost: how many, how long a request's head may take, how slowly an answer may be read.

Neither uvicorn nor BentoML 1.4.39 bounds these. uvicorn waits for ever for the head of a request and for a client that
does not read; its limit on connections cannot be set through BentoML, whose `traffic.max_concurrency` counts requests
and answers 429 in a shape of its own. uvicorn takes a protocol class (`Config(http=...)`), which BentoML does not hand
through either; so `install` puts ours where uvicorn looks for the one it picks by itself. The body of a request is the
part of `serving.http.requests`.

Our application is put before BentoML's there, too. As its middleware (`Service.add_asgi_middleware`) it stood behind
BentoML's spans, which are made and thrown away, and behind its timer, which is never cancelled and ends a request however
long that may take: 361 answers a second, p99 23 ms; before them 463 and 16 (4 callers, an idle model, 2 cores).
"""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp
from uvicorn.protocols.http import auto

from serving.http import requests
from serving.settings import Settings
from serving.telemetry import metrics

_BODY = b'{"error":{"code":"overloaded","message":"too many connections; try again","request_id":"none"}}'
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"X-Request-Id: none\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Connection(auto.AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's HTTP protocol, whichever is installed, with limits; only what all of them have is used."""

    settings: Settings
    front: Callable[[ASGIApp], ASGIApp]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.app: ASGIApp = type(self).front(self.app)
        self.timeout_keep_alive = self.settings.idle_timeout_s
        self.idle_since = self.loop.time()
        self._patience: dict[str, asyncio.TimerHandle] = {}  # by the reason to end the connection

    @property
    def busy(self) -> bool:
        """A request's head has come, and its answer has not gone."""
        asked = self.cycle is not None and not self.cycle.response_complete
        return asked or self.transport.get_write_buffer_size() > 0

    @property
    def uploading(self) -> bool:
        """The body of a request is still to come (as far as h11 knows; httptools does not)."""
        parser = getattr(self, "conn", None)
        return parser is not None and parser.their_state is h11.SEND_BODY

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=0)  # be called for anything that the network does not take at once
        self._start("slow-head", self.settings.head_timeout_s)
        if len(self.connections) > self.settings.max_connections:
            idle = [other for other in self.connections if other is not self and not other.busy]
            if idle:
                min(idle, key=lambda other: other.idle_since).cut("connections")
                return
            metrics.rejected("overloaded")
            self.transport.write(_FULL)
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Between two requests the clock starts at the first byte; it stops when a head is whole.

        A body whose answer has gone already, an early 401 or 503, is thrown away: most clients read nothing before they
        have sent all of it. It has the time that the longest body has.
        """
        late = not self.busy and self.uploading
        if late:
            self._start("slow-body", 2 * self.settings.body_timeout_s)
        elif not self.busy:
            self._start("slow-head", self.settings.head_timeout_s)
        super().data_received(data)
        if self.busy:
            self._stop("slow-head")
            self._stop("slow-body")
        elif late and not self.uploading:
            self._stop("slow-body")
            self._start("slow-head", self.settings.idle_timeout_s)  # uvicorn would wait for the next one without limit

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """More is to be sent than the network has taken: from here on `min_rate_kb` counts."""
        super().pause_writing()
        self._start("slow-reader", requests.patience(self.transport.get_write_buffer_size(), self.settings))

    def resume_writing(self) -> None:
        self._stop("slow-reader")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for reason in tuple(self._patience):
            self._stop(reason)
        super().connection_lost(exc)

    def cut(self, reason: str) -> None:
        """End the connection now, whatever is still to be sent."""
        metrics.rejected(reason)
        self.connections.discard(self)
        self.transport.abort()

    def _start(self, reason: str, seconds: float) -> None:
        if reason not in self._patience:
            self._patience[reason] = self.loop.call_later(seconds, self.cut, reason)

    def _stop(self, reason: str) -> None:
        if timer := self._patience.pop(reason, None):
            timer.cancel()


def install(settings: Settings, front: Callable[[ASGIApp], ASGIApp]) -> None:
    """Make every uvicorn server that is configured after this use `Connection` with these settings.

    `front` is given the application that the server was configured with and returns what answers instead.
    """
    Connection.settings = settings
    Connection.front = staticmethod(front)
    auto.AutoHTTPProtocol = Connection
