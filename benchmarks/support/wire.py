"""The load generator's HTTP client: bytes on kept-open sockets, to this machine and nowhere else.

A client library spends about a millisecond of processor time on a request, which on two cores is taken from the server
that is being measured. This one sends what it is given and reads status, headers and body.
"""

import asyncio
import contextlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_LINE = 64 << 10  # longest head that is read


class NotLoopback(ValueError):
    """An address that load must not be sent to."""


def loopback(url: str) -> tuple[str, int]:
    """(address, port) of http://ADDRESS:PORT, where the address is one of this machine's loopback, given as a number.

    Raises:
        NotLoopback: any other host, also a name: what a name stands for is decided elsewhere.
    """
    parts = urlsplit(url)
    try:
        inside = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        inside = False
    if parts.scheme != "http" or not inside or parts.port is None:
        raise NotLoopback(f"{url}: load is sent to http://127.0.0.1:PORT or http://[::1]:PORT only")
    return str(parts.hostname), parts.port


@dataclass(frozen=True)
class Reply:
    """What came back; header names in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A whole HTTP/1.1 request; `content_type="image/png"` becomes `content-type: image/png`."""
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Wire:
    """Connections to one server, kept open between requests."""

    def __init__(self, url: str) -> None:
        self._address = loopback(url)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, sent: bytes) -> Reply:
        """Send one request and read its reply.

        Raises:
            OSError or asyncio.IncompleteReadError: no connection, or one that broke before the reply was whole.
        """
        while self._idle:  # the server may have closed a connection that waited: then nothing at all comes back
            reader, writer = self._idle.pop()
            if reader.at_eof():
                writer.close()
                continue
            with contextlib.suppress(ConnectionError):
                if (reply := await self._exchange(reader, writer, sent)) is not None:
                    return reply
        reader, writer = await asyncio.open_connection(*self._address, limit=_LINE)
        reply = await self._exchange(reader, writer, sent)
        if reply is None:
            raise ConnectionResetError("closed without an answer")
        return reply

    async def cut(self, sent: bytes) -> None:
        """Send this much on a connection of its own and hang up."""
        _, writer = await asyncio.open_connection(*self._address)
        with contextlib.suppress(ConnectionError):
            writer.write(sent)
            await writer.drain()
        writer.transport.abort()

    def close(self) -> None:
        """Close the connections that wait."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytes) -> Reply | None:
        """None when the connection was closed before the first byte of a reply."""
        kept = False
        try:
            with contextlib.suppress(ConnectionError):  # an early answer is still to be read
                writer.write(sent)
                await writer.drain()
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise
                return None
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = await _body(reader, headers)
            kept = headers.get("connection", "").lower() != "close"
            return Reply(int(first.split()[1]), headers, body)
        finally:
            if kept:
                self._idle.append((reader, writer))
            else:
                writer.close()


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    pieces = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        pieces.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readline()
    return b"".join(pieces)
