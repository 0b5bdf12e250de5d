"""One region of a Label Studio annotation: what it covers, which label it has, and whether it can be painted."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.formats.common import brush_rle
from pipeline.formats.common.annotations import NO_AREA, NO_LABEL, Lost, Patch, ellipse, polygon, rectangle, turned
from pipeline.imaging import label_maps
from pipeline.imaging.decode import Refused

_LABELS = ("brushlabels", "bitmasklabels", "polygonlabels", "rectanglelabels", "ellipselabels", "labels")


def is_region(result: Mapping[str, Any]) -> bool:
    """Whether a result is drawn on the picture; choices, texts and ratings are not."""
    return any(key in result["value"] for key in (*(key for key, _ in _DRAW), *_POINTS))


def _label(value: Mapping[str, Any]) -> Any:
    return next((value[key] for key in _LABELS if isinstance(value.get(key), list) and value[key]), None)


def lost(results: Sequence[Mapping[str, Any]]) -> list[Lost]:
    """Regions that cannot be painted: points and lines, and those for which nobody chose a label (a region's label may stand
    in a twin with its id)."""
    labelled = {result.get("id") for result in results if _label(result["value"]) is not None}
    lost: list[Lost] = []
    for result in results:
        which = f"region {result.get('id')}"
        if not is_region(result):
            continue
        if not _has_area(result["value"]):
            lost.append((NO_AREA, which))
        elif _label(result["value"]) is None and result.get("id") not in labelled:
            lost.append((NO_LABEL, which))
    return lost


def _has_area(value: Mapping[str, Any]) -> bool:
    """Whether a region can cover a pixel: no point or line, no polygon of two points, no rectangle of a click."""
    if any(key in value for key in _POINTS) or ("width" in value and "height" not in value):
        return False
    if isinstance(value.get("points"), list):
        return len(value["points"]) >= 3
    if "rle" in value or "imageDataURL" in value:
        return True
    return not any(value.get(key) == 0 for key in ("width", "height", "radiusX", "radiusY"))


def two_labels(regions_: Sequence[Mapping[str, Any]]) -> str:
    """Why a region is of no one class; "" where each is. Its labels may stand in twins with its id."""
    labels: dict[Any, dict[str, None]] = {}
    for number, result in enumerate(regions_):
        found = map(str, _label(result["value"]) or ())
        labels.setdefault(result.get("id") or number, {}).update(dict.fromkeys(found))
    for which, found_ in labels.items():
        if len(found_) > 1:
            return f"region {which} has the labels {', '.join(map(repr, found_))}; leave it one"
    return ""


def shape(result: Mapping[str, Any], number: int) -> Iterator[tuple[str, Any, int]]:
    """The arguments of a Shape; nothing for a result that is no region or has no label (its twin with one follows)."""
    value: dict[str, Any] = result["value"]
    labels = _label(value)
    draw = next((draw for key, draw in _DRAW if key in value), None)
    if labels is None or draw is None or not _has_area(value):
        return

    def checked(height: int, width: int) -> Patch:
        if result.get("image_rotation"):
            raise Refused("bad-shape", "the image was turned in Label Studio; turn it back there before labelling")
        try:
            return draw(value, height, width)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused("bad-shape", f"region {result.get('id')} is malformed ({error!r}); draw it again") from error

    yield str(labels[0]), checked, number


def _brush(value: Mapping[str, Any], height: int, width: int) -> Patch:
    if value.get("format", "rle") != "rle":
        raise Refused("bad-rle", f"a brush region in the format {value['format']!r}; only rle is known")
    return Patch(0, 0, brush_rle.decode(value["rle"], height, width))


def _polygon(value: Mapping[str, Any], height: int, width: int) -> Patch:
    points = np.array(value["points"], np.float64).reshape(-1, 2) * (width / 100, height / 100)
    return polygon(points, height, width)


def _ellipse(value: Mapping[str, Any], height: int, width: int) -> Patch:
    x, y = value["x"] * width / 100, value["y"] * height / 100
    ring = ellipse(x, y, value["radiusX"] * width / 100, value["radiusY"] * height / 100)
    return polygon(turned(ring, float(value.get("rotation", 0)), (x, y)), height, width)


def _rectangle(value: Mapping[str, Any], height: int, width: int) -> Patch:
    x, y, w, h = (value[k] * n / 100 for k, n in zip(("x", "y", "width", "height"), (width, height) * 2, strict=True))
    corners = turned(rectangle(x, y, x + w, y + h), float(value.get("rotation", 0)), (x, y))
    return polygon(corners, height, width)


def _bitmask(value: Mapping[str, Any], height: int, width: int) -> Patch:
    """A PNG as a data URL, painted where it is opaque (without an alpha channel: where it is not black)."""
    head, _, text = str(value["imageDataURL"]).partition(",")
    if not head.startswith("data:image/png") or not head.endswith(";base64"):
        raise Refused("bad-shape", f"a bitmask that begins with {head[:40]!r}; only PNG as base64 is known")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Refused("bad-shape", f"a bitmask that is no base64 ({error}); draw it again") from error
    mask_HW = label_maps.opaque(data, max_pixels=height * width)
    if mask_HW.shape != (height, width):
        raise Refused(
            "bad-shape", f"a bitmask of {mask_HW.shape[1]} x {mask_HW.shape[0]} on an image of {width} x {height}"
        )
    return Patch(0, 0, mask_HW)


_POINTS = ("vertices", "keypoints")
_DRAW = (
    ("rle", _brush),
    ("imageDataURL", _bitmask),
    ("points", _polygon),
    ("radiusX", _ellipse),
    ("width", _rectangle),
)
