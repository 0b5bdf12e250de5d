"""The HTTP routes: POST /v1/segment, GET /v1/model, /v1/openapi.json, /metrics and the page."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from export.runtime import Runtime
from pipeline import images
from serving import answers, limits, observe, openapi
from serving.limits import Problem
from serving.settings import Settings
from serving.slots import Slot

PAGE = Path(__file__).with_name("web") / "index.html"
# The page's script and style are inline; nothing may be loaded from, or sent to, anywhere else.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STATUS = {
    "unsupported-format": 415,
    "unsupported-depth": 415,
    "animated": 415,
    "too-many-pixels": 422,
    "bad-aspect": 422,
}
_RETRY_AFTER_S = 1

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Answered:
    """A rendered answer: body, bundle id, seconds by phase, and what the metrics want to know."""

    body: bytes
    bundle: str
    timings: dict[str, float]
    shares: dict[str, float]
    confidence: float


def segment(data: bytes, kind: answers.Kind, runtime: Runtime, settings: Settings, submitted: float) -> Answered:
    """Decode, run and render in one worker thread; `submitted` is when the work was queued (perf_counter).

    Raises:
        images.Refused: the bytes are no image that we take.
    """
    marks = [submitted, time.perf_counter()]
    image_HWC = images.decode(data, max_pixels=settings.max_pixels, max_aspect=settings.max_aspect)
    marks.append(time.perf_counter())
    found = runtime.segment(image_HWC)
    marks.append(time.perf_counter())
    manifest = runtime.bundle.manifest
    body = answers.render(kind, image_HWC, found, manifest)
    shares, _, confidence = answers.statistics(found, manifest)
    marks.append(time.perf_counter())
    timings = {name: end - start for name, start, end in zip(observe.PHASES, marks, marks[1:], strict=False)}
    named = {item.name: shares[item.id] for item in manifest.classes}
    return Answered(body, manifest.id, timings, named, confidence)


class Desk:
    """Takes requests in: bounded admission, a deadline, and the pool of worker threads."""

    def __init__(self, settings: Settings, slot: Slot) -> None:
        self.settings, self.slot = settings, slot
        self.admitted = 0
        self._pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="segment")

    async def answer(self, request: Request) -> Response:
        """POST /v1/segment. Raises Problem."""
        limits.check_token(request, self.settings)
        query = limits.check_query(request, {"view": answers.VIEWS})
        kind = answers.negotiate(request.headers.get("accept"), query.get("view"))
        request.state.answer = kind.view
        body_kind = limits.body_kind(request)
        runtime = self.slot.runtime
        if runtime is None:
            raise Problem(503, "no-model", "no model is loaded yet; try again", {"Retry-After": str(_RETRY_AFTER_S)})
        if self.admitted >= self.settings.concurrency + self.settings.queue:
            raise Problem(503, "overloaded", "too many requests; try again", {"Retry-After": str(_RETRY_AFTER_S)})
        self._count(1)
        try:
            data = await limits.read_body(request, self.settings, body_kind)
            work = self._pool.submit(segment, data, kind, runtime, self.settings, time.perf_counter())
        except BaseException:
            self._count(-1)
            raise
        loop = asyncio.get_running_loop()
        # The place is free when the work has ended, not when somebody stopped waiting for it.
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._count, -1))
        return self._respond(await self._wait(work), kind)

    async def _wait(self, work: "Future[Answered]") -> Answered:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), self.settings.timeout_s)
        except TimeoutError as error:
            raise Problem(504, "deadline", f"not done within {self.settings.timeout_s:g} seconds; try again") from error
        except images.Refused as error:
            raise Problem(_STATUS.get(error.code, 400), error.code, str(error)) from error

    def _respond(self, done: Answered, kind: answers.Kind) -> Response:
        observe.answered(kind.view, 200, done.timings)
        observe.segmented(done.shares, done.confidence)
        headers = {
            "X-Bundle-Id": done.bundle,
            "Server-Timing": answers.server_timing(done.timings),
            "Vary": "Accept",
        }
        return Response(done.body, media_type=kind.media_type, headers=headers)

    def _count(self, change: int) -> None:
        self.admitted += change
        observe.load(self.admitted)

    async def model(self, request: Request) -> Response:
        """GET /v1/model: what is being served."""
        limits.check_token(request, self.settings)
        limits.check_query(request, {})
        runtime = self.slot.runtime
        if runtime is None:
            raise Problem(503, "no-model", "no model is loaded yet; try again", {"Retry-After": str(_RETRY_AFTER_S)})
        facts = openapi.model_answer(runtime)
        return Response(facts.model_dump_json(), media_type="application/json")

    def close(self) -> None:
        """Let the running work end and drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _problem_response(problem: Problem, request_id: str) -> Response:
    detail = answers.ErrorDetail(code=problem.code, message=str(problem), request_id=request_id)
    return JSONResponse(
        answers.ErrorAnswer(error=detail).model_dump(), status_code=problem.status, headers=dict(problem.headers)
    )


