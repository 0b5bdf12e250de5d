"""What a caller asks for in the address: validated, and applied to what the model found."""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from export.bundle.manifest import Manifest
from serving.http.negotiate import VIEWS
from serving.http.requests import Problem
from serving.settings import Settings

LONGEST_VALUE = 8000
LONGEST_SIDE = 65_500  # what a JPEG may have
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})", re.ASCII)
Labels = NDArray[np.uint8]


class Query(BaseModel):
    """The query of POST /v1/segment and /v1/segment/batch; every field is a parameter, and none is required."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    view: Annotated[
        Literal["mask", "json", "geojson", "overlay", "confidence"] | None,
        Field(description="Which answer; the Accept header chooses among those left"),
    ] = None
    classes: Annotated[
        str | None,
        Field(description="Names or ids of classes, separated by commas; every other one becomes the ignore id"),
    ] = None
    min_confidence: Annotated[
        float, Field(ge=0, le=1, allow_inf_nan=False, description="Pixels less sure than this become the ignore id")
    ] = 0.0
    size: Annotated[
        str,
        Field(
            pattern="^(image|model|[0-9]{1,5}x[0-9]{1,5})$",
            description="Size of the answer: the image's own, the one the model works at, or WIDTHxHEIGHT",
        ),
    ] = "image"
    tolerance: Annotated[
        float, Field(ge=0, le=50, allow_inf_nan=False, description="Pixels by which polygons may be simplified")
    ] = 1.0
    resolution: Annotated[
        Literal["fit", "full"],
        Field(description="fit: scaled down to the model's long side, as trained; full: windows at the image's own"),
    ] = "fit"

    @field_validator("classes")
    @classmethod
    def _names_no_empty_class(cls, value: str | None) -> str | None:
        if value is not None and not all(part.strip() for part in value.split(",")):
            raise ValueError("name classes or ids, separated by commas, none empty")
        return value

    def pixels(self) -> tuple[int, int] | None:
        """(height, width) of a `size` of WIDTHxHEIGHT."""
        match = _SIZE.fullmatch(self.size)
        return (int(match[2]), int(match[1])) if match else None

    def class_ids(self, manifest: Manifest) -> frozenset[int] | None:
        """Ids of the classes asked for, None for all. A name goes before an id. Raises Problem(400)."""
        if self.classes is None:
            return None
        by_name = {str(item.id): item.id for item in manifest.classes} | {c.name: c.id for c in manifest.classes}
        ids = set()
        for part in self.classes.split(","):
            if (name := part.strip()) not in by_name:
                near = difflib.get_close_matches(name[:100], by_name, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else "GET /v1/model lists them"
                raise Problem(400, "bad-query", f"query parameter 'classes': no class {_shown(name)} here; {hint}")
            ids.add(by_name[name])
        return frozenset(ids)


def _shown(text: str) -> str:
    """A caller's text in a message: short, quoted and without control characters."""
    return repr(text[:40])


def parse(items: Iterable[tuple[str, str]], settings: Settings) -> Query:
    """The query of (name, value) pairs.

    Raises:
        Problem: 400 naming the parameter: unknown (with the nearest one), given twice, or with a wrong value.
    """
    given: dict[str, str] = {}
    for name, value in items:
        if name not in Query.model_fields:
            near = difflib.get_close_matches(name[:40].lower(), Query.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(Query.model_fields)}"
            raise Problem(400, "bad-query", f"unknown query parameter {_shown(name)}; {hint}")
        if name in given:
            raise Problem(400, "bad-query", f"query parameter {name!r} is given twice; give it once")
        if len(value) > LONGEST_VALUE:
            raise Problem(400, "bad-query", f"query parameter {name!r} is longer than {LONGEST_VALUE} characters")
        given[name] = value
    try:
        query = Query.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0])
        reason = {"view": f"must be one of {', '.join(VIEWS)}", "size": "must be image, model or WIDTHxHEIGHT"}.get(
            name, str(first["msg"]).removeprefix("Value error, ")
        )
        raise Problem(400, "bad-query", f"query parameter {name!r}: {reason}") from error
    if (pixels := query.pixels()) is not None:
        height, width = pixels
        if min(pixels) < 1 or max(pixels) > LONGEST_SIDE or height * width > settings.max_pixels:
            raise Problem(
                400,
                "bad-query",
                f"query parameter 'size': sides of 1 to {LONGEST_SIDE}, and at most {settings.max_pixels} pixels",
            )
    return query


def lowest_byte(min_confidence: float) -> int:
    """The smallest confidence byte b (0..255 = 0..1) that is not below `min_confidence`."""
    return int(np.searchsorted(np.arange(256) / 255, min_confidence))


def select(
    label_HW: Labels, confidence_HW: Labels, ids: frozenset[int] | None, min_confidence: float, ignore: int
) -> Labels:
    """The label map with the ignore id where the class is not among `ids` (None: all) or the confidence is too low.

    Both maps are uint8 of one shape, confidence 0..255 = 0..1. The same map comes back where nothing is asked.
    """
    chosen = label_HW
    if ids is not None:
        table = np.full(256, ignore, np.uint8)
        table[list(ids)] = list(ids)
        chosen = table[label_HW]
    if floor := lowest_byte(min_confidence):
        chosen = np.where(confidence_HW < floor, np.uint8(ignore), chosen)
    return chosen
