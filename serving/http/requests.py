"""What may come in: the query, the type and size of the body. Everything else is a `Problem`."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from email.message import Message

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from pipeline.imaging import decode
from serving.settings import Settings

# curl's --data-binary sends the form type unless it is given another; the content decides anyway.
_RAW_TYPES = ("application/octet-stream", "application/x-www-form-urlencoded")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRAIN_BYTES, _DRAIN_SECONDS = 8 << 20, 2.0
_IMAGE_STATUS = {
    "unsupported-format": 415,
    "unsupported-depth": 415,
    "animated": 415,
    "too-many-pixels": 422,
    "bad-aspect": 422,
    "too-detailed": 422,
    "body-too-large": 413,
}
RETRY_AFTER_S = 1
GRACE_S = 5.0  # a pause that anybody may make: a slow start, a lost packet, a laptop's lid
LONGEST_PAUSE_S = 15.0  # which a body that came quickly until then may make: a phone between two cells
EVICTED = "marginalia.evicted"  # in the scope of a request whose connection was closed to make room
EVICTION = "too many connections, and this one was the slowest; try again"
_LONGEST_NAME = 255
_ENVELOPE = 16 << 10  # what a multipart body may have around the image


class Problem(Exception):
    """A request that gets an error answer.

    Attributes:
        status: HTTP status; code: kebab-case reason (one of `metrics.REASONS`); headers: extra response headers.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


def no_model() -> Problem:
    """The answer before the first model is loaded."""
    return Problem(503, "no-model", "no model is loaded yet; try again", {"Retry-After": str(RETRY_AFTER_S)})


def image_problem(error: decode.Refused) -> Problem:
    """The answer to bytes that are no image that we take."""
    return Problem(_IMAGE_STATUS.get(error.code, 400), error.code, str(error))


def check_query(request: Request, allowed: dict[str, Collection[str]]) -> dict[str, str]:
    """Query parameters, each known, given once and with a listed value. Raises Problem(400)."""
    values: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        shown = repr(name[:40])
        if name not in allowed:
            known = f"known: {', '.join(allowed)}" if allowed else "this address takes none"
            raise Problem(400, "bad-query", f"unknown query parameter {shown}; {known}")
        if name in values:
            raise Problem(400, "bad-query", f"query parameter {shown} is given twice; give it once")
        if value not in allowed[name]:
            raise Problem(400, "bad-query", f"query parameter {shown} must be one of {', '.join(allowed[name])}")
        values[name] = value
    return values


