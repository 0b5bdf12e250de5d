"""What is written for Label Studio: tasks with pre-labels, and the labeling interface for them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from pipeline.formats.common import brush_rle
from pipeline.formats.common.annotations import IGNORE, ignore_name
from pipeline.formats.common.regions import regions
from pipeline.formats.common.task import Item
from pipeline.formats.labelstudio.reader import ID
from pipeline.imaging import label_maps
from pipeline.storage import atomic


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
