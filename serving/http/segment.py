"""The hot path: one image in, one answer out. Decode, run and encode in one worker thread of several.

At most `concurrency` ordinary requests are at work at once, and others in lanes of their own (`serving.admission`); two are at
the model (`serving.model.batcher`), and while these run, others are decoded and encoded. The rest wait in line, and work that
is no longer waited for is dropped where it has not begun.
"""

import asyncio
import contextlib
import contextvars
import functools
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

from export.bundle.bundle import Bundle
from export.runtime.runtime import Runtime, Segmentation, restored
from pipeline.imaging import decode, resize
from serving.admission import cost
from serving.admission.admission import Admission
from serving.admission.clients import Clients
from serving.admission.cost import Cost
from serving.admission.lanes import Place
from serving.http import large_images, requests, responses, spool
from serving.http.large_images import WindowModel
from serving.http.negotiate import Kind, negotiate
from serving.http.query import Query, parse
from serving.http.requests import Problem
from serving.http.responses import SegmentResult
from serving.model.batcher import Batcher, Dropped, ImageJob, ModelRun
from serving.model.health import ModelHealth
from serving.model.manager import ModelManager
from serving.settings import Settings
from serving.telemetry import metrics

_PROBE_INLINE = 1 << 20  # a header check reads all of a PNG, about 1 ms for each MiB: larger ones go to a thread

Gone = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class PreparedImage:
    """A decoded image with its plan and what goes into the model: uint8 padded_height x padded_width x 3."""

    image_HWC: NDArray[np.uint8]
    plan: resize.Fit
    fitted_HWC: NDArray[np.uint8]
    spent_s: float


def prepare(data: bytes, bundle: Bundle, settings: Settings) -> PreparedImage:
    """The first phase: bytes to what the model takes. Raises decode.Refused: the bytes are no image that we take."""
    start = time.perf_counter()
    image_HWC = decode.decode(data, max_pixels=settings.max_whole_pixels, max_aspect=settings.max_aspect)
    plan = bundle.fit(*image_HWC.shape[:2])
    return PreparedImage(image_HWC, plan, resize.apply(image_HWC, plan), time.perf_counter() - start)


def render(
    kind: Kind,
    query: Query,
    prepared: PreparedImage,
    segmentation: Segmentation,
    bundle: Bundle,
    timings: Mapping[str, float],
) -> SegmentResult:
    """The last phase: the model's answer to the body of ours."""
    start = time.perf_counter()
    rendered = responses.render(kind, prepared.image_HWC, segmentation, bundle.manifest, query)
    return SegmentResult.of(rendered, {**timings, "encode": time.perf_counter() - start}, bundle)


def segment(
    data: bytes, kind: Kind, runtime: Runtime, settings: Settings, submitted: float, query: Query | None = None
) -> SegmentResult:
    """All three phases in the caller's thread, what the endpoint is measured against; `submitted` by perf_counter.

    Raises:
        decode.Refused: the bytes are no image that we take.
    """
    queued = time.perf_counter() - submitted
    prepared = prepare(data, runtime.bundle, settings)

    start = time.perf_counter()
    label_NHW, confidence_NHW = runtime.run(prepared.fitted_HWC[None])
    timings = {"queue": queued, "decode": prepared.spent_s, "run": time.perf_counter() - start}

    segmentation = restored(label_NHW[0], confidence_NHW[0], prepared.plan)
    return render(kind, query or Query(), prepared, segmentation, runtime.bundle, timings)


def count_answer(result: SegmentResult, kind: Kind) -> None:
    """Count an answer that goes out."""
    metrics.answered(kind.view, 200, result.timings)
    metrics.segmented(result.shares, result.confidence, result.bundle)


def largest_batch(runtime: Runtime, settings: Settings) -> int:
    """How many images of one size may run together: MARGINALIA_MAX_BATCH, else 8 on a GPU and 1 on the CPU.

    There a batch of 8 ran 1.03 to 1.45 times as many images a second as one by one (2 cores under other load, ONNX
    Runtime and OpenVINO, DeepLabV3+ at 128 x 128 to 384 x 512): less than pays for the first of the 8 waiting for all.
    """
    return settings.max_batch or (1 if runtime.option.device == "cpu" else 8)


@dataclass(frozen=True)
class _Work:
    """An image's work in a worker thread, and what is occupied until that has ended: a place, and what else is `held`."""

    job: ImageJob
    future: "Future[SegmentResult]"
    place: Place
    held: contextlib.ExitStack | None


