"""The hot path: one image in, one answer out. Decode, run and encode in one worker thread of several.

At most `concurrency` requests are at work at once, two of them at the model (`serving.model.batcher`); while these run, others
are decoded and encoded. The rest wait in line, and who has stopped waiting is dropped from where the work has not begun.
"""

import asyncio
import contextlib
import contextvars
import functools
import io
import math
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from export.bundle.bundle import Bundle, BundleError
from export.runtime.runtime import Runtime, Segmentation, restored
from pipeline.imaging import decode, large_image, resize
from serving.http import large_images, requests, responses, spool
from serving.http.admission import RETRY_AFTER_S, Admission
from serving.http.negotiate import Kind, negotiate
from serving.http.query import Query, parse
from serving.http.requests import Problem
from serving.model.batcher import Batcher, Dropped, Job, Ran
from serving.model.card import ModelAnswer
from serving.model.manager import ModelManager
from serving.settings import Settings
from serving.telemetry import metrics

_STATUS = {
    "unsupported-format": 415,
    "unsupported-depth": 415,
    "animated": 415,
    "too-many-pixels": 422,
    "bad-aspect": 422,
    "too-detailed": 422,
    "body-too-large": 413,
}
_PROBE_INLINE = 1 << 20  # a header check reads all of a PNG, about 1 ms for each MiB: larger ones go to a thread

Gone = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Answered:
    """A rendered answer: body, bundle id, seconds by phase; shares of the image by class name and mean confidence, of all
    that the model saw (what the metrics want to know) and of what was asked for (what the headers say)."""

    body: bytes
    bundle: str
    timings: dict[str, float]
    shares: dict[str, float]
    confidence: float
    asked_shares: dict[str, float]
    asked_confidence: float


@dataclass(frozen=True)
class Prepared:
    """A decoded image with its plan and what goes into the model: uint8 padded_height x padded_width x 3."""

    image_HWC: NDArray[np.uint8]
    plan: resize.Fit
    fitted_HWC: NDArray[np.uint8]
    spent_s: float


def prepare(data: bytes, bundle: Bundle, settings: Settings) -> Prepared:
    """The first phase: bytes to what the model takes. Raises images.Refused: the bytes are no image that we take."""
    start = time.perf_counter()
    image_HWC = decode.decode(data, max_pixels=settings.max_whole_pixels, max_aspect=settings.max_aspect)
    plan = bundle.fit(*image_HWC.shape[:2])
    return Prepared(image_HWC, plan, resize.apply(image_HWC, plan), time.perf_counter() - start)


def render(
    kind: Kind, query: Query, prepared: Prepared, found: Segmentation, bundle: Bundle, timings: Mapping[str, float]
) -> Answered:
    """The last phase: what was found to the body of the answer."""
    start = time.perf_counter()
    done = responses.render(kind, prepared.image_HWC, found, bundle.manifest, query)
    return answered(done, {**timings, "encode": time.perf_counter() - start}, bundle)


def answered(done: responses.Rendered, timings: Mapping[str, float], bundle: Bundle) -> Answered:
    """What goes out and what is counted, by class names."""
    manifest = bundle.manifest
    seen, asked = ({c.name: part.shares[c.id] for c in manifest.classes} for part in (done.seen, done.asked))
    timings = {name: timings[name] for name in metrics.PHASES}
    return Answered(done.body, manifest.id, timings, seen, done.seen.confidence, asked, done.asked.confidence)


def segment(
    data: bytes, kind: Kind, runtime: Runtime, settings: Settings, submitted: float, query: Query | None = None
) -> Answered:
    """All three phases in the caller's thread, what the endpoint is measured against; `submitted` by perf_counter.

    Raises:
        images.Refused: the bytes are no image that we take.
    """
    queued = time.perf_counter() - submitted
    prepared = prepare(data, runtime.bundle, settings)
    start = time.perf_counter()
    label_NHW, confidence_NHW = runtime.run(prepared.fitted_HWC[None])
    timings = {"queue": queued, "decode": prepared.spent_s, "run": time.perf_counter() - start}
    found = restored(label_NHW[0], confidence_NHW[0], prepared.plan)
    return render(kind, query or Query(), prepared, found, runtime.bundle, timings)


def note(done: Answered, kind: Kind) -> None:
    """Count an answer that goes out."""
    metrics.answered(kind.view, 200, done.timings)
    metrics.segmented(done.shares, done.confidence, done.bundle)