def body_kind(request: Request) -> str:
    """ "raw" or "multipart" by Content-Type. Raises Problem(415)."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "unsupported-type", "send the image without a Content-Encoding")
    if len(request.headers.getlist("content-type")) > 1:
        raise Problem(415, "unsupported-type", "send one Content-Type")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return "multipart"
    if kind in _RAW_TYPES or kind.startswith("image/"):
        return "raw"
    raise Problem(
        415,
        "unsupported-type",
        "send the image's bytes with a Content-Type of image/* or application/octet-stream, "
        "or multipart/form-data with a field 'image'",
    )


def patience(size: int, settings: Settings) -> float:
    """Seconds that `size` bytes may take on their way, in or out."""
    return GRACE_S + size / settings.min_rate


class Pace:
    """Until when a body is waited for. Its rate alone decides, never its size: whoever keeps `min_rate` may take all day.

    What comes faster earns time for a pause, up to `LONGEST_PAUSE_S`. Times are seconds of the event loop's clock.
    """

    def __init__(self, settings: Settings, now: float) -> None:
        self._rate = settings.min_rate
        self.deadline = now + GRACE_S

    def came(self, size: int, now: float) -> float:
        """The new deadline, after `size` bytes more."""
        self.deadline = min(self.deadline + size / self._rate, now + LONGEST_PAUSE_S)
        return self.deadline


def stated_size(request: Request) -> int | None:
    """Bytes of the body by Content-Length: 0 without one, None where it is no such number."""
    stated = request.headers.get("content-length", "0")
    return int(stated) if stated.isascii() and stated.isdigit() and len(stated) <= 18 else None


@contextlib.contextmanager
def arriving(request: Request) -> Iterator[None]:
    """Around what reads a body. Raises Problem: 408 for its TimeoutError, 400 where the client left, 503 where it was sent
    away because it was the slowest of too many."""
    try:
        yield
    except TimeoutError as error:
        raise Problem(408, "slow-body", "the body did not arrive in time", {"Connection": "close"}) from error
    except ClientDisconnect as error:
        if request.scope.get(EVICTED):
            raise Problem(503, "evicted", EVICTION, {"Retry-After": str(RETRY_AFTER_S)}) from error
        raise Problem(400, "truncated", "the connection was closed before the whole body arrived") from error


async def read_body(
    request: Request, settings: Settings, kind: str, hold: Callable[[int], None] = lambda size: None
) -> bytes:
    """The image's bytes, at most `max_body`, at `min_rate`.

    A body that is stated to be too large is refused unread, one that grows too large at the first byte over. `hold` gets
    the size of each piece, and may refuse it.

    Raises:
        Problem: 413 too large, 408 too slow, 400 empty, cut off or not one multipart file field 'image'.
    """
    limit = settings.max_body + (_ENVELOPE if kind == "multipart" else 0)
    too_large = Problem(
        413,
        "body-too-large",
        f"over the limit of {settings.max_body} bytes; scale the image down",
        {"Connection": "close"},
    )
    size = stated_size(request)
    if size is None or size > limit:
        raise too_large
    body, loop = bytearray(), asyncio.get_running_loop()
    pace = Pace(settings, loop.time())
    with arriving(request):
        async with asyncio.timeout_at(pace.deadline) as clock:
            async for piece in request.stream():
                hold(len(piece))
                body += piece
                if len(body) > limit:
                    break
                clock.reschedule(pace.came(len(piece), loop.time()))
    if len(body) > limit:
        raise too_large
    image = (await form_files(request, bytes(body)))[0][1] if kind == "multipart" else bytes(body)
    if len(image) > settings.max_body:
        raise too_large
    if not image:
        raise Problem(400, "empty", "the body has no bytes; send an image")
    return image


async def drain(request: Request) -> None:
    """Throw away a bounded rest of the body: a connection closed on unread bytes is reset and the answer lost.

    A client that waits for "100 Continue" has sent nothing, and must not be asked to.
    """
    if "expect" in request.headers:
        return
    left, until = _DRAIN_BYTES, time.monotonic() + _DRAIN_SECONDS
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while left > 0 and time.monotonic() < until:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


async def form_files(request: Request, body: bytes, most: int = 1) -> list[tuple[str, bytes]]:
    """(file name, bytes) of the parts of a multipart body: 1 to `most` file fields called 'image', nothing else.

    Raises:
        Problem: 400 "bad-multipart".
    """

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield body

    class InMemory(MultiPartParser):
        spool_max_size = len(body) + 1  # never to disk

    count = "exactly one file field" if most == 1 else f"1 to {most} file fields, all"
    wrong = Problem(400, "bad-multipart", f"the form needs {count} called 'image'")
    header = Message()
    header["content-type"] = request.headers["content-type"]
    boundary = header.get_boundary()
    if not boundary or not 1 <= len(boundary) <= 70:  # RFC 2046, 5.1.1
        raise Problem(400, "bad-multipart", "the multipart Content-Type needs a boundary of 1 to 70 characters")
    try:
        form = await InMemory(request.headers, pieces(), max_files=most, max_fields=0).parse()
    except (MultiPartException, ValueError, KeyError) as error:
        raise wrong from error
    files = []
    for field, file in form.multi_items():
        if field != "image" or not isinstance(file, UploadFile):
            raise wrong
        name = file.filename or ""
        if ".." in name or _CONTROL.search(name):
            raise Problem(400, "bad-multipart", "the file name has '..' or control characters; send a plain one")
        if len(name) > _LONGEST_NAME:
            raise Problem(400, "bad-multipart", f"a file name is longer than {_LONGEST_NAME} characters; shorten it")
        files.append((name, await file.read()))
    if not files:
        raise wrong
    return files


async def gone(request: Request) -> None:
    """Wait until the client has closed the connection; only after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
