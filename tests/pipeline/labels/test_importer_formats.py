"""What each tool brings back, in folders, zips and JSON: the same mask, or a reason."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import paths
from pipeline.formats.common import brush_rle
from pipeline.formats.common.task import task_name
from pipeline.imaging import label_maps
from pipeline.storage import manifest
from tests.support import tiny_source
from tests.support.label_project import CLASSES, NEW, add, codes, rebuilt, row


def labelstudio_json(path: Path) -> None:
    value = [
        {
            "original_height": 48, "original_width": 64, "type": "brushlabels",
            "value": {"format": "rle", "rle": brush_rle.encode(k == NEW), "brushlabels": [name]},
        }
        for k, name in enumerate(tiny_source.CLASSES)
    ]  # fmt: skip
    task = {"data": {"image": "/data/upload/1/0a1b2c3d-x.png", "marginalia_id": row("base/u/00").id}}
    path.write_text(json.dumps([{**task, "annotations": [{"result": value}]}]))


def coco_json(path: Path) -> None:
    label = {"id": 1, "file_name": "images/u/00.png", "height": 48, "width": 64}
    found = [
        {"id": k, "image_id": 1, "category_id": 7 - k, "segmentation": label_maps.to_rle(k == NEW)}
        for k in range(len(CLASSES))
    ]
    categories = [{"id": 7 - k, "name": name} for k, name in enumerate(tiny_source.CLASSES)]
    path.write_text(json.dumps({"images": [label], "annotations": found, "categories": categories}))


def folder(path: Path, encode: Callable[[np.ndarray], bytes] = tiny_source.encode, names: str = "") -> None:
    tiny_source.put(path, "masks/u/00.png", encode(NEW))
    if names:
        (path / "classes.txt").write_text(names)


def palette(label: np.ndarray) -> bytes:
    """Colours that mean nothing: who opened it as RGB would find no class."""
    picture = Image.fromarray(label, "P")
    picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "write",
    [
        labelstudio_json, coco_json, folder,
        lambda path: folder(path, palette),
        lambda path: folder(path, lambda label: tiny_source.encode(label_maps.colourise(label, [c["color"] for c in CLASSES]))),
        lambda path: folder(path, lambda label: tiny_source.encode(np.array([2, 1, 0], np.uint8)[label]), "floor\nwall\nsky"),
        lambda path: tiny_source.put(path, "u/00.png", tiny_source.encode(NEW)),
        lambda path: [tiny_source.put(path, "masks/x.png", tiny_source.encode(NEW)),
                      (path / "names.json").write_text(json.dumps({"x": row("base/u/00").id}))],
    ],
    ids=["labelstudio", "coco", "ids", "palette", "colours", "other-order", "masks-only", "names.json"],
)  # fmt: skip
def test_every_tool_brings_the_same_mask_back(write: Callable[[Path], Any], root: Path) -> None:
    write(Path("back"))
    result = add(Path("back"))
    assert (result.name, result.taken, result.refused) == ("back", 1, [])
    np.testing.assert_array_equal(manifest.open_mask(rebuilt()["base/u/00"], 10**6), NEW)


def zip_of_masks(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("masks/u/00.png", tiny_source.encode(NEW))


def test_a_zip_of_masks_is_a_folder_of_them(root: Path) -> None:
    zip_of_masks(Path("back.zip"))
    assert add(Path("back.zip"))[:3] == ("back", "folder", 1)
    np.testing.assert_array_equal(manifest.open_mask(rebuilt()["base/u/00"], 10**6), NEW)
    assert not list(Path("data/labels").glob(".importing*"))


@pytest.mark.parametrize(("unannotated", "rest"), [("ignore", 255), ("background", 0)])
def test_pixels_in_no_shape_are_what_the_project_says(unannotated: str, rest: int, root: Path) -> None:
    """The image's class `background` is there, or the source itself would have been refused."""
    source = json.loads(Path("data/pulled/source.json").read_text())
    source["classes"][0]["name"] = "background"
    Path("data/pulled/source.json").write_text(json.dumps(source))
    settings = yaml.safe_load(Path("params.yaml").read_text())
    settings["data"]["unannotated"] = unannotated
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    name = task_name(row("base/u/00").id, "x.png")
    body = '<polygon label="wall" points="0,0;64,0;64,20;0,20"/>'
    Path("a.xml").write_text(
        f'<annotations><image id="0" name="{name}" width="64" height="48">{body}</image></annotations>'
    )
    assert add(Path("a.xml")).taken == 1
    mask = manifest.open_mask(rebuilt()["base/u/00"], 10**6)
    assert np.unique(mask[:20]).tolist() == [1]
    assert np.unique(mask[20:]).tolist() == [rest]