def largest_batch(runtime: Runtime, settings: Settings) -> int:
    """How many images of one size may run together: MARGINALIA_MAX_BATCH, else 8 on a card and 1 on the processor.

    There a batch of 8 ran 1.03 to 1.45 times as many images a second as one by one (2 cores under other load, ONNX
    Runtime and OpenVINO, DeepLabV3+ at 128 x 128 to 384 x 512): less than pays for the first of the 8 waiting for all.
    """
    return settings.max_batch or (1 if runtime.option.device == "cpu" else 8)


class Desk:
    """Takes requests in: admission, a deadline, and the line for the three phases."""

    def __init__(self, settings: Settings, manager: ModelManager) -> None:
        self.settings, self.manager = settings, manager
        self.admission = Admission(settings)
        self._workers = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="worker")
        self._batcher = Batcher(lambda runtime: largest_batch(runtime, settings), metrics.batched)
        self.on_lost: Callable[[], None] = lambda: None
        self._lost: Runtime | None = None
        self._testing = False

    @property
    def waiting(self) -> int:
        """Images that are decoded and wait for the model."""
        return self._batcher.waiting

    @property
    def healthy(self) -> bool:
        """False once the model that is served fails also on what it passed when it was loaded: a lost card, say."""
        return self._lost is None or self._lost is not self.manager.current

    async def answer(self, request: Request) -> Response:
        """POST /v1/segment. Raises Problem."""
        requests.check_token(request, self.settings)
        query = parse(request.query_params.multi_items(), self.settings)
        kind = negotiate(request.headers.get("accept"), query.view)
        request.state.answer = kind.view
        body_kind = requests.body_kind(request)
        self.check(query)
        self.admission.check()
        with contextlib.ExitStack() as held:
            hold = held.enter_context(self.admission.body())
            data = await spool.read_body(request, self.settings, body_kind, hold)
            gone = functools.partial(requests.gone, request)
            return self._respond(await self.process(data, kind, query, gone, held), kind)

    def check(self, query: Query) -> None:
        """Refuse what the current model cannot answer, before the body is read. Raises Problem."""
        query.class_ids(self._current().bundle.manifest)

    async def process(
        self,
        data: bytes | BinaryIO,
        kind: Kind,
        query: Query,
        gone: Gone | None = None,
        held: contextlib.ExitStack | None = None,
    ) -> Answered:
        """One image's bytes -> its answer, admitted and limited like every request.

        `gone()` returns when nobody waits any more; then, as after the deadline, no further phase is begun.
        What the caller has `held` for the image is taken over in both cases, and let go when the work has ended.

        Raises:
            Problem: what the bytes are, no room, too late, or gone.
        """
        runtime = self._current()
        try:
            pixels = await self._pixels(data)
        except decode.Refused as error:
            raise _problem(error) from error
        in_bands = large_images.takes(pixels, query, self.settings)
        pixels = max(pixels, math.prod(query.pixels() or (0,)))  # the answer may be asked for larger
        pixels = min(pixels, self.settings.large_pixels)  # a huge one is never held
        self.admission.enter(pixels)
        job, phases = Job(data), self._work_in_bands if in_bands else self._work
        work = self._workers.submit(phases, job, kind, query, runtime, time.perf_counter())
        timeout_s = self.settings.large_timeout_s if in_bands else self.settings.timeout_s
        return await self._wait(job, work, pixels, gone, timeout_s, held)

    async def _pixels(self, data: bytes | BinaryIO) -> int:
        """Width times height by the header. Raises images.Refused."""
        if not isinstance(data, bytes):
            return (
                await asyncio.to_thread(large_image.open_picture, data, large_images.image_limits(self.settings))
            ).pixels
        look = functools.partial(decode.open_header, data, self.settings.max_pixels)
        _, header = await asyncio.to_thread(look) if len(data) > _PROBE_INLINE else look()
        return header.size[0] * header.size[1]

    def _work(self, job: Job, kind: Kind, query: Query, runtime: Runtime, queued: float) -> Answered:
        """The three phases in a worker thread; `queued` is when the request was admitted (perf_counter)."""
        queue_s = time.perf_counter() - queued
        data = job.data  # in this order: it is gone once the job is dropped
        job.check()
        whole = data if isinstance(data, bytes) else spool.read_whole(data, self.settings)
        prepared = prepare(whole, runtime.bundle, self.settings)
        job.check()
        ran = self._run(runtime, prepared.fitted_HWC, job)
        job.check()
        found = restored(ran.label_HW, ran.confidence_HW, prepared.plan)
        timings = {"queue": queue_s + ran.waited_s, "decode": prepared.spent_s, "run": ran.ran_s}
        if shadow := self.manager.shadow:
            shadow.offer(prepared.image_HWC, found.label_HW, runtime.bundle.manifest)
        return render(kind, query, prepared, found, runtime.bundle, timings)

    def _work_in_bands(self, job: Job, kind: Kind, query: Query, runtime: Runtime, queued: float) -> Answered:
        """As `_work`, for what `serving.http.large_images` takes; its windows meet other images at the model."""
        queue_s = time.perf_counter() - queued
        data = job.data  # as there
        job.check()
        file = io.BytesIO(data) if isinstance(data, bytes) else data

        def run(image_HWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
            ran = self._run(runtime, image_HWC, job)
            return ran.label_HW, ran.confidence_HW

        done, timings = large_images.segment(file, kind, query, runtime.bundle, run, self.settings, job.check)
        return answered(done, {"queue": queue_s, **timings}, runtime.bundle)

    def _run(self, runtime: Runtime, image_HWC: NDArray[np.uint8], job: Job) -> Ran:
        try:
            return self._batcher.run(runtime, image_HWC, job)
        except Dropped:
            raise
        except Exception:
            self._doubt(runtime)
            raise

    async def _wait(
        self,
        job: Job,
        work: "Future[Answered]",
        pixels: int,
        gone: Gone | None,
        timeout_s: float,
        held: contextlib.ExitStack | None,
    ) -> Answered:
        """The place is free when the work has ended, not when somebody has stopped waiting for it."""
        loop, answer = asyncio.get_running_loop(), asyncio.wrap_future(work)
        watcher = asyncio.ensure_future(gone()) if gone else None
        waiting: set[asyncio.Future[Any]] = {answer, watcher} if watcher else {answer}
        try:
            done, _ = await asyncio.wait(waiting, timeout=timeout_s, return_when=FIRST_COMPLETED)
            if answer in done:
                return answer.result()
        except decode.Refused as error:
            raise _problem(error) from error
        finally:
            if watcher:
                watcher.cancel()
            if answer.done():
                self.admission.leave(pixels)
            else:
                answer.cancel()  # and with it the work, if that has not begun
                self._batcher.drop(job)
                late = functools.partial(self._late, work, pixels, held.pop_all() if held else None)
                context = contextvars.copy_context()  # it knows the request id
                work.add_done_callback(lambda _: loop.call_soon_threadsafe(late, context=context))
        if done:
            raise Problem(499, "disconnected", "the connection was closed before the answer was there")
        raise Problem(504, "deadline", f"not done within {timeout_s:g} seconds; try again")

    def _late(self, work: "Future[Answered]", pixels: int, held: contextlib.ExitStack | None) -> None:
        self.admission.leave(pixels)
        if held:
            held.close()
        error = None if work.cancelled() else work.exception()
        if error is not None and not isinstance(error, Dropped):
            metrics.failure("late-error", error)  # the caller has had another answer

    def _doubt(self, runtime: Runtime) -> None:
        """A run failed: was it that image, or is the model gone? `on_lost` is called in the second case."""
        if not self._testing:
            self._testing = True
            with contextlib.suppress(RuntimeError):  # the pool is closing
                self._workers.submit(self._put_to_test, runtime)

    def _put_to_test(self, runtime: Runtime) -> None:
        try:
            runtime.warm_up()
        except BundleError as error:
            self._lost = runtime
            metrics.failure("model-lost", error, bundle=runtime.bundle.manifest.id)
            metrics.ready(self.healthy)
            self.on_lost()
        finally:
            self._testing = False

    def _respond(self, done: Answered, kind: Kind) -> Response:
        note(done, kind)
        headers = {
            "X-Bundle-Id": done.bundle,
            "X-Class-Areas": responses.class_areas(done.asked_shares),
            "X-Confidence": f"{done.asked_confidence:.4f}",
            "Server-Timing": responses.server_timing(done.timings),
            "Vary": "Accept",
        }
        return Response(done.body, media_type=kind.media_type, headers=headers)

    def _current(self) -> Runtime:
        """The model that answers now. Raises Problem(503)."""
        runtime = self.manager.current
        if runtime is None:
            raise Problem(503, "no-model", "no model is loaded yet; try again", {"Retry-After": str(RETRY_AFTER_S)})
        return runtime

    async def model(self, request: Request) -> Response:
        """GET /v1/model: what is being served."""
        requests.check_token(request, self.settings)
        requests.check_query(request, {})
        facts = ModelAnswer.of(self._current())
        return Response(facts.model_dump_json(), media_type="application/json")

    def close(self) -> None:
        """Let the running work end and drop what waits."""
        self._workers.shutdown(wait=True, cancel_futures=True)


def _problem(error: decode.Refused) -> Problem:
    return Problem(_STATUS.get(error.code, 400), error.code, str(error))
