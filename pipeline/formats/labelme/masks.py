"""A labelme file -> its label map, shape by shape, and the picture that it may hold."""

import base64
import binascii
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.formats.common import parsing, rasterize
from pipeline.formats.common.source import SourceError
from pipeline.imaging import decode, label_maps

NO_AREA = ("point", "points", "line", "linestrip")
MAX_BYTES = 512 << 20  # of one file, with the image inside


def kind_of(shape: Any) -> str:
    return str(shape.get("shape_type") or "polygon") if isinstance(shape, dict) else ""


def has_area(shape: Any) -> bool:
    """Whether a shape can cover a pixel: no point or line, no polygon of two points, no rectangle or circle of a click.

    What is malformed is said when it is painted, so it counts as an area here.
    """
    kind = kind_of(shape)
    points = shape.get("points") if isinstance(shape, dict) else None
    if kind in NO_AREA or not isinstance(points, list):
        return kind not in NO_AREA
    if kind in ("polygon", "oriented_rectangle"):
        return len(points) >= 3
    if kind == "rectangle" and len(points) == 2 and all(isinstance(point, list) for point in points):
        return not any(a == b for a, b in zip(*points, strict=False))
    return kind != "circle" or len(points) != 2 or points[0] != points[1]


def shapes_of(document: Mapping[str, Any]) -> list[Any]:
    found = document.get("shapes")
    return found if isinstance(found, list) else [None]


def embedded(path: Path) -> bytes:
    """The picture inside a labelme file, upright as labelme stores it."""
    text = parsing.read_json(path, max_bytes=MAX_BYTES).get("imageData")
    if not isinstance(text, str):
        raise decode.Refused(
            "image-missing",
            f"{path.name}: its imagePath is not below data.path, and it holds no imageData; add the image",
        )
    return _unpack(text, "imageData")


def _unpack(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise decode.Refused("label-file", f"{what} is no base64 ({error}); save the labels again") from error


def render(path: Path, ids: Mapping[str, int], empty: int, max_pixels: int) -> bytes:
    """One file's shapes -> PNG of class ids.

    Raises:
        images.Refused: "label-file", "bad-polygon", "bad-shape": one broken shape refuses the
            whole mask, since a half painted one is a wrong label.
    """
    try:
        document = parsing.read_json(path, max_bytes=MAX_BYTES)
        height = parsing.whole(document.get("imageHeight"), "imageHeight")
        width = parsing.whole(document.get("imageWidth"), "imageWidth")
        decode.check_pixels(width, height, max_pixels)
        label_HW = np.full((height, width), empty, np.uint8)
        for shape in shapes_of(document):
            if not has_area(shape):
                continue
            name = parsing.field(shape, "label", str)
            if name not in ids:
                raise parsing.Broken(f"label {name!r:.40} came while the file was read; run pull again")
            label_HW[pixels(shape, height, width, max_pixels)] = ids[name]
    except (parsing.Broken, SourceError) as error:
        raise decode.Refused("label-file", f"{path.name}: {error}") from error
    return label_maps.encode_png(label_HW)


def pixels(shape: Mapping[str, Any], height: int, width: int, max_pixels: int) -> rasterize.Mask_HW:
    """One labelme shape -> H x W. Raises images.Refused and documents.Broken as `render` says."""
    kind = shape.get("shape_type") or "polygon"
    points = parsing.field(shape, "points", list)
    if kind in ("polygon", "oriented_rectangle"):
        return rasterize.fill([rasterize.ring(points)], height, width)
    if kind not in ("rectangle", "circle", "mask"):
        raise decode.Refused("bad-shape", f"a shape of kind {kind!r:.40} is not known here; draw a polygon")
    if kind == "rectangle" and len(points) == 4:  # X-AnyLabeling writes all corners
        return rasterize.fill([rasterize.ring(points)], height, width)
    if len(points) != 2 or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise decode.Refused("bad-shape", f"a {kind} has two points of x and y, this one has {len(points)}")
    (x0, y0), (x1, y1) = [[parsing.number(v, f"a {kind}'s coordinate") for v in point] for point in points]
    if max(map(abs, (x0, y0, x1, y1))) > rasterize.FAR:
        raise decode.Refused("bad-shape", f"a {kind} has a coordinate far outside the image")
    if kind == "rectangle":
        return rasterize.box(x0, y0, x1, y1, height, width)
    if kind == "circle":  # its centre and a point on its rim
        return rasterize.disc(x0, y0, math.hypot(x1 - x0, y1 - y0), height, width)
    return _crop(parsing.field(shape, "mask", str), (x0, y0, x1, y1), height, width, max_pixels)


def _crop(
    text: str, corners: tuple[float, float, float, float], height: int, width: int, max_pixels: int
) -> rasterize.Mask_HW:
    """A mask's PNG covers its box, both corners included (labelme's own shape_to_mask)."""
    left, top, right, bottom = (round(value) for value in corners)
    crop_HW = label_maps.decode_mask(_unpack(text, "mask"), max_pixels=max_pixels) > 0
    if crop_HW.shape != (bottom - top + 1, right - left + 1):
        raise decode.Refused(
            "bad-shape",
            f"a mask of {crop_HW.shape[1]} x {crop_HW.shape[0]} pixels for a box of {right - left + 1} x "
            f"{bottom - top + 1}; save the labels again",
        )
    if left < 0 or top < 0 or right >= width or bottom >= height:
        raise decode.Refused("bad-shape", "a mask's box reaches beyond the image; save the labels again")
    out_HW = np.zeros((height, width), np.bool_)
    out_HW[top : bottom + 1, left : right + 1] = crop_HW
    return out_HW
