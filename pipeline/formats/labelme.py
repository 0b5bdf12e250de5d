"""labelme: one JSON file per image, with polygons, rectangles, circles and masks.

Points are on the upright picture: labelme applies EXIF before it shows a photo, as `pipeline.imaging.decode` does. Shapes are
painted in the file's order, later ones over earlier ones, as labelme's own export does. `__ignore__` is its word for 255.
An image whose file has no shape, or that has no file, is unlabelled. Lines and points have no area: their image's mask is
refused, because what they stand for would be missing from it.
"""

import base64
import binascii
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import config
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common import parsing, rasterize, split_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk
from pipeline.imaging import decode, label_maps

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_BYTES = 512 << 20  # of one file, with the image inside
IGNORE = "__ignore__"


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read a tree of images and labelme files. Raises SourceError: no labelme file; a bad list or class file."""
    everything = walk(root)
    pictures = {p.resolve(): name for name, p in everything.items() if p.suffix.lower() in EXTENSIONS}
    files: list[tuple[str, Path | Maker]] = [(f"images/{inside(name)}", path) for path, name in pictures.items()]
    refused: list[tuple[str, str, str]] = []
    labels: list[str] = []
    taken: dict[str, str] = {}
    labelled: list[tuple[str, Path]] = []
    found = 0
    for name, path in everything.items():
        if path.suffix.lower() != ".json":
            continue
        try:
            document = parsing.read_json(path, max_bytes=MAX_BYTES)
        except SourceError as error:
            refused.append((f"masks/{inside(name_id(name))}.png", "label-file", str(error)))
            continue
        if not isinstance(document, dict) or "shapes" not in document:
            continue
        found += 1
        picture = _picture(path, document, pictures)
        key = name_id(inside(pictures[picture] if picture else name))
        if key in taken:
            refused.append((f"labels/{name}", "duplicate-name", f"labels the same image as {taken[key]}; keep one"))
            continue
        taken[key] = name
        if picture is None:
            files.append((f"images/{key}.png", partial(_embedded, path)))
        if drawn := _shapes(document):
            labels += [s["label"] for s in drawn if isinstance(s, dict) and isinstance(s.get("label"), str)]
            labelled.append((key, path))
    if not found:
        raise SourceError(f"{root}: no labelme file (JSON with `shapes`) below it; data.path must name their folder")
    classes, ids, notes = class_lists.named(root, data, sorted(set(labels) - {IGNORE}))
    ids[IGNORE] = label_maps.IGNORE
    start = class_lists.empty_id(data, ids)
    files += [(f"masks/{key}.png", partial(render, path, ids, start, max_pixels)) for key, path in labelled]
    keys = sorted({name_id(name.partition("/")[2]) for name, _ in files if name.startswith("images/")})
    return Source(
        files=files,
        classes=classes,
        lists=split_lists.read(root, data.lists, set(keys), {f"images/{key}": key for key in keys}),
        groups=groups_by(data.group, keys),
        refused=refused,
        notes=[f"{found} labelme files, {len(labelled)} with shapes; pixels in no shape: {data.unannotated}", *notes],
    )


def inside(name: str) -> str:
    return name.removeprefix("images/")


def _shapes(document: Mapping[str, Any]) -> list[Any]:
    found = document.get("shapes")
    return found if isinstance(found, list) else [None]


def _picture(path: Path, document: Mapping[str, Any], pictures: Mapping[Path, str]) -> Path | None:
    """The image that a file labels: its imagePath, else the one beside it with its name; None: it is embedded.

    Only images below the source count, so an imagePath cannot lead anywhere else."""
    stated = str(document.get("imagePath") or "").replace("\\", "/")
    for place in (stated, stated.rpartition("/")[2], *(path.stem + extension for extension in EXTENSIONS)):
        try:
            target = (path.parent / place).resolve()
        except (OSError, ValueError):  # NUL, too long
            continue
        if target in pictures:
            return target
    return None


def _embedded(path: Path) -> bytes:
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
        images.Refused: "label-file", "bad-polygon", "bad-shape", "shape-without-area": one broken shape refuses the
            whole mask, since a half painted one is a wrong label.
    """
    try:
        document = parsing.read_json(path, max_bytes=MAX_BYTES)
        height = parsing.whole(document.get("imageHeight"), "imageHeight")
        width = parsing.whole(document.get("imageWidth"), "imageWidth")
        decode.check_pixels(width, height, max_pixels)
        label_HW = np.full((height, width), empty, np.uint8)
        for shape in _shapes(document):
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
        raise decode.Refused(
            "shape-without-area", f"a shape of kind {kind!r:.40} has no area; draw a polygon, or delete the shape"
        )
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
