"""COCO, written: images/ and annotations/instances_default.json, as pycocotools, Datumaro and CVAT read it.

One annotation for each class of an image, in compressed run lengths (column by column) with `iscrowd` 0, as COCO-stuff
has it: pycocotools leaves `iscrowd` 1 out of scores. Ignored pixels are in no annotation; so `data.unannotated: ignore`
gives back the label map as it was.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.common.task import Item
from pipeline.imaging import label_maps
from pipeline.storage import atomic

FILE = "annotations/instances_default.json"  # the name that Datumaro and CVAT look for


def write(folder: Path, items: Iterable[Item], classes: Sequence[dict[str, Any]]) -> int:
    """Replace `folder` as a whole; returns how many images. Category ids are class ids + 1: 0 is no COCO category."""
    pictures: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    with atomic.replacing_folder(folder) as fresh:
        for number, item in enumerate(items, 1):
            atomic.write_bytes(fresh / "images" / item.name, item.image)
            pictures.append({"id": number, "file_name": item.name, "height": item.height, "width": item.width})
            if item.label_HW is not None:
                found += annotations(item.label_HW, number, len(found) + 1)
        categories = [{"id": c["id"] + 1, "name": c["name"], "supercategory": "", "color": c["color"]} for c in classes]
        whole = {"info": {}, "licenses": [], "images": pictures, "annotations": found, "categories": categories}
        atomic.write_text(fresh / FILE, json.dumps(whole, ensure_ascii=False, separators=(",", ":")) + "\n")
    return len(pictures)


def annotations(label_HW: NDArray[np.uint8], image: int, first: int) -> list[dict[str, Any]]:
    """One image's annotations, numbered from `first`."""
    out: list[dict[str, Any]] = []
    for value, rle in label_maps.class_rles(label_HW).items():
        if value == label_maps.IGNORE:
            continue
        rows, columns = np.nonzero(label_HW == value)
        box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        out.append(
            {
                "id": first + len(out), "image_id": image, "category_id": value + 1, "segmentation": rle,
                "area": len(rows), "bbox": box, "iscrowd": 0,
            }
        )  # fmt: skip
    return out
