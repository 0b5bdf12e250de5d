"""Metrics, of this process since its start. Labels come from fixed sets, never from a request."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.telemetry import restarts
from serving.telemetry.log import REQUEST as REQUEST
from serving.telemetry.log import event as event
from serving.telemetry.log import failure as failure
from serving.telemetry.log import request_id as request_id
from serving.telemetry.prediction_stats import PredictionCollector

PHASES = ("queue", "decode", "run", "encode")
ANSWERS = ("mask", "json", "geojson", "overlay", "confidence", "none")
REASONS = frozenset(
    {
        "animated", "bad-accept", "bad-archive", "bad-aspect", "bad-bundle-path", "bad-json", "bad-multipart",
        "bad-query", "body-too-large", "bundle-refused", "busy", "connections", "corrupt", "deadline", "disconnected",
        "empty", "evicted", "internal", "jobs-off", "method", "no-bundle", "no-job", "no-model", "no-previous", "no-token",
        "not-acceptable", "not-an-image", "not-done", "not-for-changes", "not-found", "overloaded", "slow-body",
        "slow-head", "slow-reader", "too-detailed", "too-large-for-view", "too-many-images", "too-many-pixels",
        "too-many-requests", "too-much-memory", "truncated", "unauthorized", "unsupported-depth",
        "unsupported-format", "unsupported-type",
    }
)  # fmt: skip
SWAPS = ("loaded", "refused", "rolled-back", "same")
CAUSES = ("bundle", "classes", "failed", "late", "output", "pointer", "provider", "slow")  # of a refused candidate
SHADOWED = ("scored", "dropped", "failed")
SLOTS = ("current", "previous", "shadow")
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_requests = Counter("marginalia_requests", "Answers of POST /v1/segment", ["answer", "status"])
_phase = Histogram("marginalia_phase_seconds", "Time of one request by phase", ["phase"], buckets=_BUCKETS)
_rejected = Counter("marginalia_rejected", "Requests refused, by reason", ["reason"])
_area = Counter("marginalia_class_area_share", "Sum over images of a class's share of the image", ["class_name"])
_confidence = Histogram(
    "marginalia_confidence", "Mean confidence of an image", buckets=tuple(i / 10 for i in range(1, 11))
)
_swaps = Counter(
    "marginalia_swaps", "Bundles loaded, refused, rolled back to, or found to be served already", ["result"]
)
_causes = Counter("marginalia_candidates_refused", "Bundles that were not put in place, by cause", ["cause"])
_batch = Histogram("marginalia_batch_size", "Images that ran in one call of the model", buckets=(1, 2, 4, 8, 16))
_shadow = Counter("marginalia_shadow_images", "Images offered to the shadow, by what became of them", ["result"])
_queue = Gauge("marginalia_queue_length", "Requests admitted and waiting for a worker")
_in_flight = Gauge("marginalia_in_flight", "Requests admitted and not finished")
_ready = Gauge("marginalia_ready", "1 when a warmed-up model is served")

STATISTICS = PredictionCollector()  # of what `segmented` is called with

_models: Mapping[str, tuple[str, str, str]] = MappingProxyType({})
_agreement: tuple[float | None, Mapping[str, float]] = (None, MappingProxyType({}))


class _Now(Collector):
    """Series whose labels come and go with the models: gathered when asked for, so that no old bundle stays."""

    def collect(self) -> Iterator[Metric]:
        labels = ["slot", "bundle", "provider", "precision"]
        info = GaugeMetricFamily("marginalia_model_info", "Which bundle is in which slot", labels=labels)
        for slot, facts in _models.items():
            info.add_metric([slot, *facts], 1)
        yield info
        share, classes = _agreement
        total = GaugeMetricFamily("marginalia_shadow_agreement", "Share of pixels on which the shadow agrees")
        if share is not None:
            total.add_metric([], share)
        yield total
        each = GaugeMetricFamily(
            "marginalia_shadow_class_agreement",
            "Intersection over union of the shadow's and the served model's pixels of a class",
            labels=["class_name"],
        )
        for name, value in classes.items():
            each.add_metric([name], value)
        yield each
        restarted = CounterMetricFamily(
            "marginalia_worker_restarts", "Workers that another one has followed, by why they ended", labels=["cause"]
        )
        for cause, count in restarts.from_environment().items():
            restarted.add_metric([cause], count)
        yield restarted


_now = _Now()
REGISTRY.register(_now)


def answered(answer: str, status: int, timings: dict[str, float] | None = None) -> None:
    """Count one answer of the segment route and its phases (seconds)."""
    _requests.labels(answer if answer in ANSWERS else "none", f"{status // 100}xx").inc()
    for phase in PHASES if timings else ():
        _phase.labels(phase).observe((timings or {}).get(phase, 0.0))


def rejected(reason: str) -> None:
    """Count one refusal."""
    _rejected.labels(reason if reason in REASONS else "other").inc()


def segmented(shares: dict[str, float], confidence: float, bundle: str = "") -> None:
    """Count what was found: class name -> share of the image (names come from the bundle), mean confidence 0..1.

    With the id of the `bundle` that answered, it also enters the statistics of GET /v1/statistics.
    """
    for name, share in shares.items():
        _area.labels(name).inc(share)
    _confidence.observe(confidence)
    if bundle:
        STATISTICS.add(bundle, shares, confidence)


def batched(images: int) -> None:
    """Count one call of the model with so many images."""
    _batch.observe(images)


def swapped(result: str, cause: str = "failed") -> None:
    """Count what became of a bundle, one of SWAPS; a refused one by its cause, one of CAUSES."""
    _swaps.labels(result).inc()
    if result == "refused":
        _causes.labels(cause if cause in CAUSES else "failed").inc()


def models(held: Mapping[str, tuple[str, str, str]]) -> None:
    """Publish which model is in which slot: slot, one of SLOTS -> bundle id, provider, precision."""
    global _models
    _models = dict(held)


def shadowed(result: str) -> None:
    """Count one image offered to the shadow, by one of SHADOWED."""
    _shadow.labels(result).inc()


def agreed(share: float | None, classes: Mapping[str, float]) -> None:
    """Publish the shadow's agreement so far (0..1, None without any), and that by class name."""
    global _agreement
    _agreement = share, dict(classes)


def queued(waiting: int) -> None:
    """Publish how many admitted requests wait for a worker."""
    _queue.set(waiting)


def load(in_flight: int) -> None:
    """Publish how many requests are admitted and unfinished."""
    _in_flight.set(in_flight)


def ready(state: bool) -> None:
    """Publish readiness."""
    _ready.set(float(state))


def exposition() -> bytes:
    """All metrics as Prometheus text."""
    return generate_latest()