def test_a_folder_of_masks_refuses_its_bad_ones_alone(root: Path) -> None:
    home = Path("back")
    tiny_source.put(home, "masks/u/00.png", tiny_source.encode(np.where(NEW == 2, 65535, NEW).astype(np.uint16)))
    tiny_source.put(home, "masks/u/01.png", tiny_source.encode(np.full((48, 64), 9, np.uint8)))
    tiny_source.put(home, "masks/u/02.png", b"no picture")
    tiny_source.put(home, "masks/h/00.png", tiny_source.encode(np.full((48, 64), 300, np.uint16)))
    result = add(home)
    assert codes(result) == {"h/00.png": "mask-class-id", "u/01.png": "mask-class-id", "u/02.png": "not-an-image"}
    np.testing.assert_array_equal(manifest.open_mask(rebuilt()["base/u/00"], 10**6), np.where(NEW == 2, 255, NEW))


def test_a_voc_folder_says_by_its_labelmap_what_its_ids_mean(root: Path) -> None:
    """Its first class is another than ours: taken as our ids, floor would come in as wall. Images are no masks."""
    home = Path("back")
    name = task_name(row("base/u/00").id, "x")
    tiny_source.put(
        home, "labelmap.txt", b"# label:color_rgb:parts:actions\nfloor:1,1,1::\nwall:2,2,2::\nsky:3,3,3::\n"
    )
    tiny_source.put(home, f"SegmentationClass/{name}.png", tiny_source.encode(2 - NEW))
    tiny_source.put(home, f"JPEGImages/{name}.png", tiny_source.encode(np.zeros((48, 64), np.uint8)))
    result = add(home)
    assert (result.taken, result.refused) == (1, [])
    np.testing.assert_array_equal(manifest.open_mask(rebuilt()["base/u/00"], 10**6), NEW)


def test_a_name_that_two_dumps_have_is_not_guessed(root: Path) -> None:
    rows = manifest.read(paths.SPLIT_MANIFEST)
    twin = next(r for r in rows if r.dump == "d")
    manifest.write(paths.SPLIT_MANIFEST, [*rows, replace(twin, id="f" * 64, dump="e")])
    tiny_source.put(Path("back"), f"{twin.name}.png", tiny_source.encode(NEW))
    assert codes(add(Path("back"))) == {f"{twin.name}.png": "ambiguous-name"}
    tiny_source.put(Path("other"), f"d/{twin.name}.png", tiny_source.encode(NEW))
    assert add(Path("other")).taken == 1


def with_background(**data: str) -> None:
    """Call the first class `background`, and change settings of `data`."""
    source = json.loads(Path("data/pulled/source.json").read_text())
    source["classes"][0]["name"] = "background"
    Path("data/pulled/source.json").write_text(json.dumps(source))
    settings = yaml.safe_load(Path("params.yaml").read_text())
    settings["data"] |= data
    Path("params.yaml").write_text(yaml.safe_dump(settings))


def cvat_picture(body: str) -> Path:
    name = task_name(row("base/u/00").id, "x.png")
    image = f'<image id="0" name="{name}" width="64" height="48">{body}</image>'
    Path("a.xml").write_text(f"<annotations>{image}</annotations>")
    return Path("a.xml")


def test_what_cannot_be_painted_refuses_the_mask_where_it_would_become_background(root: Path) -> None:
    body = '<polygon label="wall" points="0,0;64,0;64,20;0,20"/><polyline label="floor" points="0,0;60,40"/>'
    with_background(unannotated="background")
    assert list(codes(add(cvat_picture(body))).values()) == ["shape-without-area"]
    with_background(unannotated="ignore")
    assert add(cvat_picture(body)).taken == 1


def test_an_image_without_shapes_is_named_or_all_background(root: Path) -> None:
    with_background(unannotated="background")
    assert list(codes(add(cvat_picture(""))).values()) == ["no-shapes"]
    with_background(no_shapes="background")
    assert add(cvat_picture("")).taken == 1
    assert not manifest.open_mask(rebuilt()["base/u/00"], 10**6).any()


def test_a_folder_or_zip_with_cocos_json_is_read_by_it_and_its_photographs_are_no_masks(root: Path) -> None:
    coco_json(Path("c"))
    document = Path("c").read_bytes() if Path("c").is_file() else next(Path("c").rglob("*.json")).read_bytes()
    with zipfile.ZipFile("job.zip", "w") as archive:
        archive.writestr("annotations/instances_default.json", document)
        archive.writestr("images/default/x.png", tiny_source.encode(tiny_source.picture(7)))
    result = add(Path("job.zip"))
    assert (result.tool, result.taken, result.refused) == ("coco", 1, [])


def test_masks_of_0_and_255_are_the_two_classes_of_a_list_of_two(root: Path) -> None:
    home = Path("back")
    (home / "masks/u").mkdir(parents=True)
    (home / "classes.txt").write_text("sky\nfloor\n")
    tiny_source.put(home, "masks/u/00.png", tiny_source.encode(np.where(NEW == 2, 255, 0).astype(np.uint8)))
    assert add(home).taken == 1
    np.testing.assert_array_equal(manifest.open_mask(rebuilt()["base/u/00"], 10**6), np.where(NEW == 2, 2, 0))
