"""The hot path: one image in, one answer out. Decode and encode in worker threads, the model in the batcher's thread.

At most `concurrency` requests are at work at once, each in one of the three phases; so while one image is in the model,
others are decoded and encoded, and a worker thread is always free for whoever is let in. The rest wait in line.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from export.bundle import Bundle
from export.runtime import Runtime, Segmentation, restored
from pipeline import fit, images
from serving import answers, limits, observe, openapi
from serving.admission import RETRY_AFTER_S, Admission
from serving.batcher import Batcher
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
_PROBE_INLINE = 1 << 20  # a header check reads all of a PNG, about 1 ms for each MiB: larger ones go to a thread

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answered:
    """A rendered answer: body, bundle id, seconds by phase, and what the metrics want to know."""

    body: bytes
    bundle: str
    timings: dict[str, float]
    shares: dict[str, float]
    confidence: float


@dataclass(frozen=True)
class Prepared:
    """A decoded image with its plan and what goes into the model: uint8 padded_height x padded_width x 3."""

    image_HWC: NDArray[np.uint8]
    plan: fit.Fit
    fitted_HWC: NDArray[np.uint8]
    spent_s: float


def prepare(data: bytes, bundle: Bundle, settings: Settings) -> Prepared:
    """The first phase: bytes to what the model takes. Raises images.Refused: the bytes are no image that we take."""
    start = time.perf_counter()
    image_HWC = images.decode(data, max_pixels=settings.max_pixels, max_aspect=settings.max_aspect)
    plan = bundle.fit(*image_HWC.shape[:2])
    return Prepared(image_HWC, plan, fit.apply(image_HWC, plan), time.perf_counter() - start)


def render(
    kind: answers.Kind, prepared: Prepared, found: Segmentation, bundle: Bundle, timings: Mapping[str, float]
) -> Answered:
    """The last phase: what was found to the body of the answer."""
    start, manifest = time.perf_counter(), bundle.manifest
    body = answers.render(kind, prepared.image_HWC, found, manifest)
    shares, _, confidence = answers.statistics(found, manifest)
    named = {item.name: shares[item.id] for item in manifest.classes}
    timings = {**timings, "encode": time.perf_counter() - start}
    return Answered(body, manifest.id, {name: timings[name] for name in observe.PHASES}, named, confidence)


def segment(data: bytes, kind: answers.Kind, runtime: Runtime, settings: Settings, submitted: float) -> Answered:
    """All three phases in the caller's thread, what the endpoint is measured against; `submitted` by perf_counter.

    Raises:
        images.Refused: the bytes are no image that we take.
    """
    queued = time.perf_counter() - submitted
    prepared = prepare(data, runtime.bundle, settings)
    start = time.perf_counter()
    label_NHW, confidence_NHW = runtime.run(prepared.fitted_HWC[None])
    timings = {"queue": queued, "decode": prepared.spent_s, "run": time.perf_counter() - start}
    return render(kind, prepared, restored(label_NHW[0], confidence_NHW[0], prepared.plan), runtime.bundle, timings)


class Job:
    """Work that somebody may stop waiting for: a phase that has begun ends, one that has not never begins."""

    def __init__(self, line: asyncio.Semaphore, work: Callable[["Job"], Coroutine[None, None, Answered]]) -> None:
        """Stand in `line`, then do `work`, which calls `step` for each phase."""
        self.dropped = False
        self._begun = False
        self._phase: Future[Any] | None = None
        self.task = asyncio.create_task(self._run(line, work))

    async def _run(self, line: asyncio.Semaphore, work: Callable[["Job"], Coroutine[None, None, Answered]]) -> Answered:
        async with line:
            self._begun = True
            return await work(self)

    async def step(self, submit: Callable[..., "Future[Result]"], *arguments: Any) -> Result:
        """The result of one phase, begun by `submit(*arguments)`; asyncio.CancelledError once the job is dropped."""
        if self.dropped:
            raise asyncio.CancelledError
        self._phase = phase = submit(*arguments)
        return await asyncio.wrap_future(phase)

    def drop(self) -> None:
        """Begin nothing more. The task ends when the phase that runs has ended: it is never cancelled inside one."""
        self.dropped = True
        if not self._begun:
            self.task.cancel()
        elif self._phase is not None:
            self._phase.cancel()  # does nothing to a phase that runs


def largest_batch(runtime: Runtime, settings: Settings) -> int:
    """How many images of one size may run together."""
    return settings.max_batch or (1 if runtime.option.device == "cpu" else 8)


class Desk:
    """Takes requests in: admission, a deadline, and the line for the three phases."""

    def __init__(self, settings: Settings, slot: Slot) -> None:
        self.settings, self.slot = settings, slot
        self.admission = Admission(settings)
        self._line = asyncio.Semaphore(settings.concurrency)
        self._workers = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="worker")
        self._batcher = Batcher(lambda runtime: largest_batch(runtime, settings), observe.batched)

    async def answer(self, request: Request) -> Response:
        """POST /v1/segment. Raises Problem."""
        limits.check_token(request, self.settings)
        query = limits.check_query(request, {"view": answers.VIEWS})
        kind = answers.negotiate(request.headers.get("accept"), query.get("view"))
        request.state.answer = kind.view
        body_kind = limits.body_kind(request)
        self._current()
        self.admission.check()
        with self.admission.body() as hold:
            data = await limits.read_body(request, self.settings, body_kind, hold)
            return self._respond(await self.process(data, kind, query), kind)

    async def process(self, data: bytes, kind: answers.Kind, query: Mapping[str, str]) -> Answered:
        """One image's bytes -> its answer, admitted and limited like every request. Raises Problem."""
        runtime = self._current()
        try:
            pixels = await self._pixels(data)
        except images.Refused as error:
            raise _problem(error) from error
        self.admission.enter(pixels)
        job = Job(self._line, functools.partial(self._work, data, kind, runtime, time.perf_counter()))
        job.task.add_done_callback(lambda task: self._ended(job, task, pixels))
        return await self._wait(job)

    async def _pixels(self, data: bytes) -> int:
        """Width times height by the header. Raises images.Refused."""
        look = functools.partial(images.open_header, data, self.settings.max_pixels)
        _, header = await asyncio.to_thread(look) if len(data) > _PROBE_INLINE else look()
        return header.size[0] * header.size[1]

    async def _work(self, data: bytes, kind: answers.Kind, runtime: Runtime, queued: float, job: Job) -> Answered:
        """The three phases; `queued` is when the request was admitted (perf_counter)."""
        begun, bundle = time.perf_counter(), runtime.bundle
        prepared = await job.step(self._workers.submit, prepare, data, bundle, self.settings)
        ran = await job.step(self._batcher.submit, runtime, prepared.fitted_HWC)
        timings = {"queue": begun - queued + ran.waited_s, "decode": prepared.spent_s, "run": ran.ran_s}

        def finish() -> Answered:
            found = restored(ran.label_HW, ran.confidence_HW, prepared.plan)
            if shadow := self.slot.shadow:
                shadow.offer(prepared.image_HWC, found.label_HW, bundle.manifest)
            return render(kind, prepared, found, bundle, timings)

        return await job.step(self._workers.submit, finish)

    def _ended(self, job: Job, task: "asyncio.Task[Answered]", pixels: int) -> None:
        """Only now is the place free: not when somebody stopped waiting, but when the work has ended."""
        self.admission.leave(pixels)
        if task.cancelled():
            return
        error = task.exception()
        if job.dropped and error is not None:
            observe.failure("late-error", error)

    async def _wait(self, job: Job) -> Answered:
        try:
            return await asyncio.wait_for(asyncio.shield(job.task), self.settings.timeout_s)
        except TimeoutError as error:
            raise Problem(504, "deadline", f"not done within {self.settings.timeout_s:g} seconds; try again") from error
        except images.Refused as error:
            raise _problem(error) from error
        finally:
            if not job.task.done():
                job.drop()

    def _respond(self, done: Answered, kind: answers.Kind) -> Response:
        observe.answered(kind.view, 200, done.timings)
        observe.segmented(done.shares, done.confidence, done.bundle)
        headers = {
            "X-Bundle-Id": done.bundle,
            "Server-Timing": answers.server_timing(done.timings),
            "Vary": "Accept",
        }
        return Response(done.body, media_type=kind.media_type, headers=headers)

    def _current(self) -> Runtime:
        """The model that answers now. Raises Problem(503)."""
        runtime = self.slot.runtime
        if runtime is None:
            raise Problem(503, "no-model", "no model is loaded yet; try again", {"Retry-After": str(RETRY_AFTER_S)})
        return runtime

    async def model(self, request: Request) -> Response:
        """GET /v1/model: what is being served."""
        limits.check_token(request, self.settings)
        limits.check_query(request, {})
        facts = openapi.model_answer(self._current())
        return Response(facts.model_dump_json(), media_type="application/json")

    def close(self) -> None:
        """Let the running work end and drop what waits."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._batcher.close()


def _problem(error: images.Refused) -> Problem:
    return Problem(_STATUS.get(error.code, 400), error.code, str(error))
