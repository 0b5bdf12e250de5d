"""Metrics and the access log. Labels come from fixed sets, never from a request; no image bytes, no tokens."""

import json
import logging
import os
import re
import sys
import time
import uuid

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

PHASES = ("queue", "decode", "run", "encode")
ANSWERS = ("mask", "json", "overlay", "none")
REASONS = frozenset(
    {
        "animated", "bad-accept", "bad-aspect", "bad-multipart", "bad-query", "body-too-large", "connections",
        "corrupt", "deadline", "disconnected", "empty", "internal", "method", "no-model", "not-acceptable",
        "not-an-image", "not-found", "overloaded", "slow-body", "slow-head", "slow-reader", "too-many-pixels",
        "truncated", "unauthorized", "unsupported-depth", "unsupported-format", "unsupported-type",
    }
)  # fmt: skip
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_requests = Counter("marginalia_requests", "Answers of POST /v1/segment", ["answer", "status"])
_phase = Histogram("marginalia_phase_seconds", "Time of one request by phase", ["phase"], buckets=_BUCKETS)
_rejected = Counter("marginalia_rejected", "Requests refused, by reason", ["reason"])
_area = Counter("marginalia_class_area_share", "Sum over images of a class's share of the image", ["class_name"])
_confidence = Histogram(
    "marginalia_confidence", "Mean confidence of an image", buckets=tuple(i / 10 for i in range(1, 11))
)
_batch = Histogram("marginalia_batch_size", "Images that ran together", buckets=(1, 2, 4, 8))
_swaps = Counter("marginalia_swaps", "Bundles loaded or refused", ["result"])
_in_flight = Gauge("marginalia_in_flight", "Requests admitted and not finished", multiprocess_mode="livesum")
_ready = Gauge("marginalia_ready", "1 when a warmed-up model is served", multiprocess_mode="livemin")

_log = logging.getLogger("marginalia")
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def set_up_logging() -> None:
    """One JSON object a line on stderr: escaping makes it impossible to forge a line from a request."""
    if not _log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False


def event(kind: str, **facts: object) -> None:
    """Log one event."""
    _log.info(json.dumps({"time": round(time.time(), 3), "event": kind, **facts}, default=str))


def failure(kind: str, error: BaseException, **facts: object) -> None:
    """Log an event with the error's text; the traceback goes into the same JSON line."""
    trace = logging.Formatter().formatException((type(error), error, error.__traceback__))
    event(kind, error=str(error), trace=trace, **facts)


def request_id(given: str | None) -> str:
    """The caller's X-Request-Id if it is short and plain, else a new one."""
    return given if given and _SAFE_ID.fullmatch(given) else uuid.uuid4().hex


def answered(answer: str, status: int, timings: dict[str, float] | None = None) -> None:
    """Count one answer of the segment route and its phases (seconds)."""
    _requests.labels(answer if answer in ANSWERS else "none", f"{status // 100}xx").inc()
    for phase in PHASES if timings else ():
        _phase.labels(phase).observe((timings or {}).get(phase, 0.0))


def rejected(reason: str) -> None:
    """Count one refusal."""
    _rejected.labels(reason if reason in REASONS else "other").inc()


def segmented(shares: dict[str, float], confidence: float) -> None:
    """Count what was seen: class name -> share of the image (names come from the bundle), mean confidence 0..1."""
    for name, share in shares.items():
        _area.labels(name).inc(share)
    _confidence.observe(confidence)


def batched(size: int) -> None:
    """Count one run of the model over `size` images."""
    _batch.observe(size)


def swapped(result: str) -> None:
    """Count a bundle that was loaded ("loaded") or turned away ("refused")."""
    _swaps.labels(result).inc()


def load(in_flight: int) -> None:
    """Publish how many requests are admitted and unfinished."""
    _in_flight.set(in_flight)


def ready(state: bool) -> None:
    """Publish readiness."""
    _ready.set(float(state))


def exposition() -> bytes:
    """All metrics as Prometheus text; gathered over the worker processes where BentoML runs several."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
    return generate_latest()
