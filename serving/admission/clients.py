"""Fairness between clients: how many images a second and how many requests at once each may have. Off by default.

A client is an address (of IPv6 its network of 64 bits, which is what one subscriber has) or, where the settings say so, a
token. The rate is a token bucket: `client_burst` images at once, refilled at `client_rate` images a second. A call of many
is let in while the bucket has one, and takes as many as it has images, which those after it wait for.
"""

import hashlib
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import Request

from serving.http.requests import RETRY_AFTER_S, Problem
from serving.settings import Settings

MOST_CLIENTS = 10_000  # that are remembered; beyond, those that came least recently and have nothing under way are not


@dataclass
class Client:
    """One client: images left in its bucket at a time (negative: owed), and its requests under way."""

    left: float
    at: float
    under_way: int = 0


class Clients:
    """The clients of one server; only the event loop's thread may touch them."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._known = OrderedDict[str, Client]()

    @contextmanager
    def admit(self, request: Request) -> Iterator[Callable[[int], None]]:
        """Around a request from before its body to its end; call it with the number of images, where that is not one.

        Raises:
            Problem: 429, with when to come again.
        """
        if self._settings.client_rate is None and self._settings.client_at_once is None:
            yield lambda images: None
            return
        client = self._client(_key(request, self._settings))
        self._check(client)
        client.left -= 1
        client.under_way += 1
        try:
            yield lambda images: self._owe(client, images - 1)
        finally:
            client.under_way -= 1

    def _owe(self, client: Client, images: int) -> None:
        client.left -= images

    def _check(self, client: Client) -> None:
        most = self._settings.client_at_once
        if most is not None and client.under_way >= most:
            raise _too_many(f"{most} requests of yours are under way, as many as one client may have", RETRY_AFTER_S)
        rate = self._settings.client_rate
        if rate is not None and client.left < 1:
            raise _too_many(f"more than {rate:g} images a second of one client", (1 - client.left) / rate)

    def _client(self, key: str) -> Client:
        """With what its bucket has by now."""
        now = self._clock()
        burst = float(self._settings.client_burst)
        client = self._known.setdefault(key, Client(burst, now))
        self._known.move_to_end(key)
        client.left = min(burst, client.left + (now - client.at) * (self._settings.client_rate or 0.0))
        client.at = now
        if len(self._known) > MOST_CLIENTS:
            idle = next((name for name, other in self._known.items() if not other.under_way and name != key), None)
            if idle is not None:
                del self._known[idle]
        return client


def _too_many(reason: str, retry_after_s: float) -> Problem:
    headers = {"Retry-After": str(max(RETRY_AFTER_S, math.ceil(retry_after_s)))}
    return Problem(429, "too-many-requests", f"{reason}; try again later", headers)


def _key(request: Request, settings: Settings) -> str:
    """A token only where one is required, and so has been checked: another could be made up for each request."""
    has_tokens = settings.token is not None or settings.token_file is not None
    if settings.client_by == "token" and has_tokens:
        return hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if mapped := address.ipv4_mapped:
            return str(mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
