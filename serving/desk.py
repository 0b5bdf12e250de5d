"""The hot path: one image in, one answer out, through bounded admission, a deadline and a pool of worker threads."""

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from export.runtime import Runtime
from pipeline import images
from serving import answers, limits, observe, openapi
from serving.limits import Problem
from serving.settings import Settings
from serving.slots import Slot

_STATUS = {
    "unsupported-format": 415,
    "unsupported-depth": 415,
    "animated": 415,
    "too-many-pixels": 422,
    "bad-aspect": 422,
}
_RETRY_AFTER_S = 1


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
