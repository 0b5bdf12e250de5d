"""The log: one JSON object a line on stderr, whoever writes it. Escaping makes it impossible to forge a line from a request."""

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar
from types import TracebackType

REQUEST: ContextVar[str | None] = ContextVar("request", default=None)  # the id of the one that is answered here

_log = logging.getLogger("marginalia")
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def set_up() -> None:
    """Let this process's events go to stderr. Idempotent."""
    if not _log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False


def take_over() -> None:
    """`set_up`, and what libraries log, warn of, or die of becomes a JSON line, too; of what they tell without need, nothing.

    For a process that is ours alone, after BentoML has configured its loggers.
    """
    set_up()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LibraryFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("bentoml", "circus", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.NOTSET)
    logging.captureWarnings(True)
    sys.excepthook = _log_last_words


class _LibraryFormatter(logging.Formatter):
    """A library's record as an event of ours."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, object] = {"level": record.levelname.lower(), "logger": record.name}
        facts["message"] = record.getMessage()
        if record.exc_info:
            facts["trace"] = self.formatException(record.exc_info)
        return _line("library", record.created, facts)


def _log_last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    failure("process-failed", error)


def _line(kind: str, at: float, facts: dict[str, object]) -> str:
    return json.dumps({"time": round(at, 3), "event": kind, **facts}, default=str)


def event(kind: str, **facts: object) -> None:
    """Log one event."""
    _log.info(_line(kind, time.time(), facts))


def failure(kind: str, error: BaseException, **facts: object) -> None:
    """Log an event with the error's text, the id of the request it happened in and the traceback, in one JSON line."""
    trace = logging.Formatter().formatException((type(error), error, error.__traceback__))
    request = REQUEST.get()
    known = {"request_id": request} if request else {}
    event(kind, error=str(error), trace=trace, **known | facts)


def request_id(given: str | None) -> str:
    """The caller's X-Request-Id if it is short and plain, else a new one."""
    return given if given and _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
