"""Real photographs, the same labels said in every format: each reader gives back the same pixels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.formats.common import class_list as class_lists
from pipeline.imaging import label_maps
from pipeline.ingest import pull
from tests.support import tiny_labels, tiny_source
from tests.support.tiny_labels import palette_png, png

Labels = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> tuple[dict[str, bytes], Labels, list[str]]:
    """Six of MSRC-21, landscape and portrait, with void borders: JPEG bytes, class ids, class names."""
    home = shared_data / "msrc21"
    ids = (home / "train.txt").read_text().split()[::55]
    names = class_lists.parse((home / "classes.txt").read_text().split("\n")[:-1], home)[0]
    labels = {key: tiny_labels.pixels((home / f"masks/{key}.png").read_bytes()) for key in ids}
    assert any((label_HW == 255).any() for label_HW in labels.values())
    assert len({label_HW.shape[0] > label_HW.shape[1] for label_HW in labels.values()}) == 2
    return {key: (home / f"images/{key}.jpg").read_bytes() for key in ids}, labels, [c["name"] for c in names]


def colours(names: list[str]) -> list[tuple[int, int, int]]:
    return label_maps.palette(len(names))


def folder(root: Path, labels: Labels, names: list[str]) -> None:
    table = np.array([*colours(names), *[(0, 0, 0)] * (255 - len(names)), label_maps.IGNORE_COLOUR], np.uint8)
    for key, label_HW in labels.items():
        tiny_source.put(root, f"masks/{key}.png", png(table[label_HW]))
    lines = (f"{n} {r} {g} {b}" for n, (r, g, b) in zip(names, colours(names), strict=True))
    (root / "classes.txt").write_text("\n".join(lines))


def binary(root: Path, labels: Labels, names: list[str]) -> None:
    for key, label_HW in labels.items():
        for number in np.unique(label_HW[label_HW < 255]):
            data = png((label_HW == number).astype(np.uint8) * np.uint8(255))
            tiny_source.put(root, f"masks/{names[number]}/{key}.png", data)
    (root / "classes.txt").write_text("\n".join(names))


def voc(root: Path, labels: Labels, names: list[str]) -> None:
    palette = [*colours(names), *[(0, 0, 0)] * (255 - len(names)), label_maps.IGNORE_COLOUR]
    for key, label_HW in labels.items():
        tiny_source.put(root, f"SegmentationClass/{key}.png", palette_png(label_HW, palette))
    lines = (f"{n}:{r},{g},{b}::" for n, (r, g, b) in zip(names, colours(names), strict=True))
    (root / "labelmap.txt").write_text("\n".join(lines))
    (root / "images").rename(root / "JPEGImages")


def coco(root: Path, labels: Labels, names: list[str]) -> None:
    images, annotations = [], []
    for number, (key, label_HW) in enumerate(labels.items()):
        height, width = label_HW.shape
        images.append({"id": number, "file_name": f"{key}.jpg", "height": height, "width": width})
        for value, rle in label_maps.class_rles(label_HW).items():
            if value < 255:
                annotations.append({"image_id": number, "category_id": 10 * value, "segmentation": rle})
    categories = [{"id": 10 * k, "name": name} for k, name in enumerate(names)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    tiny_source.put(root, "annotations/instances_train.json", json.dumps(document).encode())


def panoptic(root: Path, labels: Labels, names: list[str]) -> None:
    coco(root, labels, names)
    file = root / "annotations/instances_train.json"
    document: dict[str, Any] = json.loads(file.read_text()) | {"annotations": []}
    for number, (key, label_HW) in enumerate(labels.items()):
        segment_HW = np.where(label_HW == 255, 0, 70_000 + 300 * label_HW.astype(int))
        pixels = np.stack([segment_HW % 256, segment_HW // 256 % 256, segment_HW // 65536], axis=2).astype(np.uint8)
        tiny_source.put(root, f"annotations/panoptic_train/{key}.png", png(pixels))
        segments = [{"id": 70_000 + 300 * int(k), "category_id": 10 * int(k)} for k in np.unique(label_HW) if k < 255]
        document["annotations"].append({"image_id": number, "file_name": f"{key}.png", "segments_info": segments})
    (root / "annotations/panoptic_train.json").write_text(json.dumps(document))
    file.unlink()


@pytest.mark.parametrize(
    ("source", "write"), [("folder", folder), ("folder", binary), ("voc", voc), ("coco", coco), ("coco", panoptic)]
)
def test_the_same_labels_in_every_format(
    tmp_path: Path,
    photographs: tuple[dict[str, bytes], Labels, list[str]],
    source: str,
    write: Callable[[Path, Labels, list[str]], None],
) -> None:
    images, labels, names = photographs
    for key, data in images.items():
        tiny_source.put(tmp_path, f"images/{key}.jpg", data)
    write(tmp_path, labels, names)
    found = tiny_labels.read(pull.READERS[source], tmp_path, source)
    assert [c["name"] for c in found.classes] == names
    made = tiny_labels.labels(found)
    assert made.keys() == labels.keys()
    for key, label_HW in made.items():
        np.testing.assert_array_equal(label_HW, labels[key])
    content = tiny_labels.content(found)
    assert {name: content[name] for name in content if name.startswith("images/")} == {
        f"images/{key}.jpg": data for key, data in images.items()
    }
