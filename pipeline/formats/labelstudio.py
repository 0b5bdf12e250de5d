"""Label Studio: the JSON export (a list of tasks), and tasks with pre-labels as predictions.

Read: brush, bitmask, polygon, rectangle (turned about its top left corner) and ellipse, whatever control tag drew them: the
value's own fields say what it is. Points, lines and regions without a label are counted, and refuse their image's mask where
pixels in no shape are background. Coordinates are percent of the image; later regions lie over earlier ones. Of several
annotations of a task, cancelled ones never count; one marked as ground truth comes before the others, then the one
changed last. Predictions are never labels. Tasks without an annotation are pictures without shapes.

Written: one brush region per region as `regions.regions` cuts them, ignored pixels under the label `ignore` (or the
next free name), and the image id in the task's data, where it survives every export.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import numpy as np

from pipeline import config
from pipeline.formats.common import brush_rle, parsing, tool_source
from pipeline.formats.common.annotations import (
    IGNORE,
    NO_AREA,
    NO_LABEL,
    Lost,
    Patch,
    Picture,
    Shape,
    ellipse,
    ignore_name,
    polygon,
    rectangle,
    turned,
)
from pipeline.formats.common.regions import regions
from pipeline.formats.common.source import Source, SourceError
from pipeline.formats.common.task import Item
from pipeline.formats.common.tool_source import ToolExport
from pipeline.formats.names import image_files
from pipeline.imaging import label_maps
from pipeline.imaging.decode import Refused
from pipeline.storage import atomic

MAX_BYTES = 1 << 29
ID = "marginalia_id"  # the task data's field that holds the image id
_LABELS = ("brushlabels", "bitmasklabels", "polygonlabels", "rectanglelabels", "ellipselabels", "labels")


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """images/ and the JSON export (`data.annotations`, or the only .json in the folder). Raises SourceError."""
    beside = [path for path in sorted(root.glob("*.json")) if not image_files.is_system_file(path.name)]
    beside = [root / data.annotations] if data.annotations else beside
    if len(beside) != 1:
        raise SourceError(f"{root}: {len(beside)} .json files in it; name the export in data.annotations")
    found = load(beside[0])
    names = sorted({shape.label for picture in found for shape in picture.shapes})
    if not any(picture.annotated for picture in found):
        raise SourceError(
            f"{beside[0]}: {len(found)} tasks and not one that somebody submitted; predictions are no labels before somebody "
            "submits them in Label Studio"
        )
    return tool_source.export_source(root, data, ToolExport(found, names), max_pixels)


def load(path: Path) -> list[Picture]:
    """The JSON export -> pictures in the file's order.

    Raises:
        SourceError: larger than 512 MB, not JSON, nested too deeply, not a list of tasks; names the file.
    """
    tasks = parsing.read_json(path, max_bytes=MAX_BYTES)
    if not isinstance(tasks, list) or not all(isinstance(t, dict) and isinstance(t.get("data"), dict) for t in tasks):
        raise SourceError(f"{path}: not a list of tasks with `data`; export as JSON, not as JSON-MIN or COCO")
    return [_picture(task) for task in tasks]


def _picture(task: dict[str, Any]) -> Picture:
    names = _names(task)
    results = [r for r in _chosen(task) if isinstance(r, dict) and isinstance(r.get("value"), dict)]
    drawn = [Shape(*found) for number, result in enumerate(results) for found in _shape(result, number)]
    regions_ = [r for r in results if _is_region(r)]
    sizes = {(_whole(r.get("original_height")), _whole(r.get("original_width"))) for r in regions_}
    height, width = max(sizes, default=(0, 0))
    if len(sizes - {(0, 0)}) > 1 or (drawn and 0 in (height, width)):
        drawn = [drawn[0]._replace(draw=lambda height, width: _no_size(sizes))] if drawn else []
    own_id = next((value for key, value in task["data"].items() if key == ID and isinstance(value, str)), "")
    return Picture(
        names[0] if names else f"task {task.get('id')}",
        height,
        width,
        drawn,
        own_id,
        names=names[1:],
        lost=_lost(results),
        annotated=bool(_live(task)),
    )


def _names(task: dict[str, Any]) -> list[str]:
    """What the image may be called: `image` comes first, then the other texts, then both as Label Studio stores uploads."""
    texts = {key: value for key, value in task["data"].items() if isinstance(value, str) and key != ID}
    order = sorted(texts, key=lambda key: key != "image")
    names = [*(image_name(texts[key]) for key in order), *(_path(texts[key]).rpartition("/")[2] for key in order)]
    return [name for name in dict.fromkeys(names) if name]


def _is_region(result: Mapping[str, Any]) -> bool:
    """Whether a result is drawn on the picture; choices, texts and ratings are not."""
    return any(key in result["value"] for key in (*(key for key, _ in _DRAW), *_POINTS))


def _label(value: Mapping[str, Any]) -> Any:
    return next((value[key] for key in _LABELS if isinstance(value.get(key), list) and value[key]), None)


def _lost(results: Sequence[Mapping[str, Any]]) -> list[Lost]:
    """Regions that cannot be painted: points and lines, and those for which nobody chose a label (a region's label may stand
    in a twin with its id)."""
    labelled = {result.get("id") for result in results if _label(result["value"]) is not None}
    lost: list[Lost] = []
    for result in results:
        which = f"region {result.get('id')}"
        if not _is_region(result):
            continue
        if not _has_area(result["value"]):
            lost.append((NO_AREA, which))
        elif _label(result["value"]) is None and result.get("id") not in labelled:
            lost.append((NO_LABEL, which))
    return lost


def _has_area(value: Mapping[str, Any]) -> bool:
    return not any(key in value for key in _POINTS) and not ("width" in value and "height" not in value)


def _no_size(sizes: set[tuple[int, int]]) -> Patch:
    raise Refused("bad-shape", f"its regions state the sizes {sorted(sizes)} (height, width); export the task again")


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _live(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The annotations that somebody handed in and nobody cancelled."""
    given = task.get("annotations", task.get("completions")) or []
    return [
        a for a in given if isinstance(a, dict) and not a.get("was_cancelled") and isinstance(a.get("result"), list)
    ]


