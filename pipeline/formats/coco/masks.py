"""COCO's annotations of one image -> its label map: polygons, run lengths, and which of them cover any area."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.formats.common import parsing, rasterize
from pipeline.formats.common.annotations import Patch, filled, union
from pipeline.imaging import decode, label_maps

MAX_HELD = 1 << 30  # bytes of one image's annotations, each cut to its box


class CocoSize(NamedTuple):
    """An image's size as its label file states it: unchecked."""

    height: Any
    width: Any


def has_area(segmentation: Any) -> bool:
    """Whether a segmentation can cover a pixel: run lengths, or a ring of three points. A box alone or two points cannot.

    What is malformed is said when it is painted, so it counts as an area here.
    """
    if isinstance(segmentation, list):
        return any(not _too_short(ring) for ring in _rings(segmentation))
    return segmentation is not None


def _rings(segmentation: list[Any]) -> list[Any]:
    return [segmentation] if segmentation and isinstance(segmentation[0], int | float) else segmentation


def _too_short(ring: Any) -> bool:
    """Whether a ring has one or two points (or none), as pairs or as flat numbers."""
    if not isinstance(ring, list):
        return False
    flat = not ring or not isinstance(ring[0], list)
    return len(ring) < (6 if flat else 3) and not (flat and len(ring) % 2)


def render(
    size: CocoSize, annotations: Sequence[tuple[Any, Any]], ids: Mapping[str, int], empty: int, max_pixels: int
) -> bytes:
    """Annotations of one image -> PNG of class ids.

    Raises:
        images.Refused: "label-file", "bad-polygon", "bad-rle", "too-many-pixels"; names the annotation.
    """
    try:
        height = parsing.whole(size.height, "the image's height")
        width = parsing.whole(size.width, "the image's width")
        decode.check_pixels(width, height, max_pixels)
    except parsing.Broken as error:
        raise decode.Refused("label-file", str(error)) from error
    pieces: list[tuple[int, Patch, int]] = []
    held = 0
    for name, annotation in annotations:
        where = f"annotation {parsing.hashable(annotation, 'id')}"
        if name is None:
            raise decode.Refused("label-file", f"{where}: no category {annotation.get('category_id')!r:.40}")
        try:
            patch = pixels(annotation.get("segmentation"), height, width)
        except decode.Refused as error:
            raise decode.Refused(error.code, f"{where}: {error}") from error
        held += patch.mask_HW.size
        if held > MAX_HELD:
            raise decode.Refused("label-file", f"{where}: the image's annotations cover {held} pixels; merge some")
        pieces.append((int(patch.mask_HW.sum()), patch, ids[name]))
    label_HW = np.full((height, width), empty, np.uint8)
    for _, (top, left, inside_HW), number in sorted(pieces, key=lambda piece: -piece[0]):
        rows, columns = inside_HW.shape
        label_HW[top : top + rows, left : left + columns][inside_HW] = number
    return label_maps.encode_png(label_HW)


def pixels(segmentation: Any, height: int, width: int) -> Patch:
    """COCO's segmentation in its own box: polygons (their union), or run lengths, column by column, as text or list.

    Raises:
        images.Refused: "bad-polygon", "bad-rle" (wrong total, or another size than the image's), "shape-without-area".
    """
    if isinstance(segmentation, dict):
        size, top, left, inside_HW = label_maps.rle_patch(segmentation, max_pixels=height * width)
        if size != (height, width):
            raise decode.Refused("bad-rle", f"run lengths of {size} for an image of {(height, width)} rows and columns")
        return Patch(top, left, inside_HW)
    if not isinstance(segmentation, list) or not has_area(segmentation):
        raise decode.Refused(
            "shape-without-area", "no segmentation (a box alone is no mask); draw it, or delete the annotation"
        )
    return union(
        [filled(rasterize.ring(points), height, width) for points in _rings(segmentation) if not _too_short(points)]
    )
