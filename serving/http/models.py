"""Routes about the models: which are held, load one, go back, run one in the shadow; and their statistics."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from export.bundle.bundle import BundleError
from export.runtime.runtime import ProviderError, Runtime
from serving.http import requests
from serving.http.requests import Problem
from serving.model import champion, checks
from serving.model.card import ModelAnswer, ModelCard, ShadowCard
from serving.model.claim import Claim
from serving.model.events import Candidate, ModelEvent
from serving.model.manager import Busy, ModelManager, NoPrevious
from serving.settings import Settings
from serving.telemetry import metrics

LARGEST_BODY = 16 << 10
CHANGES = ("/v1/models/load", "/v1/models/rollback", "/v1/models/shadow")
RETRY_AFTER_S = 2
Asked = TypeVar("Asked", bound=BaseModel)


class LoadRequest(BaseModel):
    """The body of POST /v1/models/load: a bundle's folder below the allowed one."""

    model_config = ConfigDict(extra="forbid", strict=True)
    bundle: str
    allow_class_change: bool = False


class ShadowRequest(BaseModel):
    """The body of POST /v1/models/shadow; null ends the shadow."""

    model_config = ConfigDict(extra="forbid", strict=True)
    bundle: str | None


class ModelsAnswer(BaseModel):
    """The answer of GET /v1/models and of the routes that change it; the newest event is last."""

    current: ModelCard | None
    previous: ModelCard | None
    candidate: Candidate | None
    shadow: ShadowCard | None
    events: list[ModelEvent]


def describe(manager: ModelManager, settings: Settings) -> ModelsAnswer:
    """What is held now."""

    def path(runtime: Runtime) -> str:
        return champion.shown(settings, runtime.bundle.folder)

    current, previous = manager.models()
    candidate = manager.candidate
    shadow = None
    if running := manager.shadow:
        opened = running.opened.result()
        shadow = ShadowCard.of(opened, path(opened), **dict(running.report()))
    return ModelsAnswer(
        current=ModelCard.of(current, path(current)) if current else None,
        previous=ModelCard.of(previous, path(previous)) if previous else None,
        candidate=candidate and candidate.model_copy(update={"path": champion.shown(settings, candidate.path)}),
        shadow=shadow,
        events=manager.events.newest(),
    )


async def read_json(request: Request, shape: type[Asked], settings: Settings) -> Asked:
    """A small JSON body. Raises Problem: 415 another type, 413 too large, 408 too slow, 400 not what is asked for."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "unsupported-type", "send a JSON object with Content-Type: application/json")
    body, loop = bytearray(), asyncio.get_running_loop()
    pace = requests.Pace(settings, loop.time())
    with requests.arriving(request):
        async with asyncio.timeout_at(pace.deadline) as clock:
            async for piece in request.stream():
                body += piece
                clock.reschedule(pace.came(len(piece), loop.time()))
                if len(body) > LARGEST_BODY:
                    raise Problem(
                        413, "body-too-large", f"over the limit of {LARGEST_BODY} bytes", {"Connection": "close"}
                    )
    try:
        return shape.model_validate_json(bytes(body))
    except ValidationError as error:
        fields = ", ".join(f"{name}: {field.annotation}" for name, field in shape.model_fields.items())
        first = error.errors(include_input=False)[0]["loc"]
        where = first[0] if first and first[0] in shape.model_fields else "the body"
        raise Problem(400, "bad-json", f"{where} is not as expected; send a JSON object with {fields}") from error


def in_thread(work: Callable[[], None]) -> "Future[None]":
    """Run in a thread that does not keep the process alive: a candidate that hangs must not stop the service's end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # handed to the one who waits
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="model-load", daemon=True).start()
    return future


