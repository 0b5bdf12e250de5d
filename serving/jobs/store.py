"""Jobs on disk: a row each in SQLite, and beside it the files of what was sent and what was answered.

A job is waiting, running, done or failed. A file is there before the row that names it, and a row says `done` after its
answer is on the disk, so a process that is killed at any moment leaves no job that cannot go on: at the next start what
was running waits again, once; files without a row are removed.
"""

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

State = Literal["waiting", "running", "done", "failed"]
MOST_ATTEMPTS = 2  # a job that ended its server twice is not tried a third time
_TABLE = """
create table if not exists jobs (
    id text primary key, owner text not null, kind text not null, query text not null, view text not null,
    media_type text not null, state text not null, submitted real not null, started real, ended real,
    done integer not null, images integer not null, attempts integer not null, bytes integer not null,
    bundle text, status integer, code text, message text
) strict
"""


class StoreError(RuntimeError):
    """The folder of jobs cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Job:
    """One job as its row has it.

    kind: one image, or an archive of many. query: as in the address. submitted, started, ended: seconds since 1970.
    done, images: how many are answered, of how many. bytes: of what was sent and answered. bundle: the model that answered
    one image. status, code, message: of the error of a failed one.
    """

    id: str
    owner: str
    kind: Literal["image", "archive"]
    query: str
    view: str
    media_type: str
    state: State
    submitted: float
    bytes: int
    images: int
    started: float | None = None
    ended: float | None = None
    done: int = 0
    attempts: int = 0
    bundle: str | None = None
    status: int | None = None
    code: str | None = None
    message: str | None = None


_COLUMNS = [field.name for field in fields(Job)]


class JobStore:
    """The jobs of one server. Its methods may be called from any thread, and block for as long as a disk takes.

    Raises:
        StoreError: the folder cannot be written, or another server uses it.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._own = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._rows = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
            self._rows.execute("pragma journal_mode = wal")
            self._rows.execute(_TABLE)
        except BlockingIOError as error:
            raise StoreError(f"{folder}: another server keeps its jobs there; give each a folder") from error
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"{folder}: jobs cannot be kept there ({error}); name a folder that can be written"
            ) from error
        self._recover()

    def body(self, job: str) -> Path:
        """The file of what was sent."""
        return self.folder / f"{job}.body"

    def answer(self, job: str) -> Path:
        """The file of what is answered."""
        return self.folder / f"{job}.answer"

    def _recover(self) -> None:
        """After a start: what was running waits again, or has failed for good; what nobody knows is removed."""
        with self._transaction() as rows:
            rows.execute(
                "update jobs set state = 'waiting', done = 0 where state = 'running' and attempts < ?", [MOST_ATTEMPTS]
            )
            rows.execute(
                "update jobs set state = 'failed', ended = ?, status = 500, code = 'internal', "
                "message = 'the server ended twice while it worked on this; send it in smaller parts' where state = 'running'",
                [self._clock()],
            )
            known = {row[0] for row in rows.execute("select id from jobs")}
        for file in self.folder.iterdir():
            if file.suffix in (".body", ".answer", ".part") and file.stem not in known:
                file.unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._rows.execute("begin immediate")
            try:
                yield self._rows
            except BaseException:
                self._rows.execute("rollback")
                raise
            self._rows.execute("commit")

    def _select(self, where: str, values: list[object]) -> list[Job]:
        with self._lock:
            found = self._rows.execute(f"select {', '.join(_COLUMNS)} from jobs where {where}", values).fetchall()
        return [Job(**dict(zip(_COLUMNS, row, strict=True))) for row in found]

    def add(self, job: Job) -> None:
        """A new job, whose body is there."""
        values = [getattr(job, name) for name in _COLUMNS]
        with self._transaction() as rows:
            marks = ", ".join("?" * len(values))
            rows.execute(f"insert into jobs ({', '.join(_COLUMNS)}) values ({marks})", values)

    def get(self, job: str, owner: str) -> Job | None:
        """The job of this owner, or None."""
        return next(iter(self._select("id = ? and owner = ?", [job, owner])), None)

    def of(self, owner: str) -> list[Job]:
        """All jobs of an owner, the oldest first."""
        return self._select("owner = ? order by submitted, id", [owner])

    def ahead(self, job: Job) -> int:
        """How many waiting jobs are begun before this one."""
        with self._lock:
            counted = self._rows.execute(
                "select count(*) from jobs where state = 'waiting' and (submitted, id) < (?, ?)",
                [job.submitted, job.id],
            ).fetchone()
        return int(counted[0])

    def kept(self) -> tuple[int, int]:
        """How many jobs are kept, and the bytes of their files."""
        with self._lock:
            count, size = self._rows.execute("select count(*), coalesce(sum(bytes), 0) from jobs").fetchone()
        return int(count), int(size)

    def claim(self) -> Job | None:
        """The job that has waited longest, running from now on; None where none waits."""
        with self._transaction() as rows:
            found = rows.execute(
                "update jobs set state = 'running', started = ?, attempts = attempts + 1 where id = "
                "(select id from jobs where state = 'waiting' order by submitted, id limit 1) returning id",
                [self._clock()],
            ).fetchone()
        return self._select("id = ?", [found[0]])[0] if found else None

    def progress(self, job: str, done: int) -> None:
        """So many images are answered."""
        with self._transaction() as rows:
            rows.execute("update jobs set done = ? where id = ? and state = 'running'", [done, job])

    def finish(self, job: str, part: Path, bundle: str | None) -> None:
        """The answer, written to `part`, is whole: the job is done, or gone if it was deleted meanwhile."""
        size = part.stat().st_size
        part.rename(self.answer(job))
        with self._transaction() as rows:
            changed = rows.execute(
                "update jobs set state = 'done', ended = ?, done = images, bytes = bytes + ?, bundle = ? "
                "where id = ? and state = 'running'",
                [self._clock(), size, bundle, job],
            ).rowcount
        if not changed:
            self.answer(job).unlink(missing_ok=True)

    def fail(self, job: str, status: int, code: str, message: str) -> None:
        """The job has no answer but this error."""
        with self._transaction() as rows:
            rows.execute(
                "update jobs set state = 'failed', ended = ?, status = ?, code = ?, message = ? "
                "where id = ? and state = 'running'",
                [self._clock(), status, code, message, job],
            )

    def put_back(self, job: str) -> None:
        """The server ends in good order: the job waits for the next one, and this attempt does not count."""
        with self._transaction() as rows:
            rows.execute(
                "update jobs set state = 'waiting', done = 0, attempts = attempts - 1 where id = ? and state = 'running'",
                [job],
            )

    def delete(self, job: str) -> None:
        """The row, then its files."""
        with self._transaction() as rows:
            rows.execute("delete from jobs where id = ?", [job])
        for file in (self.body(job), self.answer(job)):
            file.unlink(missing_ok=True)

    def expire(self, ttl_s: float) -> int:
        """Delete what ended more than `ttl_s` seconds ago; how many that were."""
        old = self._select("ended is not null and ended < ?", [self._clock() - ttl_s])
        for job in old:
            self.delete(job.id)
        return len(old)

    def close(self) -> None:
        """Let another server have the folder."""
        with self._lock, suppress(sqlite3.Error):
            self._rows.close()
        os.close(self._own)
