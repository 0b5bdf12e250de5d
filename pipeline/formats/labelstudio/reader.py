"""Label Studio: the JSON export (a list of tasks), and tasks with pre-labels as predictions.

Read: brush, bitmask, polygon, rectangle (turned about its top left corner) and ellipse, whatever control tag drew them: the
value's own fields say what it is. Points, lines and regions without a label are counted, and refuse their image's mask where
pixels in no shape are background. Coordinates are percent of the image; later regions lie over earlier ones. Of several
annotations of a task, cancelled ones never count; one marked as ground truth comes before the others, then the one
changed last; the others are counted. An empty one that would overrule shapes without that mark, and a region with two labels,
refuse their mask. Predictions are never labels. Tasks without an annotation are pictures without shapes.

Written: one brush region per region as `regions.regions` cuts them, ignored pixels under the label `ignore` (or the
next free name), and the image id in the task's data, where it survives every export.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from pipeline import config
from pipeline.formats.common import parsing, tool_source
from pipeline.formats.common.annotations import Patch, Picture, Shape
from pipeline.formats.common.source import Source, SourceError
from pipeline.formats.common.tool_source import ToolExport
from pipeline.formats.labelstudio.regions import is_region, lost, shape, two_labels
from pipeline.formats.names import image_files
from pipeline.imaging.decode import Refused

MAX_BYTES = 1 << 29
OVERRULED = "annotation of a task that has a later one, or one marked as ground truth"
ID = "marginalia_id"  # the task data's field that holds the image id


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
    live = sorted(_live(task), key=_rank)
    full = _full_below_empty(live)
    counted = full or (live[-1] if live else {"result": []})
    results = _results(counted)
    drawn = [Shape(*found) for number, result in enumerate(results) for found in shape(result, number)]
    regions = _regions(counted)
    sizes = {(_whole(r.get("original_height")), _whole(r.get("original_width"))) for r in regions}
    height, width = max(sizes, default=(0, 0))

    why_not = ""
    if len(sizes - {(0, 0)}) > 1 or (drawn and 0 in (height, width)):
        why_not = f"its regions state the sizes {sorted(sizes)} (height, width); export the task again"
    elif full is not None:
        why_not = (
            f"annotation {live[-1].get('id')} is empty and came after {full.get('id')}, which has regions; delete one, or "
            "mark the right one as ground truth"
        )
    elif unclear := two_labels(regions):
        why_not = unclear
    own_id = next((value for key, value in task["data"].items() if key == ID and isinstance(value, str)), "")
    return Picture(
        names[0] if names else f"task {task.get('id')}",
        height,
        width,
        [_refusing(found, why_not) for found in drawn[:1]] if why_not else drawn,
        own_id,
        names=names[1:],
        lost=lost(results),
        annotated=bool(live),
        overruled=[(OVERRULED, f"annotation {one.get('id')}") for one in live if one is not counted and _regions(one)],
    )


def _results(annotation: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [r for r in annotation["result"] if isinstance(r, dict) and isinstance(r.get("value"), dict)]


def _regions(annotation: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [result for result in _results(annotation) if is_region(result)]


def _refusing(drawn: Shape, reason: str) -> Shape:
    """The shape, but its picture's mask is refused."""

    def draw(height: int, width: int) -> Patch:
        raise Refused("bad-shape", reason)

    return drawn._replace(draw=draw)


def _live(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The annotations that somebody handed in and nobody cancelled."""
    given = task.get("annotations", task.get("completions")) or []
    return [
        a for a in given if isinstance(a, dict) and not a.get("was_cancelled") and isinstance(a.get("result"), list)
    ]


def _rank(annotation: Mapping[str, Any]) -> tuple[bool, str, int]:
    """The one that counts is the last in this order."""
    return (
        bool(annotation.get("ground_truth")),
        str(annotation.get("updated_at") or annotation.get("created_at") or ""),
        _whole(annotation.get("id")),
    )


def _full_below_empty(live: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last annotation with regions where a later one is empty: nobody can tell whether there is something on the picture,
    unless the empty one is marked as ground truth. None where that is clear."""
    if not live or _regions(live[-1]) or live[-1].get("ground_truth"):
        return None
    return next((one for one in reversed(live) if _regions(one)), None)


def _names(task: dict[str, Any]) -> list[str]:
    """What the image may be called: `image` comes first, then the other texts, then both as Label Studio stores uploads."""
    texts = {key: value for key, value in task["data"].items() if isinstance(value, str) and key != ID}
    order = sorted(texts, key=lambda key: key != "image")
    names = [*(image_name(texts[key]) for key in order), *(_path(texts[key]).rpartition("/")[2] for key in order)]
    return [name for name in dict.fromkeys(names) if name]


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


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
