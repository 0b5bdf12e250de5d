"""The service described as OpenAPI 3.1, built from the pydantic models that the answers are made of."""

from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pipeline.imaging.decode import FORMATS
from pipeline.storage.served_statistics import ServedStatistics
from serving.http.geojson import FeatureCollection
from serving.http.models import CHANGES, LoadRequest, ModelsAnswer, ShadowRequest, operations
from serving.http.negotiate import KINDS, Kind
from serving.http.query import Query
from serving.http.responses import ErrorAnswer, Line, SegmentAnswer
from serving.model.card import ModelAnswer
from serving.settings import Settings

_ERRORS = {
    "400": "empty, not-an-image, truncated, corrupt, bad-multipart, bad-archive, bad-query, bad-accept, bad-json, "
    "bad-bundle-path",
    "401": "unauthorized: this service has a token",
    "403": "no-token: this service has none, so nobody may change its models; not-for-changes: the token may only ask",
    "404": "no-bundle: no such folder",
    "405": "method",
    "406": "not-acceptable: no such answer",
    "408": "slow-body: the body did not arrive in time",
    "409": "busy: another model is being loaded; no-previous",
    "413": "body-too-large, too-much-memory",
    "415": "unsupported-type (Content-Type), unsupported-format, unsupported-depth, animated (content)",
    "422": "too-many-pixels, bad-aspect, too-large-for-view (a huge answer is a mask, a confidence map or run lengths), "
    "too-detailed (more polygon points than are answered), too-many-images, "
    "bundle-refused",
    "429": "too-many-requests; Retry-After says when to come again",
    "503": "overloaded, no-model; Retry-After says when to come again",
    "504": "deadline: not done in time",
}
_HEADERS = {
    "X-Request-Id": "the one that was sent, or a new one; it is in the log too",
    "X-Bundle-Id": "the model that answered",
    "X-Class-Areas": "name=0.1234, ...: shares of the image, the largest first, at the model's resolution; names URL-quoted",
    "X-Confidence": "mean confidence 0..1 of the pixels that were asked for",
    "Server-Timing": "milliseconds by phase: queue, decode, run, encode",
}
_JSON: dict[str, type[BaseModel]] = {"json": SegmentAnswer, "geojson": FeatureCollection}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}


def _errors(*statuses: str) -> dict[str, Any]:
    body = {"application/json": _reference(ErrorAnswer)}
    return {status: {"description": _ERRORS[status], "content": body} for status in statuses}


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in names}


def parameters() -> list[dict[str, Any]]:
    """The query as OpenAPI parameters."""
    found = []
    for name, schema in Query.model_json_schema()["properties"].items():
        given: dict[str, Any] = next((part for part in schema.pop("anyOf", ()) if part["type"] != "null"), {})
        about = schema.pop("description")
        plain = {key: value for key, value in (schema | given).items() if key != "title" and value is not None}
        found.append({"name": name, "in": "query", "required": False, "description": about, "schema": plain})
    return found


def _content(kinds: Sequence[Kind]) -> dict[str, Any]:
    """Media type -> schema; the later of two with one media type is told by its view."""
    content: dict[str, Any] = {}
    for kind in kinds:
        name = f"{kind.media_type}; view={kind.view}" if kind.media_type in content else kind.media_type
        content[name] = _reference(_JSON[kind.view]) if kind.view in _JSON else _BINARY
    return content


def _segment(limits: str) -> dict[str, Any]:
    form = {"type": "object", "required": ["image"], "properties": {"image": _BINARY["schema"]}}
    return {
        "operationId": "segment",
        "summary": "Segment one image",
        "description": f"{limits} Which answer is given follows the Accept header; `view` narrows it.",
        "parameters": parameters(),
        "requestBody": {
            "required": True,
            "content": {
                "image/*": _BINARY,
                "application/octet-stream": _BINARY,
                "multipart/form-data": {"schema": form},
            },
        },
        "responses": {
            "200": {
                "description": "Index PNG (palette index = class id), JSON with COCO run lengths, GeoJSON polygons in pixels, "
                "the image with the classes' colours over it, or the confidence as grey PNG (0..255 = 0..1)",
                "headers": _headers(*_HEADERS),
                "content": _content(KINDS),
            },
            **_errors("400", "401", "405", "406", "408", "413", "415", "422", "429", "503", "504"),
        },
    }


