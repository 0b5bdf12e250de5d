"""Bodies too large for memory: a raw body that states so is written to a temporary file as it comes.

The file has no name and is gone when the last holder drops it. All of them together are bounded; a place that has no
temporary folder to write to (TMPDIR) answers as if it were full. On a tmpfs such a file is memory again: mount a disk.
"""

import asyncio
import tempfile
import threading
import weakref
from collections.abc import Callable
from typing import BinaryIO

from starlette.requests import Request

from serving.http import requests
from serving.http.requests import Problem
from serving.settings import Settings

SPOOLED = 8 << 20  # bytes from which a body goes to disk: some photographs of 24 MP, no ordinary image
_BATCH = 1 << 20


class _Disk:
    """Bytes in temporary files of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def add(self, size: int) -> int:
        """The sum of all, after `size` more."""
        with self._lock:
            self._bytes += size
            return self._bytes


# Of bodies that only a huge image may have, and of the others: neither takes the other's room.
_huge, _ordinary = _Disk(), _Disk()


class _Reservation:
    """What one body takes on the disk; all together take at most `room` bytes."""

    def __init__(self, disk: _Disk, room: int) -> None:
        self._disk = disk
        self._room = room
        self.size = 0

    def add(self, size: int) -> None:
        """Raises Problem(503)."""
        self.size += size
        if self._disk.add(size) > self._room:
            raise Problem(503, "overloaded", "too many large bodies under way; try again", {"Retry-After": "5"})

    def release(self) -> None:
        """When its file is gone."""
        self._disk.add(-self.size)


async def read_body(
    request: Request, settings: Settings, kind: str, hold: Callable[[int], None] = lambda size: None
) -> bytes | BinaryIO:
    """As `requests.read_body`; a raw body that states more than `SPOOLED` or `max_body` bytes comes as a file instead.

    It comes at `min_rate` at least.

    Raises:
        Problem: as `requests.read_body`; 503 when the files under way have no room for more.
    """
    size = requests.stated_size(request) or 0
    if kind != "raw" or not min(SPOOLED, settings.max_body) < size <= settings.max_large_body:
        return await requests.read_body(request, settings, kind, hold)
    is_huge = size > settings.max_body
    # Of the huge ones at least two at a time.
    reservation = _Reservation(*(_huge, 2 * settings.max_large_body) if is_huge else (_ordinary, settings.max_bodies))
    loop = asyncio.get_running_loop()
    pace = requests.Pace(settings, loop.time())
    try:
        with requests.arriving(request):  # inside: a TimeoutError is an OSError, too
            async with asyncio.timeout_at(pace.deadline) as clock:

                def on_arrival(size: int) -> None:
                    clock.reschedule(pace.came(size, loop.time()))

                return await _write(request, reservation, on_arrival)
    except OSError as error:
        raise Problem(503, "overloaded", f"no room for the body on disk ({error.strerror}); try again") from error


async def _write(request: Request, reservation: _Reservation, on_arrival: Callable[[int], None]) -> BinaryIO:
    """The body as a file; `on_arrival` gets the size of each piece. Raises Problem(503)."""
    file: BinaryIO = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it is handed on, and closes when dropped
    weakref.finalize(file, reservation.release)

    batch = bytearray()
    async for piece in request.stream():
        batch += piece
        on_arrival(len(piece))
        if len(batch) >= _BATCH:
            await _flush(batch, file, reservation)
    await _flush(batch, file, reservation)
    return file


async def _flush(batch: bytearray, file: BinaryIO, reservation: _Reservation) -> None:
    reservation.add(len(batch))
    await asyncio.to_thread(file.write, bytes(batch))
    batch.clear()


def read_whole(file: BinaryIO, settings: Settings) -> bytes:
    """An ordinary image that came as a file. Raises Problem(413) over `max_body`."""
    size = file.seek(0, 2)
    if size > settings.max_body:
        raise Problem(
            413, "body-too-large", f"{size} bytes; an image of this size has at most {settings.max_body} bytes"
        )
    file.seek(0)
    return file.read()
