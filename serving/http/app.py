"""The HTTP routes: POST /v1/segment, GET /v1/model, /v1/openapi.json, /metrics and the page."""

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from serving.access import origins
from serving.access.tokens import Role, Roles
from serving.http import openapi, requests, responses
from serving.http.batch import BatchHandler
from serving.http.models import ModelRoutes
from serving.http.requests import Problem
from serving.http.segment import SegmentHandler
from serving.jobs import routes as jobs
from serving.jobs.routes import JobRoutes
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

_JOB = re.compile(rf"{jobs.PATH}/([A-Za-z0-9_-]{{1,64}})(|/result)", re.ASCII)

Handler = Callable[[Request], Awaitable[Response]]


class Route(NamedTuple):
    """What answers a path, by which methods (GET first, where it is one), and whose token it takes where there are tokens."""

    methods: str
    handler: Handler
    role: Role = "anyone"


def _problem_response(problem: Problem, request_id: str) -> Response:
    detail = responses.ErrorDetail(code=problem.code, message=str(problem), request_id=request_id)
    return JSONResponse(
        responses.ErrorAnswer(error=detail).model_dump(), status_code=problem.status, headers=dict(problem.headers)
    )


async def _dispatch(request: Request, routes: Mapping[str, Route], roles: Roles) -> Response:
    """By exact path, so that a path of any bytes gets its 404 here. Raises Problem."""
    path = _template(request)
    if path not in routes:
        raise Problem(404, "not-found", "nothing here; see /v1/openapi.json")
    methods, handler, role = routes[path]
    allowed = methods.split(", ")
    if request.method not in allowed and (request.method, "GET") != ("HEAD", allowed[0]):
        raise Problem(405, "method", f"use {' or '.join(allowed)} here", {"Allow": methods})
    roles.check(request, role)
    return await handler(request)


def _template(request: Request) -> str:
    """The path as the routes have it: of one job with {id}, which the handler finds among the path's parameters."""
    path: str = request.scope["path"]
    if found := _JOB.fullmatch(path):
        request.scope["path_params"] = {"id": found[1]}
        return f"{jobs.PATH}/{{id}}{found[2]}"
    return path


async def _answer(request: Request, routes: Mapping[str, Route], roles: Roles) -> Response:
    """Every answer gets its request id and a log line; every failure the one error shape."""
    start = time.perf_counter()
    began_ns = time.time_ns()
    request_id = metrics.request_id(request.headers.get("x-request-id"))
    metrics.REQUEST.set(request_id)
    request.state.answer = "none"

    code = None
    try:
        response = await _dispatch(request, routes, roles)
    except Exception as error:
        problem = _as_problem(error)
        code = problem.code
        response = _problem_response(problem, request_id)
        _count_problem(request, problem)

    response.headers["X-Request-Id"] = request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    _log(request, response, code, time.perf_counter() - start)
    if recorder := tracing.recorder():
        path = _template(request)
        route = path if path in routes else "unknown"
        recorder.record(tracing.FinishedRequest(request, response, route, code, began_ns, time.time_ns()))
    return response


def _as_problem(error: Exception) -> Problem:
    """Of an unexpected error the caller gets the one error shape, and the log the traceback."""
    if isinstance(error, Problem):
        return error
    metrics.failure("internal-error", error)
    return Problem(500, "internal", "internal error; quote this request id when reporting it")


def _count_problem(request: Request, problem: Problem) -> None:
    metrics.rejected(problem.code)
    if request.scope["path"] == "/v1/segment":
        metrics.answered(request.state.answer, problem.status)


def _log(request: Request, response: Response, code: str | None, spent_s: float) -> None:
    metrics.event(
        "request",
        request_id=response.headers["x-request-id"],
        method=request.method[:16],
        path=request.scope["path"][:200],
        status=response.status_code,
        code=code,
        answer=request.state.answer,
        bundle=response.headers.get("x-bundle-id"),
        ms=round(spent_s * 1e3, 2),
    )


def _constant(body: bytes, media_type: str, headers: Mapping[str, str] | None = None) -> Handler:
    """A route that always answers the same."""

    async def show(request: Request) -> Response:
        return Response(body, media_type=media_type, headers=headers)

    return show


