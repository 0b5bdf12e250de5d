"""Parts that the descriptions of several paths share: errors by status, headers, the query, media types."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from export.runtime.geojson import FeatureCollection
from serving.http.negotiate import Kind
from serving.http.query import Query
from serving.http.responses import ErrorAnswer, SegmentAnswer

ERRORS = {
    "400": "empty, not-an-image, truncated, corrupt, bad-multipart, bad-archive, bad-query, bad-accept, bad-json, "
    "bad-bundle-path",
    "401": "unauthorized: this service has a token",
    "403": "no-token: this service has none, so nobody may change its models; not-for-changes: the token may only ask",
    "404": "no-bundle: no such folder; no-job: no such job",
    "405": "method",
    "406": "not-acceptable: no such answer",
    "408": "slow-body: the body did not arrive in time",
    "409": "busy: another model is being loaded; no-previous; not-done: the job has no answer yet",
    "413": "body-too-large, too-much-memory",
    "415": "unsupported-type (Content-Type), unsupported-format, unsupported-depth, animated (content)",
    "422": "too-many-pixels, bad-aspect, too-large-for-view (a huge answer is a mask, a confidence map or run lengths), "
    "too-detailed (more polygon points than are answered), too-many-images, "
    "bundle-refused",
    "429": "too-many-requests; Retry-After says when to come again",
    "503": "overloaded, evicted (the slowest of too many connections), no-model, jobs-off; Retry-After says when to come again",
    "504": "deadline: not done in time",
}
HEADERS = {
    "X-Request-Id": "the one that was sent, or a new one; it is in the log too",
    "X-Bundle-Id": "the model that answered",
    "X-Class-Areas": "name=0.1234, ...: shares of the image, the largest first, at the model's resolution; names URL-quoted",
    "X-Confidence": "mean confidence 0..1 of the pixels that were asked for",
    "Server-Timing": "milliseconds by phase: queue, decode, run, encode",
}
_JSON: dict[str, type[BaseModel]] = {"json": SegmentAnswer, "geojson": FeatureCollection}
BINARY = {"schema": {"type": "string", "format": "binary"}}


def reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}


def errors(*statuses: str) -> dict[str, Any]:
    body = {"application/json": reference(ErrorAnswer)}
    return {status: {"description": ERRORS[status], "content": body} for status in statuses}


def headers(*names: str) -> dict[str, Any]:
    return {name: {"description": HEADERS[name], "schema": {"type": "string"}} for name in names}


def parameters() -> list[dict[str, Any]]:
    """The query as OpenAPI parameters."""
    found = []
    for name, schema in Query.model_json_schema()["properties"].items():
        given: dict[str, Any] = next((part for part in schema.pop("anyOf", ()) if part["type"] != "null"), {})
        about = schema.pop("description")
        plain = {key: value for key, value in (schema | given).items() if key != "title" and value is not None}
        found.append({"name": name, "in": "query", "required": False, "description": about, "schema": plain})
    return found


def content(kinds: Sequence[Kind]) -> dict[str, Any]:
    """Media type -> schema; the later of two with one media type is told by its view."""
    content: dict[str, Any] = {}
    for kind in kinds:
        name = f"{kind.media_type}; view={kind.view}" if kind.media_type in content else kind.media_type
        content[name] = reference(_JSON[kind.view]) if kind.view in _JSON else BINARY
    return content
