"""POST /v1/segment/batch: many images in one call, each answered as soon as it and those before it are done.

The body is read whole before the first answer goes out: most clients read nothing until they have sent everything, and
the two would wait for each other. Every image goes through the handler of single requests like one of them, no more at a time
than requests may be at work; the next one is begun when an answer has been taken. So a slow reader holds up no image of
another call, but one of the `many_calls` places, from when its body has been read for `many_timeout_s` at most.
"""

import asyncio
import json
import zipfile
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.admission.lanes import overloaded
from serving.http import batch_body, negotiate, requests
from serving.http.batch_body import Sent
from serving.http.negotiate import Kind
from serving.http.query import Query, parse
from serving.http.requests import Problem
from serving.http.responses import SegmentResult
from serving.http.segment import SegmentHandler, count_answer
from serving.telemetry import metrics

LINES = "answers.jsonl"  # the member of a zip answer that has a line for each image
PAUSE_S = 0.1  # before an image is tried again that was refused because the server is overloaded
_ENDINGS = {"mask": "png", "overlay": "png", "confidence": "png", "json": "json", "geojson": "geojson"}


class BatchHandler:
    """The route. `segment` answers each image."""

    def __init__(self, segment: SegmentHandler) -> None:
        self.segment = segment
        self.settings = segment.settings
        self._calls = 0

    async def answer(self, request: Request) -> Response:
        """POST /v1/segment/batch. Raises Problem for what is wrong with the call; a bad image is a line in the answer."""
        query = parse(request.query_params.multi_items(), self.settings)
        kind = negotiate.negotiate(request.headers.get("accept"), query.view, negotiate.MANY_KINDS)
        request.state.answer = kind.view
        body_kind = batch_body.body_kind(request)
        self.segment.check(query)
        self._check_room()  # before the body is read: what would be refused now
        with ExitStack() as stack:
            count_images = stack.enter_context(self.segment.clients.admit(request))
            body = await self._read(request, stack.enter_context(self.segment.admission.body(is_large=True)))
            self._check_room()
            self._calls += 1
            stack.callback(self._left)
            sent = await batch_body.open_body(request, body_kind, body, self.settings)
            count_images(len(sent))
            held = stack.pop_all()
        return _BatchStream(pieces(self, sent, kind, query), held, kind.media_type, self.settings.many_timeout_s)

    def _check_room(self) -> None:
        if self._calls >= self.settings.many_calls:
            raise overloaded("too many calls of many images", self.segment.admission.many.expected_wait_s() + 2)

    def _left(self) -> None:
        self._calls -= 1

    async def _read(self, request: Request, hold: Callable[[int], None]) -> bytes:
        """The whole body, zip or form, under this route's own limits. Raises Problem."""
        larger = self.settings.model_copy(update={"max_body_mb": self.settings.many_mb})
        try:
            return await requests.read_body(request, larger, "raw", hold)
        except Problem as problem:
            if problem.code != "body-too-large":
                raise
            reason = f"over the limit of {larger.max_body} bytes for all images together; send fewer at a time"
            raise Problem(413, problem.code, reason, problem.headers) from problem

    async def each(
        self, sent: Sequence[Sent], kind: Kind, query: Query
    ) -> AsyncGenerator[SegmentResult | Problem, None]:
        """What became of each image, in order."""
        # No more than are worked on: the line of the others stays short.
        at_once = self.settings.long_at_once if query.resolution == "full" else self.settings.concurrency
        under_way: deque[asyncio.Task[SegmentResult | Problem]] = deque()
        try:
            for image in sent:
                if len(under_way) >= at_once:
                    yield await under_way.popleft()
                under_way.append(asyncio.create_task(self._one(image, kind, query)))
            while under_way:
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()

    async def _one(self, image: Sent, kind: Kind, query: Query) -> SegmentResult | Problem:
        try:
            data = await asyncio.to_thread(image.load)
            done = await self._patiently(data, kind, query)
        except Problem as problem:
            metrics.rejected(problem.code)
            metrics.answered(kind.view, problem.status)
            return problem
        except Exception as error:  # one image's failure is its own
            metrics.failure("internal-error", error)
            metrics.answered(kind.view, 500)
            return Problem(500, "internal", "internal error on this image; quote the request id when reporting it")
        count_answer(done, kind)
        return done

    async def _patiently(self, data: bytes, kind: Kind, query: Query) -> SegmentResult:
        """As a single request is answered, but while the server is overloaded it is tried again. Raises Problem."""
        clock = asyncio.get_running_loop().time
        is_long = query.resolution == "full"
        end = clock() + (self.settings.large_timeout_s if is_long else self.settings.timeout_s)
        while True:
            try:
                return await self.segment.process(data, kind, query, is_one_of_many=True)
            except Problem as problem:
                if problem.code != "overloaded" or clock() + PAUSE_S > end:
                    raise
            await asyncio.sleep(PAUSE_S)

    def bundle(self) -> str | None:
        """The id of the model that answers now."""
        runtime = self.segment.manager.current
        return runtime.bundle.manifest.id if runtime else None


