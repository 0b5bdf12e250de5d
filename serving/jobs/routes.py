"""POST and GET /v1/jobs; GET and DELETE /v1/jobs/ID; GET /v1/jobs/ID/result.

A job belongs to the bearer of the token that it was sent with; where the service has no tokens its address, which nobody
can guess, is all that leads to it, and there is no list.
"""

import asyncio
import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from serving.http import batch_body, negotiate, requests, spool
from serving.http.negotiate import KINDS, MANY_KINDS
from serving.http.query import parse
from serving.http.requests import Problem
from serving.http.responses import ErrorDetail
from serving.http.segment import SegmentHandler
from serving.jobs.runner import JobRunner
from serving.jobs.store import Job, JobStore, State, StoreError
from serving.settings import Settings
from serving.telemetry import metrics

PATH = "/v1/jobs"
_COPIED = 1 << 20


class JobAnswer(BaseModel):
    """One job. `ahead`: waiting jobs before it. `result`: where its answer is, once it is done; it is kept until `expires`."""

    model_config = ConfigDict(frozen=True)

    id: str
    state: State
    submitted: datetime
    started: datetime | None
    ended: datetime | None
    expires: datetime | None
    images: int
    done: int
    ahead: int | None
    view: str
    media_type: str
    bundle: str | None
    result: str | None
    error: ErrorDetail | None


class JobsAnswer(BaseModel):
    """The caller's jobs, the oldest first."""

    model_config = ConfigDict(frozen=True)

    jobs: tuple[JobAnswer, ...]


