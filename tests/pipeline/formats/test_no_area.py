"""One policy for all readers: a shape that covers no pixel is left out and counted, unless its pixels would be background."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.formats import coco, cvat, labelme, labelstudio
from pipeline.formats.common.source import Source
from tests.support import tiny_labels, tiny_source

Points = list[list[float]]
TRIANGLE: Points = [[0, 0], [10, 0], [10, 4]]


def _image(root: Path) -> None:
    tiny_source.put(root, "images/a.png", tiny_source.encode(np.zeros((4, 10, 3), np.uint8)))


def _coco(root: Path, polygons: list[Points], **data: Any) -> Source:
    drawn = [
        {"id": n, "image_id": 1, "category_id": 1, "segmentation": [[v for point in ring for v in point]]}
        for n, ring in enumerate(polygons)
    ]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 10, "height": 4}], "annotations": drawn,
        "categories": [{"id": 1, "name": "cat"}],
    }  # fmt: skip
    tiny_source.put(root, "labels.json", json.dumps(document).encode())
    return tiny_labels.read(coco.read, root, "coco", **data)


def _labelme(root: Path, polygons: list[Points], **data: Any) -> Source:
    shapes = [{"label": "cat", "shape_type": "polygon", "points": ring} for ring in polygons]
    document = {"shapes": shapes, "imagePath": "a.png", "imageHeight": 4, "imageWidth": 10, "imageData": None}
    tiny_source.put(root, "images/a.json", json.dumps(document).encode())
    return tiny_labels.read(labelme.read, root, "labelme", **data)


def _cvat(root: Path, polygons: list[Points], **data: Any) -> Source:
    drawn = "".join(
        '<polygon label="cat" points="{}"/>'.format(";".join(f"{x},{y}" for x, y in ring)) for ring in polygons
    )
    text = "<annotations><meta><task><labels><label><name>cat</name></label></labels></task></meta>"
    text += f'<image id="0" name="a.png" width="10" height="4">{drawn}</image></annotations>'
    tiny_source.put(root, "annotations.xml", text.encode())
    return tiny_labels.read(cvat.read, root, "cvat", **data)


def _labelstudio(root: Path, polygons: list[Points], **data: Any) -> Source:
    results = [
        {
            "id": f"r{n}", "original_width": 10, "original_height": 4, "type": "polygonlabels",
            "value": {"points": [[10 * x, 25 * y] for x, y in ring], "polygonlabels": ["cat"]},
        }
        for n, ring in enumerate(polygons)
    ]  # fmt: skip
    tasks = [{"id": 1, "data": {"image": "a.png"}, "annotations": [{"id": 1, "result": results}]}]
    tiny_source.put(root, "export.json", json.dumps(tasks).encode())
    return tiny_labels.read(labelstudio.read, root, "labelstudio", **data)


READERS = [_coco, _labelme, _cvat, _labelstudio]


@pytest.mark.parametrize("write_and_read", READERS)
@pytest.mark.parametrize("ring", [[[1.0, 1.0], [2.0, 2.0]], [[1.0, 1.0]]])
def test_a_polygon_of_two_points_is_left_out_and_counted(
    tmp_path: Path, write_and_read: Callable[..., Source], ring: Points
) -> None:
    _image(tmp_path)
    alone = tiny_labels.labels(write_and_read(tmp_path, [TRIANGLE]))
    source = write_and_read(tmp_path, [TRIANGLE, ring])

    np.testing.assert_array_equal(tiny_labels.labels(source)["a"], alone["a"])
    assert [kind.replace("-", " ") for kind, _ in source.skipped if "area" in kind] == ["shape without area"]
    assert not tiny_labels.refusals(source)


@pytest.mark.parametrize("write_and_read", READERS)
def test_it_refuses_the_mask_where_its_pixels_would_be_background(
    tmp_path: Path, write_and_read: Callable[..., Source]
) -> None:
    _image(tmp_path)
    source = write_and_read(tmp_path, [TRIANGLE, [[1.0, 1.0], [2.0, 2.0]]], unannotated="background")

    assert tiny_labels.refusals(source) == {"masks/a.png": "shape-without-area"}


def test_boxes_and_discs_of_a_click_have_no_area_either(tmp_path: Path) -> None:
    _image(tmp_path)
    click = {"label": "cat", "shape_type": "rectangle", "points": [[1, 1], [1, 3]]}
    dot = {"label": "cat", "shape_type": "circle", "points": [[1, 1], [1, 1]]}
    ring = {"label": "cat", "shape_type": "polygon", "points": TRIANGLE}
    document = {"shapes": [ring, click, dot], "imagePath": "a.png", "imageHeight": 4, "imageWidth": 10}
    tiny_source.put(tmp_path, "images/a.json", json.dumps(document).encode())
    source = tiny_labels.read(labelme.read, tmp_path, "labelme")

    assert len([kind for kind, _ in source.skipped if kind == "shape-without-area"]) == 2
    assert set(np.unique(tiny_labels.labels(source)["a"])) == {0, 255}