def _many(limits: str, settings: Settings) -> dict[str, Any]:
    images = {"type": "array", "items": _BINARY["schema"], "minItems": 1, "maxItems": settings.many_images}
    form = {"type": "object", "required": ["image"], "properties": {"image": images}}
    return {
        "operationId": "segmentMany",
        "summary": "Segment many images",
        "description": f"At most {settings.many_images} images of together {settings.many_mb:g} MiB. Each: {limits} The "
        "answers come in the order of the images, each as soon as it is there; an image that cannot be answered is a line with "
        "an error. Lines: one of JSON for each image. Zip: a member for each image, and answers.jsonl with the lines.",
        "parameters": parameters(),
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, "application/zip": _BINARY},
        },
        "responses": {
            "200": {
                "description": "Lines of JSON, or a zip whose answers.jsonl has them",
                "headers": _headers("X-Request-Id"),
                "content": {"application/jsonl": _reference(Line), "application/zip": _BINARY},
            },
            **_errors("400", "401", "405", "406", "408", "413", "415", "422", "429", "503"),
        },
    }


def _model() -> dict[str, Any]:
    about = "Classes, input policy, metrics, origin"
    answer = {"description": about, "content": {"application/json": _reference(ModelAnswer)}}
    return {
        "operationId": "model",
        "summary": "The model that is served",
        "responses": {"200": answer, **_errors("400", "401", "405", "503")},
    }


def _description() -> dict[str, Any]:
    answer = {"description": "This document", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"operationId": "openapi", "summary": "This document", "security": [], "responses": {"200": answer}}


def document(settings: Settings, offered: Collection[str]) -> dict[str, Any]:
    """The OpenAPI document of the `offered` paths, with this service's limits in words."""
    answered = (SegmentAnswer, FeatureCollection, Line, ErrorAnswer, ModelAnswer, ModelsAnswer, ServedStatistics)
    _, schemas = models_json_schema(
        [*((model, "serialization") for model in answered), (LoadRequest, "validation"), (ShadowRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    limits = (
        f"At most {settings.max_body} bytes, {settings.max_pixels} pixels, and a longer side of "
        f"{settings.max_aspect:g} times the shorter. Above {settings.large_pixels} pixels, and for resolution=full, PNG, "
        f"TIFF and JPEG are read in bands, one huge image at a time, as a body of up to {settings.max_large_body} bytes "
        f"(not a form); what must be decoded as a whole has at most {settings.max_whole_pixels} pixels. "
        f"Read are {', '.join(FORMATS)}: "
        "the content decides, not the Content-Type."
    )
    paths: dict[str, Any] = {
        "/v1/segment": {"post": _segment(limits)},
        "/v1/segment/batch": {"post": _many(limits, settings)},
        "/v1/model": {"get": _model()},
        "/v1/openapi.json": {"get": _description()},
        **operations(_errors),
    }
    paths = {path: described for path, described in paths.items() if path in offered}
    token: list[dict[str, Any]] = [{"token": []}]
    secured: dict[str, Any] = {"security": token} if settings.asks_need_token else {}
    if settings.changes_need_token and not settings.asks_need_token:
        for path in paths.keys() & set(CHANGES):
            paths[path]["post"]["security"] = token
    try:
        release = version("marginalia-seg")
    except PackageNotFoundError:  # run from a folder without being installed
        release = "0"
    return {
        "openapi": "3.1.0",
        "info": {"title": "Marginalia", "version": release, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        **secured,
    }
