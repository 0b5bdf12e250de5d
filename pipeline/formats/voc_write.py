"""Pascal VOC's layout, written: JPEGImages, SegmentationClass, ImageSets/Segmentation and labelmap.txt.

Masks are palette PNGs of class ids, 255 where ignored. Images keep their bytes and their own extension: other programs
look for .jpg alone, but a picture that is packed again is another picture.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.formats.common.class_list import IGNORE
from pipeline.formats.common.source import name_id
from pipeline.formats.common.task import Item
from pipeline.imaging import label_maps
from pipeline.storage import atomic

SETS = {"labelled": "train", "unlabelled": "unlabelled", "val": "val", "test": "test"}  # split -> file


def write(
    folder: Path, items: Iterable[Item], classes: Sequence[dict[str, Any]], splits: Mapping[str, str] | None = None
) -> int:
    """Replace `folder` as a whole; returns how many images.

    Args:
        splits: image id -> split; an image in none of `SETS` is in no set.
    """
    colours = [tuple(c["color"]) for c in classes]
    if len({*colours, label_maps.IGNORE_COLOUR}) <= len(
        colours
    ):  # readers that go by colour must tell the classes apart
        colours = label_maps.palette(len(classes))
    sets: dict[str, list[str]] = {}
    count = 0
    with atomic.replacing_folder(folder) as fresh:
        for item in items:
            count += 1
            stem = name_id(item.name)
            atomic.write_bytes(fresh / "JPEGImages" / item.name, item.image)
            if item.label_HW is not None:
                atomic.write_bytes(
                    fresh / "SegmentationClass" / f"{stem}.png", label_maps.encode_png(item.label_HW, colours)
                )
            if part := SETS.get((splits or {}).get(item.id, "")):
                sets.setdefault(part, []).append(stem)
        for part, names in sets.items():
            atomic.write_text(fresh / "ImageSets/Segmentation" / f"{part}.txt", "".join(f"{n}\n" for n in names))
        lines = [f"{c['name']}:{','.join(map(str, v))}::\n" for c, v in zip(classes, colours, strict=True)]
        if IGNORE not in {c["name"] for c in classes}:  # Datumaro refuses colours that the map does not name
            lines.append(f"{IGNORE}:{','.join(map(str, label_maps.IGNORE_COLOUR))}::\n")
        atomic.write_text(fresh / "labelmap.txt", "# label:color_rgb:parts:actions\n" + "".join(lines))
    return count
