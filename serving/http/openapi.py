"""The service described as OpenAPI 3.1, built from the pydantic models that the answers are made of."""

from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic.json_schema import models_json_schema

from export.runtime.geojson import FeatureCollection
from pipeline.imaging.decode import FORMATS
from pipeline.storage.served_statistics import ServedStatistics
from serving.http.models import CHANGES, LoadRequest, ModelsAnswer, ShadowRequest, operations
from serving.http.negotiate import KINDS
from serving.http.openapi_parts import BINARY, HEADERS, content, errors, headers, parameters, reference
from serving.http.responses import ErrorAnswer, Line, SegmentAnswer
from serving.jobs import description
from serving.jobs.routes import JobAnswer, JobsAnswer
from serving.model.card import ModelAnswer
from serving.settings import Settings


def _segment(limits: str) -> dict[str, Any]:
    form = {"type": "object", "required": ["image"], "properties": {"image": BINARY["schema"]}}
    return {
        "operationId": "segment",
        "summary": "Segment one image",
        "description": f"{limits} Which answer is given follows the Accept header; `view` narrows it.",
        "parameters": parameters(),
        "requestBody": {
            "required": True,
            "content": {
                "image/*": BINARY,
                "application/octet-stream": BINARY,
                "multipart/form-data": {"schema": form},
            },
        },
        "responses": {
            "200": {
                "description": "Index PNG (palette index = class id), JSON with COCO run lengths, GeoJSON polygons in pixels, "
                "the image with the classes' colours over it, or the confidence as grey PNG (0..255 = 0..1)",
                "headers": headers(*HEADERS),
                "content": content(KINDS),
            },
            **errors("400", "401", "405", "406", "408", "413", "415", "422", "429", "503", "504"),
        },
    }


def _many(limits: str, settings: Settings) -> dict[str, Any]:
    images = {"type": "array", "items": BINARY["schema"], "minItems": 1, "maxItems": settings.many_images}
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
            "content": {"multipart/form-data": {"schema": form}, "application/zip": BINARY},
        },
        "responses": {
            "200": {
                "description": "Lines of JSON, or a zip whose answers.jsonl has them",
                "headers": headers("X-Request-Id"),
                "content": {"application/jsonl": reference(Line), "application/zip": BINARY},
            },
            **errors("400", "401", "405", "406", "408", "413", "415", "422", "429", "503"),
        },
    }


def _model() -> dict[str, Any]:
    about = "Classes, input policy, metrics, origin"
    answer = {"description": about, "content": {"application/json": reference(ModelAnswer)}}
    return {
        "operationId": "model",
        "summary": "The model that is served",
        "responses": {"200": answer, **errors("400", "401", "405", "503")},
    }


def _description() -> dict[str, Any]:
    answer = {"description": "This document", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"operationId": "openapi", "summary": "This document", "security": [], "responses": {"200": answer}}


def document(settings: Settings, offered: Collection[str]) -> dict[str, Any]:
    """The OpenAPI document of the `offered` paths, with this service's limits in words."""
    answered = (
        SegmentAnswer, FeatureCollection, Line, ErrorAnswer, ModelAnswer, ModelsAnswer, ServedStatistics, JobAnswer, JobsAnswer,
    )  # fmt: skip
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
        **description.paths(limits, settings),
        **operations(errors),
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
