"""What runs the jobs: in the server's event loop, through the same admission and the same model as every request.

A job's images go into the line of calls of many, or of long work, so jobs take no place of an ordinary request. While the
server is overloaded a job waits and tries again, for `job_timeout_s` at most.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import BinaryIO

from serving.http import batch, batch_body, negotiate, spool
from serving.http.batch import BatchHandler
from serving.http.query import Query
from serving.http.requests import Problem
from serving.http.segment import SegmentHandler, count_answer
from serving.jobs.store import Job, JobStore
from serving.settings import Settings
from serving.telemetry import metrics

LOOK_EVERY_S = 30.0  # for jobs whose time to live is over
PAUSE_S = 0.5  # before a job is tried again that was refused because the server is overloaded
_PASSING = ("overloaded", "no-model")


class JobRunner:
    """Begins the waiting jobs in their order, `jobs_at_once` at a time."""

    def __init__(self, settings: Settings, segment: SegmentHandler, store: JobStore) -> None:
        self._settings = settings
        self._segment = segment
        self._batch = BatchHandler(segment)
        self._store = store
        self._changed = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._running: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Begin; in the event loop."""
        loop = asyncio.get_running_loop()
        self._loops = [loop.create_task(self._work()) for _ in range(self._settings.jobs_at_once)]
        self._loops.append(loop.create_task(self._clean()))

    def wake(self) -> None:
        """There is a new job."""
        self._changed.set()

    def cancel(self, job: str) -> None:
        """Stop working on a job that is deleted."""
        if task := self._running.get(job):
            task.cancel()

    async def stop(self) -> None:
        """Stop; what is running waits for the next start."""
        for task in (*self._loops, *self._running.values()):
            task.cancel()
        await asyncio.gather(*self._loops, *self._running.values(), return_exceptions=True)

    async def _clean(self) -> None:
        while True:
            await asyncio.to_thread(self._store.expire, self._settings.job_ttl_s)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _work(self) -> None:
        while True:
            self._changed.clear()
            job = await asyncio.to_thread(self._store.claim)
            if job is None:
                await self._changed.wait()
                continue
            task = asyncio.create_task(self._run(job))
            self._running[job.id] = task
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:  # the server ends
                task.cancel()
                await asyncio.wait([task])
                self._store.put_back(job.id)
                raise
            finally:
                del self._running[job.id]

    async def _run(self, job: Job) -> None:
        """To its answer or its error; what is cancelled leaves the row as it is."""
        part = self._store.folder / f"{job.id}.part"
        metrics.event("job-started", job=job.id, of=job.kind, attempt=job.attempts)
        try:
            async with asyncio.timeout(self._settings.job_timeout_s):
                bundle = await (self._image(job, part) if job.kind == "image" else self._archive(job, part))
            await asyncio.to_thread(self._store.finish, job.id, part, bundle)
            metrics.event("job-done", job=job.id)
        except Problem as problem:
            await self._fail(job, problem)
        except TimeoutError:
            await self._fail(job, Problem(504, "deadline", f"not done within {self._settings.job_timeout_s:g} seconds"))
        except Exception as error:  # one job's failure is its own
            metrics.failure("internal-error", error)
            await self._fail(job, Problem(500, "internal", "internal error; quote the job's id when reporting it"))
        finally:
            part.unlink(missing_ok=True)

    async def _fail(self, job: Job, problem: Problem) -> None:
        metrics.rejected(problem.code)
        metrics.event("job-failed", job=job.id, code=problem.code)
        await asyncio.to_thread(self._store.fail, job.id, problem.status, problem.code, str(problem))

    async def _image(self, job: Job, part: Path) -> str:
        query, kind = Query.model_validate_json(job.query), negotiate.Kind(job.view, job.media_type)
        data = await asyncio.to_thread(_load, self._store.body(job.id))
        while True:
            try:
                answer = await self._segment.process(
                    data, kind, query, is_one_of_many=True, timeout_s=self._settings.job_timeout_s
                )
                break
            except Problem as problem:
                if problem.code not in _PASSING:
                    raise
            await asyncio.sleep(PAUSE_S)
        count_answer(answer, kind)
        await asyncio.to_thread(_write, part, answer.body)
        return answer.bundle

    async def _archive(self, job: Job, part: Path) -> str | None:
        query, kind = Query.model_validate_json(job.query), negotiate.Kind(job.view, job.media_type)
        body = await asyncio.to_thread(self._store.body(job.id).read_bytes)
        sent = await asyncio.to_thread(batch_body.open_zip, body, self._settings)
        pieces = batch.pieces(self._batch, sent, kind, query)
        async with contextlib.aclosing(pieces):
            await self._collect(job, part, pieces)
        return None

    async def _collect(self, job: Job, part: Path, pieces: AsyncGenerator[bytes, None]) -> None:
        """Write the pieces, one for each image and perhaps a last one, as they come."""
        with part.open("wb") as file:
            done = 0
            async for piece in pieces:
                await asyncio.to_thread(file.write, piece)
                done = min(done + 1, job.images)
                await asyncio.to_thread(self._store.progress, job.id, done)
            await asyncio.to_thread(_sync, file)


def _load(path: Path) -> bytes | BinaryIO:
    """The bytes of a small file, a large one open: what `SegmentHandler.process` takes. It closes when it is dropped, for
    a worker thread may still read it when the job is deleted."""
    if path.stat().st_size <= spool.SPOOLED:
        return path.read_bytes()
    return path.open("rb", buffering=0)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