class _Operation(NamedTuple):
    """A route as OpenAPI has it: the names of the schemas of its answer and of its body, the statuses of its errors."""

    method: str
    id: str
    summary: str
    answer: str
    errors: str
    body: str | None = None

    def describe(self, errors: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """The OpenAPI operation; `errors` describes the error answers of given statuses."""
        responses = {"200": {"description": self.summary, "content": _json_content(self.answer)}}
        described: dict[str, Any] = {"operationId": self.id, "summary": self.summary}
        if self.body:
            described |= {"requestBody": {"required": True, "content": _json_content(self.body)}}
        return described | {"responses": responses | errors(*self.errors.split())}


def _json_content(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


_READ = "400 401 405"
_CHANGE = "400 401 403 404 405 408 409 413 415 422 504"
_OPERATIONS = {
    "/v1/models": _Operation("get", "models", "Which models are held", "ModelsAnswer", _READ),
    "/v1/models/load": _Operation(
        "post", "load", "Put another bundle in place, if it passes", "ModelsAnswer", _CHANGE, "LoadRequest"
    ),
    "/v1/models/rollback": _Operation(
        "post", "rollback", "Back to the previous model", "ModelsAnswer", "400 401 403 405 409"
    ),
    "/v1/models/shadow": _Operation(
        "post", "shadow", "Compare another bundle in the shadow", "ModelsAnswer", _CHANGE, "ShadowRequest"
    ),
    "/v1/statistics": _Operation(
        "get", "statistics", "Prediction statistics, by bundle and window of time", "ServedStatistics", _READ
    ),
}


def operations(errors: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The OpenAPI paths of this file; `errors` describes the error answers of given statuses."""
    return {path: {operation.method: operation.describe(errors)} for path, operation in _OPERATIONS.items()}


class ModelRoutes:
    """The handlers."""

    def __init__(self, settings: Settings, manager: ModelManager) -> None:
        self._settings = settings
        self._manager = manager

    def _answer(self) -> Response:
        return Response(describe(self._manager, self._settings).model_dump_json(), media_type="application/json")

    @contextlib.asynccontextmanager
    async def _problems(self) -> AsyncIterator[None]:
        try:
            yield
        except Busy as error:
            raise Problem(409, "busy", str(error), {"Retry-After": str(RETRY_AFTER_S)}) from error
        except NoPrevious as error:
            raise Problem(409, "no-previous", str(error)) from error
        except champion.PathError as error:
            raise Problem(400, "bad-bundle-path", f"bundle: {error}") from error
        except FileNotFoundError as error:
            raise Problem(404, "no-bundle", f"bundle: {champion.shown(self._settings, error)}") from error
        except (checks.CandidateRefused, BundleError, ProviderError, OSError) as error:
            reason = champion.shown(self._settings, error)
            raise Problem(422, "bundle-refused", f"the model that is served stays: {reason}") from error

    async def _wait(self, work: Callable[[Claim], None]) -> None:
        """Until it is done or the time is up. The claim is one side's only: either the swap happens or the answer is 504."""
        claim = Claim()
        done = asyncio.wrap_future(in_thread(lambda: work(claim)))
        await asyncio.wait({done}, timeout=self._settings.load_timeout_s)
        if not done.done() and claim.take():
            done.add_done_callback(lambda future: future.exception())  # retrieved, so that asyncio does not complain
            raise Problem(
                504,
                "deadline",
                f"not ready within {self._settings.load_timeout_s:g} seconds, the model that is served stays; "
                "raise MARGINALIA_LOAD_TIMEOUT_S",
            )
        await done

    async def current(self, request: Request) -> Response:
        """GET /v1/model: what is being served. Raises Problem."""
        requests.check_query(request, {})
        runtime = self._manager.current
        if runtime is None:
            raise requests.no_model()
        return Response(ModelAnswer.of(runtime).model_dump_json(), media_type="application/json")

    async def show(self, request: Request) -> Response:
        """GET /v1/models."""
        requests.check_query(request, {})
        return self._answer()

    async def load(self, request: Request) -> Response:
        """POST /v1/models/load: answers when the model is served, or not. Raises Problem."""
        requests.check_query(request, {})
        asked = await read_json(request, LoadRequest, self._settings)
        async with self._problems():
            folder = champion.named(self._settings, asked.bundle)
            await self._wait(
                lambda claim: self._manager.load(folder, allow_class_change=asked.allow_class_change, claim=claim)
            )
        return self._answer()

    async def rollback(self, request: Request) -> Response:
        """POST /v1/models/rollback. Raises Problem."""
        requests.check_query(request, {})
        async with self._problems():
            self._manager.rollback()
        return self._answer()

    async def shadow(self, request: Request) -> Response:
        """POST /v1/models/shadow. Raises Problem."""
        requests.check_query(request, {})
        asked = await read_json(request, ShadowRequest, self._settings)
        async with self._problems():
            if asked.bundle is None:
                await self._wait(lambda claim: self._manager.end_shadow())
            else:
                folder = champion.named(self._settings, asked.bundle)
                await self._wait(lambda claim: self._manager.start_shadow(folder, claim))
        return self._answer()

    async def statistics(self, request: Request) -> Response:
        """GET /v1/statistics: `pipeline.storage.served_statistics.ServedStatistics`."""
        requests.check_query(request, {})
        return Response(await run_in_threadpool(metrics.STATISTICS.text), media_type="application/json")
