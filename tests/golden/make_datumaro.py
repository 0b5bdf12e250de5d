"""Writes voc/, cityscapes/ and coco/ beside this file with Datumaro and pycocotools, which the project does not use itself.

    python make_datumaro.py      # in an environment with datumaro 1.13 and pycocotools 2.0.11

truth/NAME.png holds the class ids that were meant, 255 where nothing was drawn. Tests read these files and never run this.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from datumaro.components.annotation import AnnotationType, LabelCategories, Mask, MaskCategories
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.media import Image as Picture
from datumaro.plugins.data_formats.cityscapes import CITYSCAPES_LABEL_MAP
from PIL import Image
from pycocotools import mask as coco

HERE = Path(__file__).parent
SIZES = {"one": (14, 23), "deep/two": (19, 11)}  # height, width: neither square, so that swapped axes show
NAMES = ["background", "cat", "dog"]
COLOURS = {0: (0, 0, 0), 1: (250, 10, 60), 2: (10, 60, 250)}


def blob(rng: np.random.Generator, height: int, width: int, size: float) -> np.ndarray:
    """A ragged ellipse, never symmetric."""
    rows, columns = np.mgrid[:height, :width]
    y, x = rng.uniform(0.3, 0.7) * height, rng.uniform(0.3, 0.7) * width
    far = (
        ((rows - y) / (size * height)) ** 2
        + ((columns - x) / (size * width)) ** 2
        + rng.uniform(0, 0.3, (height, width))
    )
    return far < 1


def scenes(labels: list[int]) -> tuple[list[DatasetItem], dict[str, np.ndarray]]:
    """Three blobs over each other, the smallest on top; items and what a pixel is."""
    rng, items, truth = np.random.default_rng(6), [], {}
    for name, (height, width) in SIZES.items():
        drawn, label_HW = [], np.full((height, width), 255, np.uint8)
        for order, (size, label) in enumerate(zip((0.5, 0.33, 0.2), labels, strict=True)):
            mask_HW = blob(rng, height, width, size)
            drawn.append(Mask(mask_HW, label=label, z_order=order))
            label_HW[mask_HW] = label
        pixels = rng.integers(0, 255, (height, width, 3)).astype(np.uint8)
        items.append(DatasetItem(id=name, subset="val", media=Picture.from_numpy(pixels), annotations=drawn))
        truth[name] = label_HW
    return items, truth


def write(format_: str, home: Path, items: list[DatasetItem], categories: object, **options: object) -> None:
    shutil.rmtree(home, ignore_errors=True)
    Dataset.from_iterable(items, categories=categories).export(str(home), format_, save_media=True, **options)


def keep(truth: dict[str, np.ndarray], home: Path) -> None:
    for name, label_HW in truth.items():
        path = home / "truth" / f"{name.replace('/', '_')}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(label_HW).save(path)


def make_voc() -> None:
    items, truth = scenes([1, 2, 1])
    categories = {
        AnnotationType.label: LabelCategories.from_iterable(NAMES),
        AnnotationType.mask: MaskCategories(COLOURS),
    }
    write("voc_segmentation", HERE / "voc", items, categories, label_map="source")
    keep({name: np.where(label_HW == 255, 0, label_HW) for name, label_HW in truth.items()}, HERE / "voc")


def make_cityscapes() -> None:
    names = list(CITYSCAPES_LABEL_MAP)
    items, truth = scenes([names.index("road"), names.index("parking"), names.index("rider")])
    write("cityscapes", HERE / "cityscapes", items, names, label_map="cityscapes")
    keep(truth, HERE / "cityscapes")  # label ids: Datumaro's list has Cityscapes' order


def make_coco() -> None:
    items, truth = scenes([1, 2, 1])
    write("coco_instances", HERE / "coco", items, NAMES)
    write("coco_panoptic", HERE / "coco_panoptic", items, NAMES)
    (HERE / "coco_panoptic/annotations").rename(HERE / "coco/panoptic")
    shutil.rmtree(HERE / "coco_panoptic")
    keep(truth, HERE / "coco")
    file = HERE / "coco/annotations/instances_val.json"
    document = json.loads(file.read_text())
    for annotation in document["annotations"]:  # the same as compressed text, and as polygons
        rle = coco.frPyObjects(annotation["segmentation"], *annotation["segmentation"]["size"])
        annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    (HERE / "coco/compressed_val.json").write_text(json.dumps(document))
    rng = np.random.default_rng(3)
    (height, width), filled = SIZES["one"], np.zeros(SIZES["one"], np.uint8)
    polygons = [np.round(rng.uniform(0, 1, (n, 2)) * (width, height), 2).ravel().tolist() for n in (5, 4)]
    filled |= coco.decode(coco.merge(coco.frPyObjects(polygons, height, width)))
    document["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 2, "segmentation": polygons, "iscrowd": 0, "area": 1, "bbox": []}
    ]
    (HERE / "coco/polygons_val.json").write_text(json.dumps(document))
    keep({"polygons": filled}, HERE / "coco")


if __name__ == "__main__":
    make_voc()
    make_cityscapes()
    make_coco()
