"""The service described as OpenAPI 3.1, built from the pydantic models that the answers are made of."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from export.runtime import Runtime
from export.schema import ClassInfo, InputPolicy
from pipeline.images import FORMATS
from serving.answers import VIEWS, ErrorAnswer, SegmentAnswer
from serving.models import LoadRequest, ModelsAnswer, ShadowRequest, operations
from serving.settings import Settings


class ModelAnswer(BaseModel):
    """The answer of GET /v1/model."""

    bundle: str
    name: str
    created: str
    method: str
    provider: str
    precision: str
    classes: list[ClassInfo]
    ignore: int
    input: InputPolicy
    metrics: dict[str, Any]
    data_hash: str
    split_hash: str
    test_hash: str
    commit: str


def model_answer(runtime: Runtime) -> ModelAnswer:
    """What `runtime` serves."""
    manifest = runtime.bundle.manifest
    shared = {name: getattr(manifest, name) for name in ModelAnswer.model_fields if hasattr(manifest, name)}
    return ModelAnswer(bundle=manifest.id, provider=runtime.provider, precision=runtime.precision, **shared)


_ERRORS = {
    "400": "empty, not-an-image, truncated, corrupt, bad-multipart, bad-query, bad-accept, bad-json, bad-bundle-path",
    "401": "unauthorized: this service has a token",
    "403": "no-token: this service has none, so nobody may change its models",
    "404": "no-bundle: no such folder",
    "405": "method",
    "406": "not-acceptable: no such answer",
    "408": "slow-body: the body did not arrive in time",
    "409": "busy: another model is being loaded; no-previous",
    "413": "body-too-large",
    "415": "unsupported-type (Content-Type), unsupported-format, unsupported-depth, animated (content)",
    "422": "too-many-pixels, bad-aspect, bundle-refused",
    "503": "overloaded, no-model; Retry-After says when to come again",
    "504": "deadline: not done in time",
}


def document(settings: Settings) -> dict[str, Any]:
    """The whole OpenAPI document, with this service's limits in words."""
    _, schemas = models_json_schema(
        [
            (SegmentAnswer, "serialization"),
            (ErrorAnswer, "serialization"),
            (ModelAnswer, "serialization"),
            (ModelsAnswer, "serialization"),
            (LoadRequest, "validation"),
            (ShadowRequest, "validation"),
        ],
        ref_template="#/components/schemas/{model}",
    )

    def body(name: str) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}

    def errors(*statuses: str) -> dict[str, Any]:
        return {s: {"description": _ERRORS[s], "content": body("ErrorAnswer")} for s in statuses}

    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"type": "object", "required": ["image"], "properties": {"image": binary["schema"]}}
    limits = (
        f"At most {settings.max_body} bytes, {settings.max_pixels} pixels, and a longer side of "
        f"{settings.max_aspect:g} times the shorter. Read are {', '.join(FORMATS)}: "
        "the content decides, not the Content-Type."
    )
    answered = {
        "description": "Index PNG (palette index = class id), JSON, or the image with the classes' colours over it. "
        "Headers: X-Bundle-Id, Server-Timing (queue, decode, run, encode), X-Request-Id.",
        "headers": {name: {"schema": {"type": "string"}} for name in ("X-Bundle-Id", "Server-Timing", "X-Request-Id")},
        "content": {
            "image/png": binary,
            "image/png; view=overlay": binary,
            "image/jpeg": binary,
            **body("SegmentAnswer"),
        },
    }
    segment = {
        "operationId": "segment",
        "summary": "Segment one image",
        "description": f"{limits} Which answer is given follows the Accept header; `view` narrows it.",
        "parameters": [
            {"name": "view", "in": "query", "required": False, "schema": {"type": "string", "enum": list(VIEWS)}}
        ],
        "requestBody": {
            "required": True,
            "content": {
                "image/*": binary,
                "application/octet-stream": binary,
                "multipart/form-data": {"schema": form},
            },
        },
        "responses": {
            "200": answered,
            **errors("400", "401", "405", "406", "408", "413", "415", "422", "503", "504"),
        },
    }
    model = {
        "operationId": "model",
        "summary": "The model that is served",
        "responses": {
            "200": {"description": "Classes, input policy, metrics, origin", "content": body("ModelAnswer")},
            **errors("401", "503"),
        },
    }
    secured: dict[str, Any] = {"security": [{"token": []}]} if settings.token else {}
    try:
        release = version("marginalia")
    except PackageNotFoundError:  # run from a folder without being installed
        release = "0"
    return {
        "openapi": "3.1.0",
        "info": {"title": "Marginalia", "version": release, "license": {"name": "Apache-2.0"}},
        "paths": {"/v1/segment": {"post": segment}, "/v1/model": {"get": model}, **operations(errors)},
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        **secured,
    }
