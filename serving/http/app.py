"""The HTTP routes: POST /v1/segment, GET /v1/model, /v1/openapi.json, /metrics and the page."""

import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.http import openapi, requests, responses
from serving.http.batch import BatchHandler
from serving.http.models import ModelRoutes
from serving.http.requests import Problem
from serving.http.segment import SegmentHandler
from serving.model.manager import ModelManager
from serving.settings import Settings
from serving.telemetry import metrics, tracing

WEB = Path(__file__).parents[1] / "web"
_WEB_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The page is made of the files beside it; nothing may be loaded from, or sent to, anywhere else.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)

Handler = Callable[[Request], Awaitable[Response]]


def _problem_response(problem: Problem, request_id: str) -> Response:
    detail = responses.ErrorDetail(code=problem.code, message=str(problem), request_id=request_id)
    return JSONResponse(
        responses.ErrorAnswer(error=detail).model_dump(), status_code=problem.status, headers=dict(problem.headers)
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
    start, began = time.perf_counter(), time.time_ns()
    path = request.scope["path"]
    request_id = metrics.request_id(request.headers.get("x-request-id"))
    metrics.REQUEST.set(request_id)
    request.state.answer = "none"
    code = None
    try:
        response = await _dispatch(request, routes)
    except Problem as problem:
        code = problem.code
        response = _problem_response(problem, request_id)
    except Exception as error:  # the last line: the caller gets the one error shape, the log the traceback
        code = "internal"
        metrics.failure("internal-error", error)
        response = _problem_response(
            Problem(500, "internal", "internal error; quote this request id when reporting it"), request_id
        )
    if code is not None:
        metrics.rejected(code)
        if path == "/v1/segment":
            metrics.answered(request.state.answer, response.status_code)
    response.headers["X-Request-Id"] = request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    metrics.event(
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
    if record := tracing.recorder():
        record(request, response, path if path in routes else "unknown", code, began, time.time_ns())
    return response


def _web_file(path: Path) -> Handler:
    body, media_type = path.read_bytes(), _WEB_TYPES[path.suffix]

    async def show(request: Request) -> Response:
        return Response(body, media_type=media_type, headers={"Content-Security-Policy": _PAGE_POLICY})

    return show


def build(settings: Settings, manager: ModelManager) -> tuple[ASGIApp, SegmentHandler]:
    """The ASGI application (HTTP only) over the models, and the handler to close when it ends."""
    handler = SegmentHandler(settings, manager)
    models = ModelRoutes(settings, manager)
    page = _web_file(WEB / "index.html")
    description = JSONResponse(openapi.document(settings)).body

    async def show_openapi(request: Request) -> Response:
        return Response(description, media_type="application/json")

    async def show_metrics(request: Request) -> Response:
        text = await run_in_threadpool(metrics.exposition)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    routes: dict[str, tuple[str, Handler]] = {
        "/v1/segment": ("POST", handler.answer),
        "/v1/segment/batch": ("POST", BatchHandler(handler).answer),
        "/v1/model": ("GET", models.current),
        "/v1/models": ("GET", models.show),
        "/v1/models/load": ("POST", models.load),
        "/v1/models/rollback": ("POST", models.rollback),
        "/v1/models/shadow": ("POST", models.shadow),
        "/v1/statistics": ("GET", models.statistics),
        "/v1/openapi.json": ("GET", show_openapi),
        "/metrics": ("GET", show_metrics),
        "/": ("GET", page),
        "/ui": ("GET", page),
        **{f"/web/{path.name}": ("GET", _web_file(path)) for path in WEB.iterdir() if path.suffix in _WEB_TYPES},
    }

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = await _answer(request, routes)
        if response.status_code != 413:
            return await response(scope, receive, send)
        await send({"type": "http.response.start", "status": 413, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        await requests.drain(request)
        await send({"type": "http.response.body", "body": b""})

    return application, handler
