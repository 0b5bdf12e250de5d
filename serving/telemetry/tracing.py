"""OpenTelemetry, where somebody collects it: a span for each request, with the phases that it told its caller below it.

On only with OTEL_EXPORTER_OTLP_ENDPOINT set and the packages there; all of OTEL_*'s other variables are the SDK's own. The
phases are those of the answer's Server-Timing header, laid end to end before the end of the request, so the hot path is
not touched and nothing is paid when it is off. A caller's `traceparent` makes its span the parent.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from serving.telemetry import metrics

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PHASE = re.compile(r"([a-z]+);dur=([0-9.]+)")

# request, response, its route or "unknown", its error code, when it began and ended (ns since 1970)
Record = Callable[[Request, Response, str, str | None, int, int], None]


def phases(server_timing: str) -> list[tuple[str, float]]:
    """(name, milliseconds) of the Server-Timing header of `answers.server_timing`, in its order."""
    return [(name, float(ms)) for name, ms in _PHASE.findall(server_timing)]


@functools.cache
def recorder() -> Record | None:
    """What takes the finished requests down; None when nobody collects them or a package is missing (with an event)."""
    if not os.environ.get(ENDPOINT):
        return None
    if importlib.util.find_spec("opentelemetry") is None:
        metrics.event("traces-off", reason="opentelemetry-api is not installed")
        return None
    from opentelemetry import propagate, trace

    if not _exports():
        return None
    tracer = trace.get_tracer("marginalia")

    def record(request: Request, response: Response, route: str, code: str | None, start: int, end: int) -> None:
        facts = {
            "http.request.method": request.method if request.method in ("GET", "HEAD", "POST") else "_OTHER",
            "http.route": route,
            "http.response.status_code": response.status_code,
            "marginalia.request_id": response.headers["x-request-id"],
            "marginalia.answer": request.state.answer,
            **({"error.type": code} if code else {}),
            **({"marginalia.bundle": response.headers["x-bundle-id"]} if "x-bundle-id" in response.headers else {}),
        }
        carrier = {"traceparent": request.headers.get("traceparent", "")}
        span = tracer.start_span(
            "request", propagate.extract(carrier), kind=trace.SpanKind.SERVER, attributes=facts, start_time=start
        )
        if response.status_code >= 500:
            span.set_status(trace.StatusCode.ERROR)
        parts = [(name, int(ms * 1e6)) for name, ms in phases(response.headers.get("server-timing", ""))]
        inside = trace.set_span_in_context(span)
        at = max(start, end - sum(length for _, length in parts))
        for name, length in parts:
            until = min(end, at + length)
            tracer.start_span(name, inside, start_time=at).end(until)
            at = until
        span.end(end)

    return record


def _exports() -> bool:
    """Whether spans go somewhere: a provider that somebody set already is used, else one that sends to ENDPOINT is made."""
    from opentelemetry import trace

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return True
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        metrics.event("traces-off", reason="nothing sends them; pip install opentelemetry-exporter-otlp-proto-http")
        return False
    name = os.environ.get("OTEL_SERVICE_NAME", "marginalia")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True