async def _show_metrics(request: Request) -> Response:
    text = await run_in_threadpool(metrics.exposition)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _answers(
    settings: Settings, manager: ModelManager, segment: SegmentHandler, job_routes: JobRoutes
) -> dict[str, Route]:
    """What callers ask."""
    return {
        "/v1/jobs": Route("GET, POST", job_routes.collection, "caller"),
        "/v1/jobs/{id}": Route("GET, DELETE", job_routes.item, "caller"),
        "/v1/jobs/{id}/result": Route("GET", job_routes.result, "caller"),
        "/v1/segment": Route("POST", segment.answer, "caller"),
        "/v1/segment/batch": Route("POST", BatchHandler(segment).answer, "caller"),
        "/v1/model": Route("GET", ModelRoutes(settings, manager).current, "caller"),
    }


def _operations(settings: Settings, manager: ModelManager) -> dict[str, Route]:
    """What operators and their machines ask."""
    models = ModelRoutes(settings, manager)
    return {
        "/v1/models": Route("GET", models.show, "caller"),
        "/v1/models/load": Route("POST", models.load, "operator"),
        "/v1/models/rollback": Route("POST", models.rollback, "operator"),
        "/v1/models/shadow": Route("POST", models.shadow, "operator"),
        "/v1/statistics": Route("GET", models.statistics, "caller"),
        "/metrics": Route("GET", _show_metrics),
    }


def _with_description(settings: Settings, routes: dict[str, Route]) -> dict[str, Route]:
    """The routes, and the one that describes them."""
    described = JSONResponse(openapi.document(settings, {*routes, "/v1/openapi.json"})).body
    return routes | {"/v1/openapi.json": Route("GET", _constant(bytes(described), "application/json"))}


def _probe(state: Callable[[], bool], good: str, bad: str) -> Route:
    async def show(request: Request) -> Response:
        return PlainTextResponse(good + "\n") if state() else PlainTextResponse(bad + "\n", 503)

    return Route("GET", show)


def _web_files() -> dict[str, Route]:
    """The page, and the files that it is made of."""
    policy = {"Content-Security-Policy": _PAGE_POLICY}
    files = [path for path in WEB.iterdir() if path.suffix in _WEB_TYPES]
    shown = {path.name: Route("GET", _constant(path.read_bytes(), _WEB_TYPES[path.suffix], policy)) for path in files}
    page = shown["index.html"]
    return {"/": page, "/ui": page} | {f"/web/{name}": route for name, route in shown.items()}


async def _send_and_drain(response: Response, request: Request, send: Send) -> None:
    """Answer while the body still comes: what is thrown away of it lies between the answer's body and its end."""
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
    await requests.drain(request)
    await send({"type": "http.response.body", "body": b""})


def _application(settings: Settings, routes: Mapping[str, Route]) -> ASGIApp:
    roles = Roles(settings)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = await _answer(request, routes, roles)
        if response.status_code == 413:
            await _send_and_drain(response, request, send)
        else:
            await response(scope, receive, send)

    return application


class Built(NamedTuple):
    """The ASGI application (HTTP only) over the models; the handler to close when it ends; the jobs to start and stop."""

    application: ASGIApp
    segment: SegmentHandler
    jobs: JobRoutes


def build(settings: Settings, manager: ModelManager) -> Built:
    """The application and what belongs to it.

    Where there is an address for operators, it leaves out what `build_admin` answers.

    Raises:
        SettingsError: a file of tokens is absent or has none.
    """
    segment = SegmentHandler(settings, manager)
    job_routes = JobRoutes(settings, segment)
    routes = _answers(settings, manager, segment, job_routes)
    if settings.admin is None:
        routes |= _operations(settings, manager)
    application = _application(settings, _with_description(settings, routes) | _web_files())
    application = origins.admit(application, settings)
    if settings.proxies:
        application = behind_proxies(application, settings.proxies)
    return Built(application, segment, job_routes)


def behind_proxies(application: ASGIApp, proxies: list[str]) -> ASGIApp:
    """The application, for which a client's address is the one that these proxies forward."""
    # Two libraries' names for the same ASGI types.
    return cast(ASGIApp, ProxyHeadersMiddleware(cast(Any, application), proxies))


def build_admin(
    settings: Settings, manager: ModelManager, is_ready: Callable[[], bool], is_alive: Callable[[], bool]
) -> ASGIApp:
    """The application for operators: probes, metrics, statistics, and changes of the model.

    Raises:
        SettingsError: as `build`.
    """
    ready = _probe(is_ready, "ready", "not ready")
    alive = _probe(is_alive, "alive", "a restart is needed")
    probes = {"/livez": alive, "/healthz": alive, "/readyz": ready}
    return _application(settings, _with_description(settings, _operations(settings, manager)) | probes)