class _BatchStream(StreamingResponse):
    """Lets go of what the call holds when it ends, however it ends: also when the client left before the first answer.

    After `timeout_s` the answer is cut off where it is, and the connection closed.
    """

    def __init__(self, pieces: AsyncGenerator[bytes, None], held: ExitStack, media_type: str, timeout_s: float) -> None:
        super().__init__(pieces, media_type=media_type, headers={"Vary": "Accept"})
        self._pieces, self._held, self._timeout_s = pieces, held, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await super().__call__(scope, receive, send)
            except ClientDisconnect:
                metrics.rejected("disconnected")
            except TimeoutError:
                metrics.rejected("deadline")
            finally:
                await self._pieces.aclose()


def _line(number: int, image: Sent, outcome: SegmentResult | Problem, bundle: str | None, **more: Any) -> bytes:
    facts: dict[str, Any] = {"index": number, "file": image.name}
    if isinstance(outcome, Problem):
        facts |= {"bundle": bundle, "error": {"code": outcome.code, "message": str(outcome)}}
    else:
        facts |= {"bundle": outcome.bundle, **more}
    return json.dumps(facts, separators=(",", ":")).encode()


def pieces(handler: BatchHandler, sent: Sequence[Sent], kind: Kind, query: Query) -> AsyncGenerator[bytes, None]:
    """The answer, a piece for each image as soon as it and those before it are done; of a zip one more at the end."""
    write = _zip if kind.media_type == "application/zip" else _lines
    return write(handler, sent, kind, query)


async def _lines(handler: BatchHandler, sent: Sequence[Sent], kind: Kind, query: Query) -> AsyncGenerator[bytes, None]:
    """application/jsonl: one line for each image."""
    outcomes = handler.each(sent, negotiate.one(kind.view), query)
    try:
        for number, image in enumerate(sent):
            done = await anext(outcomes)
            line = _line(number, image, done, handler.bundle())
            if not isinstance(done, Problem):
                line = line[:-1] + b',"answer":' + done.body + b"}"  # the body is JSON already
            yield line + b"\n"
    finally:
        await outcomes.aclose()


async def _zip(handler: BatchHandler, sent: Sequence[Sent], kind: Kind, query: Query) -> AsyncGenerator[bytes, None]:
    """application/zip: one member for each image that was answered, and LINES as the last one."""
    outcomes = handler.each(sent, negotiate.one(kind.view), query)
    sink = _Sink()
    lines = []
    taken = {LINES}
    pack = zipfile.ZipFile(sink, "w")  # no `with`: it cannot be closed while a cancelled call's thread still packs
    try:
        for number, image in enumerate(sent):
            done = await anext(outcomes)
            more: dict[str, Any] = {}
            if not isinstance(done, Problem):
                member = _member_name(image.name, _ENDINGS[kind.view], taken)
                await asyncio.to_thread(_pack, pack, member, done.body)
                areas = {name: round(share, 4) for name, share in done.asked_shares.items()}
                more = {"member": member, "areas": areas, "confidence": round(done.asked_confidence, 4)}
            lines.append(_line(number, image, done, handler.bundle(), **more) + b"\n")
            yield sink.take()
        _pack(pack, LINES, b"".join(lines))
        pack.close()
        yield sink.take()
    finally:
        await outcomes.aclose()


class _Sink:
    """Collects what a zip writes until it is sent; it cannot seek, so the zip is written from front to back.

    No io.RawIOBase, which is closed before a zip that was left half-written and then complains.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, piece: Any) -> int:
        self._pieces.append(bytes(piece))
        return len(piece)

    def flush(self) -> None:
        pass

    close = flush

    def take(self) -> bytes:
        """All since the last time."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def _pack(pack: zipfile.ZipFile, name: str, body: bytes) -> None:
    item = zipfile.ZipInfo(name)  # dated 1980: the same answer is the same bytes
    item.external_attr = 0o644 << 16
    item.compress_type = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
    pack.writestr(item, body, compresslevel=1)


def _member_name(name: str, ending: str, taken: set[str]) -> str:
    """A name in the answer for an image: as sent but for the ending, numbered where it is there already."""
    plain = PurePosixPath(name.replace("\\", "/").lstrip("/"))
    stem = str(plain.with_suffix("")) if plain.name else "image"
    member = f"{stem}.{ending}"
    number = 1
    while member.lower() in taken:
        number += 1
        member = f"{stem}-{number}.{ending}"
    taken.add(member.lower())
    return member