class _Patience:
    """Waits for what a request needs next, while the caller is there and its deadline has not passed."""

    def __init__(self, timeout_s: float, gone: Gone | None) -> None:
        self.timeout_s = timeout_s
        self._clock = asyncio.get_running_loop().time
        self._end = self._clock() + timeout_s
        self._watcher = asyncio.ensure_future(gone()) if gone else None

    async def until(self, awaited: "asyncio.Future[Any]") -> None:
        """Returns when that is done. Raises Problem: 499 the caller has gone, 504 too late."""
        waiting: set[asyncio.Future[Any]] = {awaited, self._watcher} if self._watcher else {awaited}
        done, _ = await asyncio.wait(waiting, timeout=max(0.0, self._end - self._clock()), return_when=FIRST_COMPLETED)
        if awaited in done:
            return
        if done:
            raise Problem(499, "disconnected", "the connection was closed before the answer was there")
        raise Problem(504, "deadline", f"not done within {self.timeout_s:g} seconds; try again")

    def close(self) -> None:
        """Look after the caller no longer."""
        if self._watcher:
            self._watcher.cancel()


class SegmentHandler:
    """Takes requests in: admission, a deadline, and the line for the three phases."""

    def __init__(self, settings: Settings, manager: ModelManager) -> None:
        self.settings = settings
        self.manager = manager
        self.admission = Admission(settings)
        self.clients = Clients(settings)
        # A thread for each place of each lane, so that what has its turn begins at once.
        threads = 2 * settings.concurrency + settings.long_at_once
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="worker")
        self._batcher = Batcher(lambda runtime: largest_batch(runtime, settings), metrics.batched)
        self.health = ModelHealth(manager, self._workers)

    @property
    def waiting(self) -> int:
        """Images that are decoded and wait for the model."""
        return self._batcher.waiting

    async def answer(self, request: Request) -> Response:
        """POST /v1/segment. Raises Problem."""
        query = parse(request.query_params.multi_items(), self.settings)
        kind = negotiate(request.headers.get("accept"), query.view)
        request.state.answer = kind.view
        body_kind = requests.body_kind(request)
        self.check(query)
        size = requests.stated_size(request) or 0
        self.check_room(is_long=query.resolution == "full" or size > self.settings.max_body)

        with contextlib.ExitStack() as held:
            held.enter_context(self.clients.admit(request))
            hold = held.enter_context(self.admission.body(is_large=size > spool.SPOOLED))
            data = await spool.read_body(request, self.settings, body_kind, hold)
            gone = functools.partial(requests.gone, request)
            result = await self.process(data, kind, query, gone, held)
            count_answer(result, kind)
            return Response(result.body, media_type=kind.media_type, headers=result.headers())

    def check(self, query: Query) -> None:
        """Refuse what the current model cannot answer, before the body is read. Raises Problem."""
        query.class_ids(self.current().bundle.manifest)

    def current(self) -> Runtime:
        """The model that answers now. Raises Problem(503)."""
        runtime = self.manager.current
        if runtime is None:
            raise requests.no_model()
        return runtime

    def check_room(self, *, is_long: bool) -> None:
        """Refuse what its lane would refuse now, before the body is read. Raises Problem."""
        lane = self.admission.long if is_long else self.admission.ordinary
        lane.check(self.settings.large_timeout_s if is_long else self.settings.timeout_s)

    async def process(
        self,
        data: bytes | BinaryIO,
        kind: Kind,
        query: Query,
        gone: Gone | None = None,
        held: contextlib.ExitStack | None = None,
        *,
        is_one_of_many: bool = False,
        timeout_s: float | None = None,
    ) -> SegmentResult:
        """One image's bytes -> its answer, admitted and limited like every request.

        timeout_s: for all of it; None: as the settings say for its kind.
        `gone()` returns when the caller no longer waits; then, as after the deadline, no further phase is begun.
        What the caller has `held` for the image is taken over in both cases, and let go when the work has ended.

        Raises:
            Problem: what the bytes are, no room, too late, or gone.
        """
        runtime = self.current()
        submitted = time.perf_counter()
        try:
            counted = await self._cost(data, kind, query, runtime)
        except decode.Refused as error:
            raise requests.image_problem(error) from error
        lane = self.admission.lane(counted.size, is_long=counted.is_large, is_one_of_many=is_one_of_many)
        if timeout_s is None:
            timeout_s = self.settings.large_timeout_s if lane == "long" else self.settings.timeout_s

        place = self.admission.lanes[lane].enter(counted.size, timeout_s)
        patience = _Patience(timeout_s, gone)
        try:
            await patience.until(place.turn)
        except BaseException:  # also when cancelled
            patience.close()
            place.leave()
            raise
        job = ImageJob(data, lane)
        phases = self._segment_in_bands if counted.is_large else self._segment
        future = self._workers.submit(phases, job, kind, query, runtime, submitted)
        return await self._wait(_Work(job, future, place, held), patience)

    async def _cost(self, data: bytes | BinaryIO, kind: Kind, query: Query, runtime: Runtime) -> Cost:
        """Of the image, by its header. Raises decode.Refused."""
        look = functools.partial(cost.of, data, kind, query, runtime.bundle, self.settings)
        if isinstance(data, bytes) and len(data) <= _PROBE_INLINE:
            return look()
        return await asyncio.to_thread(look)

    def _segment(self, job: ImageJob, kind: Kind, query: Query, runtime: Runtime, queued: float) -> SegmentResult:
        """The three phases in a worker thread; `queued` is when the request came into its line (perf_counter)."""
        queue_s = time.perf_counter() - queued
        data = job.data  # before the check: it is gone once the job is dropped
        job.check()
        whole = data if isinstance(data, bytes) else spool.read_whole(data, self.settings)
        prepared = prepare(whole, runtime.bundle, self.settings)

        job.check()
        ran = self._run(runtime, prepared.fitted_HWC, job)

        job.check()
        segmentation = restored(ran.label_HW, ran.confidence_HW, prepared.plan)
        timings = {"queue": queue_s + ran.waited_s, "decode": prepared.spent_s, "run": ran.ran_s}
        if shadow := self.manager.shadow:
            shadow.offer(prepared.image_HWC, segmentation.label_HW, runtime.bundle.manifest)
        return render(kind, query, prepared, segmentation, runtime.bundle, timings)

    def _segment_in_bands(
        self, job: ImageJob, kind: Kind, query: Query, runtime: Runtime, queued: float
    ) -> SegmentResult:
        """As `_segment`, for what `serving.http.large_images` takes; its windows meet other images at the model."""
        queue_s = time.perf_counter() - queued
        data = job.data  # as there
        job.check()
        file = large_images.opened(data)

        def run(image_HWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
            ran = self._run(runtime, image_HWC, job)
            return ran.label_HW, ran.confidence_HW

        model = WindowModel(runtime.bundle, run, job.check)
        rendered, timings = large_images.segment(file, kind, query, model, self.settings)
        return SegmentResult.of(rendered, {"queue": queue_s, **timings}, runtime.bundle)

    def _run(self, runtime: Runtime, image_HWC: NDArray[np.uint8], job: ImageJob) -> ModelRun:
        try:
            return self._batcher.run(runtime, image_HWC, job)
        except Dropped:
            raise
        except Exception:  # the runtimes share no base class of errors
            self.health.doubt(runtime)
            raise

    async def _wait(self, work: _Work, patience: _Patience) -> SegmentResult:
        """The place is free when the work has ended, not when the caller has stopped waiting for it. Raises Problem."""
        answer = asyncio.wrap_future(work.future)
        try:
            await patience.until(answer)
            return answer.result()
        except decode.Refused as error:
            raise requests.image_problem(error) from error
        finally:
            patience.close()
            if answer.done():
                work.place.leave()
            else:
                answer.cancel()  # and with it the work, if that has not begun
                self._abandon(work)

    def _abandon(self, work: _Work) -> None:
        """The caller no longer waits for this work; what it occupies is let go when it ends."""
        self._batcher.drop(work.job)
        held = work.held.pop_all() if work.held else None
        loop = asyncio.get_running_loop()
        ended = functools.partial(self._ended_late, work, held)
        context = contextvars.copy_context()  # it knows the request id
        work.future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended, context=context))

    def _ended_late(self, work: _Work, held: contextlib.ExitStack | None) -> None:
        work.place.leave()
        if held:
            held.close()
        error = None if work.future.cancelled() else work.future.exception()
        if error is not None and not isinstance(error, Dropped):
            metrics.failure("late-error", error)  # the caller has had another answer

    def close(self) -> None:
        """Let the running work end and drop what waits."""
        self._workers.shutdown(wait=True, cancel_futures=True)