async def _dispatch(request: Request, routes: Mapping[str, tuple[str, Handler]]) -> Response:
    """By exact path, so that a path of any bytes whatever finds its 404 here. Raises Problem."""
    if request.scope["path"] not in routes:
        raise Problem(404, "not-found", "nothing here; see /v1/openapi.json")
    method, handler = routes[request.scope["path"]]
    if request.method != method and (request.method, method) != ("HEAD", "GET"):
        raise Problem(405, "method", f"use {method} here", {"Allow": method})
    return await handler(request)


async def _answer(request: Request, routes: Mapping[str, tuple[str, Handler]]) -> Response:
    """Every answer gets its request id and a log line; every failure the one error shape."""
    start = time.perf_counter()
    path = request.scope["path"]
    request_id = observe.request_id(request.headers.get("x-request-id"))
    request.state.answer = "none"
    code = None
    try:
        response = await _dispatch(request, routes)
    except Problem as problem:
        code = problem.code
        response = _problem_response(problem, request_id)
    except Exception as error:  # the last line: the caller gets the one error shape, the log the traceback
        code = "internal"
        observe.failure("internal-error", error, request_id=request_id)
        response = _problem_response(
            Problem(500, "internal", "the service failed; tell its keeper the request id"), request_id
        )
    if code is not None:
        observe.rejected(code)
        if path == "/v1/segment":
            observe.answered(request.state.answer, response.status_code)
    response.headers["X-Request-Id"] = request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    observe.event(
        "request",
        request_id=request_id,
        method=request.method[:16],
        path=path[:200],
        status=response.status_code,
        code=code,
        answer=request.state.answer,
        bundle=response.headers.get("x-bundle-id"),
        ms=round((time.perf_counter() - start) * 1e3, 2),
    )
    return response


def build(settings: Settings, slot: Slot) -> tuple[ASGIApp, Desk]:
    """The ASGI application (HTTP only) over a slot, and the desk to close when it ends."""
    desk = Desk(settings, slot)
    page = PAGE.read_bytes()
    description = JSONResponse(openapi.document(settings)).body

    async def show_openapi(request: Request) -> Response:
        return Response(description, media_type="application/json")

    async def show_page(request: Request) -> Response:
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})

    async def show_metrics(request: Request) -> Response:
        text = await run_in_threadpool(observe.exposition)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    routes: dict[str, tuple[str, Handler]] = {
        "/v1/segment": ("POST", desk.answer),
        "/v1/model": ("GET", desk.model),
        "/v1/openapi.json": ("GET", show_openapi),
        "/metrics": ("GET", show_metrics),
        "/": ("GET", show_page),
        "/ui": ("GET", show_page),
    }

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = await _answer(request, routes)
        if response.status_code != 413:
            return await response(scope, receive, send)
        await send({"type": "http.response.start", "status": 413, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        await limits.drain(request)
        await send({"type": "http.response.body", "body": b""})

    return application, desk
