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
import json
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp
from uvicorn.protocols.http import auto

from serving.http import requests
from serving.settings import Settings
from serving.telemetry import metrics

_SECONDS = 1.0  # of a transfer before its rate says something


def _refusal(code: str, message: str) -> bytes:
    """An answer that needs no application."""
    body = json.dumps({"error": {"code": code, "message": message, "request_id": "none"}}, separators=(",", ":"))
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
        f"X-Request-Id: none\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


_FULL = _refusal("overloaded", "too many connections; try again")
_SLOWEST = _refusal("evicted", requests.EVICTION)


class _Transfer:
    """How much a client has sent or taken since it began to be waited for."""

    def __init__(self, now: float) -> None:
        self._since = now
        self.bytes = 0

    def rate(self, now: float) -> float | None:
        """Bytes a second; None while it is too early to say."""
        seconds = now - self._since
        return self.bytes / seconds if seconds >= _SECONDS else None


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
        self._body: _Transfer | None = None
        self._answer: _Transfer | None = None
        self._to_send = 0  # of the answer, when the network began to take less than there is
        self._late: requests.Pace | None = None

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

    @property
    def transfer_rate(self) -> float | None:
        """Bytes a second of a body that comes or an answer that goes; None where it is not the client who is waited for."""
        now = self.loop.time()
        if self._answer is not None:
            self._answer.bytes = self._to_send - self.transport.get_write_buffer_size()
            return self._answer.rate(now)
        if self._body is not None and self._receives and not self.flow.read_paused:
            return self._body.rate(now)
        return None

    @property
    def _receives(self) -> bool:
        """The body of a request that has no answer yet is still to come."""
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=0)  # be called for anything that the network does not take at once
        self._start("slow-head", self.settings.head_timeout_s)
        if len(self.connections) > self.settings.max_connections:
            idle = [other for other in self.connections if other is not self and not other.busy]
            if idle:
                min(idle, key=lambda other: other.idle_since).cut("connections")
                return
            rates = {other: rate for other in self.connections if (rate := other.transfer_rate) is not None}
            if rates:
                min(rates, key=rates.__getitem__).evict()
                return
            metrics.rejected("overloaded")
            self._leave_with(_FULL)

    def data_received(self, data: bytes) -> None:
        """Between two requests the clock starts at the first byte; it stops when a head is whole.

        A body whose answer has gone already, an early 401 or 503, is thrown away: most clients read nothing before they
        have sent all of it. It has to keep the pace that all bodies have to.
        """
        late = not self.busy and self.uploading
        if late:
            now = self.loop.time()
            self._late = self._late or requests.Pace(self.settings, now)
            self._stop("slow-body")
            self._start("slow-body", self._late.came(len(data), now) - now)
        elif not self.busy:
            self._start("slow-head", self.settings.head_timeout_s)
        before, waited_for = self.cycle, not self.flow.read_paused
        super().data_received(data)
        self._measure_body(len(data), goes_on=self.cycle is before and waited_for)
        if self.busy:
            self._stop("slow-head")
            self._stop("slow-body")
        elif late and not self.uploading:
            self._stop("slow-body")
            self._late = None
            self._start("slow-head", self.settings.idle_timeout_s)  # uvicorn would wait for the next one without limit

    def _measure_body(self, size: int, *, goes_on: bool) -> None:
        """Begins anew with each request, and where it was the application that did not read."""
        if self._body is None or not goes_on:
            self._body = _Transfer(self.loop.time())
        self._body.bytes += size

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """More is to be sent than the network has taken: from here on `min_rate_kb` counts."""
        super().pause_writing()
        self._to_send = self.transport.get_write_buffer_size()
        self._answer = _Transfer(self.loop.time())
        self._start("slow-reader", requests.patience(self.transport.get_write_buffer_size(), self.settings))

    def resume_writing(self) -> None:
        self._stop("slow-reader")
        self._answer = None
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

    def evict(self) -> None:
        """End the connection to make room for another; a client whose answer has not begun is told so."""
        if self.cycle.response_started:
            self.cut("evicted")
            return
        self.scope[requests.EVICTED] = True  # the application, which reads the body, counts and logs it
        self._leave_with(_SLOWEST)

    def _leave_with(self, answer: bytes) -> None:
        """Say a last word; from here on the connection takes no place, and none can be made by ending it."""
        self.connections.discard(self)
        self.transport.write(answer)
        self.transport.close()
        self.loop.call_later(requests.GRACE_S, self.transport.abort)  # should the client not even read that

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