class JobRoutes:
    """The handlers. Before `start`, and where the folder of jobs cannot be used, they answer 503 with the reason."""

    def __init__(self, settings: Settings, segment: SegmentHandler) -> None:
        self._settings = settings
        self._segment = segment
        self._store: JobStore | None = None
        self._runner: JobRunner | None = None
        self._trouble = "the service has just begun"

    def start(self) -> None:
        """Open the store and go on with what waits; in the event loop."""
        try:
            self._store = JobStore(self._settings.jobs)
        except StoreError as error:
            self._trouble = str(error)
            metrics.event("jobs-off", reason=str(error))
            return
        self._runner = JobRunner(self._settings, self._segment, self._store)
        self._runner.start()

    async def stop(self) -> None:
        """Stop working; what waits or runs goes on at the next start."""
        if self._runner is not None and self._store is not None:
            await self._runner.stop()
            self._store.close()
            self._runner = self._store = None
            self._trouble = "the service ends"

    def _opened(self) -> tuple[JobStore, JobRunner]:
        if self._store is None or self._runner is None:
            raise Problem(503, "jobs-off", f"no jobs here: {self._trouble}", {"Retry-After": "10"})
        return self._store, self._runner

    async def collection(self, request: Request) -> Response:
        """POST: take a job in. GET: the caller's jobs. Raises Problem."""
        return await (self._submit(request) if request.method == "POST" else self._list(request))

    async def item(self, request: Request) -> Response:
        """GET: how far it is. DELETE: stop and forget it. Raises Problem."""
        store, runner = self._opened()
        job = await self._find(request, store)
        if request.method == "DELETE":
            await asyncio.to_thread(store.delete, job.id)
            runner.cancel(job.id)
            metrics.event("job-deleted", job=job.id, state=job.state)
            return Response(status_code=204)
        return JSONResponse((await self._answer(job, store)).model_dump(mode="json"))

    async def result(self, request: Request) -> Response:
        """GET: the answer, or the error of a failed job. Raises Problem: 409 before there is one."""
        store, _ = self._opened()
        job = await self._find(request, store)
        if job.state == "failed":
            raise Problem(job.status or 500, job.code or "internal", job.message or "the job failed")
        if job.state != "done":
            message = f"the job is {job.state}, {job.done} of {job.images} images done; ask again later"
            raise Problem(409, "not-done", message, {"Retry-After": "5"})
        headers = {"X-Bundle-Id": job.bundle} if job.bundle else {}
        return FileResponse(store.answer(job.id), media_type=job.media_type, headers=headers)

    async def _submit(self, request: Request) -> Response:
        store, runner = self._opened()
        is_archive = (
            request.headers.get("content-type", "").partition(";")[0].strip().lower().startswith("application/zip")
        )
        query = parse(request.query_params.multi_items(), self._settings)
        kind = negotiate.negotiate(request.headers.get("accept"), query.view, MANY_KINDS if is_archive else KINDS)
        self._segment.check(query)
        await self._check_room(store, requests.stated_size(request) or 0)

        job = secrets.token_urlsafe(18)
        with contextlib.ExitStack() as held:
            count_images = held.enter_context(self._segment.clients.admit(request))
            hold = held.enter_context(self._segment.admission.body(is_large=True))
            images, size = await self._take(request, store.body(job), hold, is_archive=is_archive)
            count_images(images)
        made = Job(
            id=job, owner=self._owner(request), kind="archive" if is_archive else "image", query=query.model_dump_json(),
            view=kind.view, media_type=kind.media_type, state="waiting", submitted=time.time(), bytes=size, images=images,
        )  # fmt: skip
        await asyncio.to_thread(store.add, made)
        metrics.event("job-submitted", job=job, of=made.kind, images=images, bytes=size)
        runner.wake()
        answer = await self._answer(made, store)
        return JSONResponse(answer.model_dump(mode="json"), 202, headers={"Location": f"{PATH}/{job}"})

    async def _take(
        self, request: Request, path: Path, hold: Callable[[int], None], *, is_archive: bool
    ) -> tuple[int, int]:
        """Read the body into `path`; how many images and bytes it has. What can be refused at once is. Raises Problem."""
        if is_archive:
            larger = {"max_body_mb": self._settings.many_mb}
            body: bytes | BinaryIO = await requests.read_body(
                request, self._settings.model_copy(update=larger), "raw", hold
            )
            assert isinstance(body, bytes)
            images = len(await asyncio.to_thread(batch_body.open_zip, body, self._settings))
        else:
            body = await spool.read_body(request, self._settings, requests.body_kind(request), hold)
            images = 1
        return images, await asyncio.to_thread(_keep, body, path)

    async def _check_room(self, store: JobStore, size: int) -> None:
        """Raises Problem(503) where another job of `size` bytes would be too much."""
        await asyncio.to_thread(store.expire, self._settings.job_ttl_s)
        count, kept = await asyncio.to_thread(store.kept)
        if count >= self._settings.jobs_kept or kept + size > self._settings.jobs_mb * (1 << 20):
            message = f"{count} jobs of {kept >> 20} MiB are kept; delete what you have fetched, or try again later"
            raise Problem(503, "overloaded", message, {"Retry-After": "60"})

    async def _list(self, request: Request) -> Response:
        store, _ = self._opened()
        if not self._settings.asks_need_token:
            raise Problem(
                403, "no-token", "this service has no tokens to tell callers apart; ask for a job by its address"
            )
        jobs = await asyncio.to_thread(store.of, self._owner(request))
        answers = [await self._answer(job, store) for job in jobs]
        return JSONResponse(JobsAnswer(jobs=tuple(answers)).model_dump(mode="json"))

    async def _find(self, request: Request, store: JobStore) -> Job:
        job = await asyncio.to_thread(store.get, request.path_params["id"], self._owner(request))
        if job is None:
            raise Problem(404, "no-job", "no such job of yours; it was deleted, or its time to live is over")
        return job

    def _owner(self, request: Request) -> str:
        if not self._settings.asks_need_token:
            return ""
        token = request.headers.get("authorization", "").partition(" ")[2].strip()
        return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()

    async def _answer(self, job: Job, store: JobStore) -> JobAnswer:
        error = None
        if job.state == "failed":
            error = ErrorDetail(code=job.code or "internal", message=job.message or "", request_id=job.id)
        return JobAnswer(
            id=job.id,
            state=job.state,
            submitted=_moment(job.submitted),
            started=_moment(job.started) if job.started else None,
            ended=_moment(job.ended) if job.ended else None,
            expires=_moment(job.ended + self._settings.job_ttl_s) if job.ended else None,
            images=job.images,
            done=job.done,
            ahead=await asyncio.to_thread(store.ahead, job) if job.state == "waiting" else None,
            view=job.view,
            media_type=job.media_type,
            bundle=job.bundle,
            result=f"{PATH}/{job.id}/result" if job.state == "done" else None,
            error=error,
        )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _keep(body: bytes | BinaryIO, path: Path) -> int:
    """Write what was sent to `path`, whole or not at all; its bytes. Raises Problem(503) where the disk is full."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            if isinstance(body, bytes):
                file.write(body)
            else:
                body.seek(0)
                while piece := body.read(_COPIED):
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Problem(503, "overloaded", f"no room for the job on disk ({error.strerror}); try again later") from error
    return path.stat().st_size