def _chosen(task: dict[str, Any]) -> Sequence[Any]:
    """The regions of the one annotation that counts."""
    live = _live(task)

    def rank(one: dict[str, Any]) -> tuple[bool, str, int]:
        return (
            bool(one.get("ground_truth")),
            str(one.get("updated_at") or one.get("created_at") or ""),
            _whole(one.get("id")),
        )

    result: Sequence[Any] = max(live, key=rank)["result"] if live else []
    return result


def image_name(reference: str) -> str:
    """What an image was called, out of the task's reference to it: an upload, a local or cloud file, or a URL.

    Label Studio puts eight hex digits and a dash before an uploaded file's name; they are dropped.
    """
    path = _path(reference)
    if "/upload/" in path:
        path = re.sub(r"^[0-9a-f]{8}-", "", path.rpartition("/")[2])
    return path.lstrip("/")


def _path(reference: str) -> str:
    """The path within a task's reference to an image, with forward slashes; "" for an image inside the task."""
    parts = urlsplit(reference)
    if parts.scheme == "data":
        return ""
    local = parse_qs(parts.query).get("d") if "/local-files" in parts.path else None
    return (local[0] if local else unquote(parts.path)).replace("\\", "/")


def _shape(result: Mapping[str, Any], number: int) -> Iterator[tuple[str, Any, int]]:
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


def config_xml(classes: Sequence[dict[str, Any]]) -> str:
    """The labeling interface for `write`'s tasks: a brush and a polygon tool with the classes in their colours."""
    ignore = ignore_name([c["name"] for c in classes])
    named = [*((c["name"], c["color"]) for c in classes), (ignore, label_maps.IGNORE_COLOUR)]
    labels = "".join(
        f'    <Label value={quoteattr(name)} background="#{bytes(colour).hex()}"/>\n' for name, colour in named
    )
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true" zoomControl="true"/>\n'
        f'  <BrushLabels name="brush" toName="image">\n{labels}  </BrushLabels>\n'
        f'  <PolygonLabels name="polygon" toName="image">\n{labels}  </PolygonLabels>\n</View>\n'
    )


def write(path: Path, items: Iterable[Item], classes: Sequence[dict[str, Any]], folder: str, model: str = "") -> int:
    """tasks.json whose images Label Studio serves from local storage, with pre-labels as predictions.

    Args:
        items: read once; their images are not written here.
        folder: where the images lie below Label Studio's document root; the tasks name `FOLDER/NAME`.
        model: `model_version` of the predictions.
    """
    count = 0
    with atomic.replacing(path) as file:
        file.write(b"[")
        for count, item in enumerate(items, 1):
            text = json.dumps(task(item, classes, folder, model), ensure_ascii=False, separators=(",", ":"))
            file.write((",\n" if count > 1 else "\n").encode() + text.encode())
        file.write(b"\n]\n")
    return count


def task(item: Item, classes: Sequence[dict[str, Any]], folder: str, model: str = "") -> dict[str, Any]:
    """One task; its labels, if it has some, as a prediction."""
    names = [c["name"] for c in classes]
    results: list[dict[str, Any]] = []
    for value, (top, left, patch_HW) in regions(item.label_HW) if item.label_HW is not None else ():
        mask_HW = np.zeros((item.height, item.width), bool)
        mask_HW[top : top + patch_HW.shape[0], left : left + patch_HW.shape[1]] = patch_HW
        label = ignore_name(names) if value == IGNORE else names[value]
        results.append(
            {
                "id": f"{item.id[:6]}{len(results):04d}", "type": "brushlabels", "from_name": "brush", "to_name": "image",
                "original_width": item.width, "original_height": item.height, "image_rotation": 0,
                "value": {"format": "rle", "rle": brush_rle.encode(mask_HW), "brushlabels": [label]},
            }
        )  # fmt: skip
    data = {"image": f"/data/local-files/?d={quote(f'{folder}/{item.name}')}", ID: item.id}
    return {"data": data, "predictions": [{"model_version": model, "result": results}] if results else []}
