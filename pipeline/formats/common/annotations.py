"""What label tools draw: shapes in layers over a picture, painted into a label map.

Masks are exact; a pixel belongs to an outline by the rule of `pipeline.formats.common.rasterize`.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.common import rasterize
from pipeline.imaging import decode, label_maps
from pipeline.imaging.decode import Refused

Label = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Points = NDArray[np.float64]  # N x 2: x, y
IGNORE = 255
# A shape that covers no pixel. Where pixels in no shape are ignored it costs nothing and is counted; where they are
# background, what it stands for would become background, so its image's mask is refused.
NO_AREA = "shape-without-area"
LOST = "it covers no pixel, and what it stands for would become background; draw its area, or delete it"
NO_LABEL = "region without a label"
IGNORE_NAMES = ("ignore", "void", "ignored pixels", "ignore (255)")  # the first that is no class is 255 in a tool


class Patch(NamedTuple):
    """A boolean mask h x w whose first pixel is the image's (top, left)."""

    top: int
    left: int
    mask_HW: Mask


class Shape(NamedTuple):
    """`draw(height, width)` of the image gives the patch; raises Refused("bad-shape" | "bad-polygon" | "bad-rle")."""

    label: str
    draw: Callable[[int, int], Patch]
    level: int = 0


Lost = tuple[str, str]


class Picture(NamedTuple):
    """One image as a label tool has it.

    `id`: the image id where the tool carried it along, else "". `names`: what else it may be called, where the tool does not
    say which of several texts is its name. `lost`: (kind, which) of what was drawn and cannot be painted. `annotated`: somebody
    handed it in, be it without a shape. `subset`: the part of the data set that the tool has it in. `overruled`: (kind, which)
    of what others drew on it and does not count.
    """

    name: str
    height: int
    width: int
    shapes: Sequence[Shape]
    id: str = ""
    names: Sequence[str] = ()
    lost: Sequence[Lost] = ()
    annotated: bool = True
    subset: str = ""
    overruled: Sequence[Lost] = ()


def lost_reason(lost: Lost) -> str:
    """Why a mask is refused for something that cannot be painted, and what to do."""
    kind, which = lost
    if kind == NO_LABEL:
        return f"{which} has no label, and its pixels would become background; choose its label, or delete it"
    return f"{which}: {LOST}" if kind == NO_AREA else f"{kind}: {which}: {LOST}"


def no_shapes_notes(count: int, unannotated: str, no_shapes: str) -> list[str]:
    """What to say of `count` images whose labels hold no shape, where they may be free of objects: a line, or none."""
    if not count or unannotated != "background" or no_shapes == "background":
        return []
    return [
        f"{count} images without a shape are unlabelled; if they are free of objects, set data.no_shapes: background"
    ]


def ignore_name(classes: Sequence[str]) -> str:
    """The label that stands for ignored pixels beside these classes."""
    return next(name for name in IGNORE_NAMES if name not in classes)


def ignore_label(labels: Sequence[str], classes: Sequence[str] = ()) -> str | None:
    """Which of a tool's labels stands for ignored pixels: the last of `IGNORE_NAMES` there that is no class, since
    `ignore_name` takes the first free one. None where none does."""
    return next((name for name in reversed(IGNORE_NAMES) if name in labels and name not in classes), None)


def class_ids(classes: Sequence[str]) -> dict[str, int]:
    """Name -> id, the ignore label's name included."""
    return {ignore_name(classes): IGNORE} | {name: index for index, name in enumerate(classes)}


def nearest(name: str, known: Sequence[str]) -> str:
    """`'raod' (did you mean 'road'?)`; without a near one the known names are listed."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name!r} (did you mean {near[0]!r}?)" if near else f"{name!r} (known: {', '.join(known)})"


def paint(picture: Picture, ids: Mapping[str, int], *, max_pixels: int, unannotated: int = IGNORE) -> Label:
    """Shapes by level, equal levels in the order given, later over earlier -> ids H x W uint8.

    Args:
        ids: class name -> id, as `class_ids` gives it.
        max_pixels: budget for the size that the tool states.
        unannotated: id of the pixels that no shape covers.

    Raises:
        Refused: "too-many-pixels", "unknown-class" with the nearest known name, or what a shape raises.
    """
    if unknown := sorted({shape.label for shape in picture.shapes} - ids.keys()):
        listed = ", ".join(nearest(name, list(ids)) for name in unknown[:5])
        raise Refused("unknown-class", f"{len(unknown)} unknown classes: {listed}; rename them in the tool")
    if picture.height * picture.width > max_pixels:
        raise Refused("too-many-pixels", f"{picture.width} x {picture.height} pixels; the limit is {max_pixels}")
    label_HW = np.full((picture.height, picture.width), unannotated, np.uint8)
    for shape in sorted(picture.shapes, key=lambda shape: shape.level):
        top, left, mask_HW = shape.draw(picture.height, picture.width)
        height, width = mask_HW.shape
        label_HW[top : top + height, left : left + width][mask_HW] = ids[shape.label]
    return label_HW


def render_background(image: Path, background: int, max_pixels: int) -> bytes:
    """The mask PNG of an image without any object, of the decoded image's own size. Raises Refused as `decode.decode`."""
    height, width = decode.decode(image.read_bytes(), max_pixels=max_pixels).shape[:2]
    return label_maps.encode_png(np.full((height, width), background, np.uint8))


def polygon(points: Points | Sequence[Sequence[float]], height: int, width: int) -> Patch:
    """Pixels whose centre lies inside by the even-odd rule, in the ring's own box; what leaves the image is cut off.

    Raises:
        Refused: "bad-polygon", as `rasterize.ring`.
    """
    return filled(rasterize.ring(np.asarray(points, np.float64).ravel().tolist()), height, width)


def filled(ring: Points, height: int, width: int) -> Patch:
    """As `polygon`, of a ring that `rasterize.ring` made."""
    left, top = (int(v) for v in np.clip(np.floor(ring.min(axis=0)), 0, (width, height)))
    right, bottom = (int(v) for v in np.clip(np.ceil(ring.max(axis=0)), (left, top), (width, height)))
    return Patch(top, left, rasterize.fill([ring], bottom - top, right - left, (top, left)))


def union(patches: Sequence[Patch]) -> Patch:
    """The pixels that any of the patches (one or more) holds, in one box around all."""
    if len(patches) == 1:
        return patches[0]
    top, left = min(patch.top for patch in patches), min(patch.left for patch in patches)
    bottom = max(patch.top + patch.mask_HW.shape[0] for patch in patches)
    right = max(patch.left + patch.mask_HW.shape[1] for patch in patches)
    mask_HW = np.zeros((bottom - top, right - left), np.bool_)
    for y, x, part_HW in patches:
        height, width = part_HW.shape
        mask_HW[y - top : y - top + height, x - left : x - left + width] |= part_HW
    return Patch(top, left, mask_HW)


def turned(corners: Points, degrees: float, centre: tuple[float, float]) -> Points:
    """Points turned clockwise (as seen, y down) about a centre."""
    angle = np.deg2rad(degrees)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    moved: Points = (corners - centre) @ rotation + centre
    return moved


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Points:
    """Its corners, clockwise from the top left one."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    """A ring of 256 points on it: within 0.0001 of the radius."""
    angle = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)
