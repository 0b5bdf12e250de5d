"""labelme files: each kind of shape, where the picture is, and EXIF."""

import base64
import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import paths
from pipeline.formats import labelme
from pipeline.formats.common import rasterize
from pipeline.formats.common.source import Source, SourceError
from pipeline.storage import manifest
from tests.support import image_files, tiny_labels, tiny_source
from tests.support.tiny_labels import png

HEIGHT, WIDTH = 12, 18
RING = [[2, 1], [15.5, 3], [9, 11]]
SQUARE = base64.b64encode(png(np.ones((2, 2), np.uint8))).decode()


def read(root: Path, **data: Any) -> Source:
    return tiny_labels.read(labelme.read, root, "labelme", **data)


def put(root: Path, drawn: list[Any], name: str = "a", picture: str | None = None, **changes: Any) -> Path:
    """NAME.json beside NAME.png."""
    if picture is None:
        tiny_source.put(root, f"{name}.png", tiny_source.encode(tiny_source.picture(1, HEIGHT, WIDTH)))
    document = {"shapes": drawn, "imagePath": picture or f"{Path(name).name}.png", "imageHeight": HEIGHT}
    document |= {"imageWidth": WIDTH, "imageData": None} | changes
    tiny_source.put(root, f"{name}.json", json.dumps(document).encode())
    return root


def shape(label: str = "cat", kind: str = "polygon", points: Any = RING, **more: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": points, "flags": {}, "group_id": None} | more


def test_each_kind_of_shape(tmp_path: Path) -> None:
    crop_HW = np.random.default_rng(0).random((4, 3)) < 0.6
    crop = base64.b64encode(png(crop_HW.astype(np.uint8) * np.uint8(255))).decode()
    drawn = {
        "polygon": shape(),
        "old": {"label": "cat", "points": RING},  # before labelme 3.3 every shape was a polygon
        "rectangle": shape(kind="rectangle", points=[[9, 8], [3.2, 2]]),
        "circle": shape(kind="circle", points=[[8, 6], [11, 10]]),
        "mask": shape(kind="mask", points=[[5, 2], [7, 5]], mask=crop),
    }
    for name, item in drawn.items():
        put(tmp_path, [item], name)
    found = {name: label_HW == 0 for name, label_HW in tiny_labels.labels(read(tmp_path)).items()}
    ring_HW = rasterize.fill([np.array(RING, float)], HEIGHT, WIDTH)
    np.testing.assert_array_equal(found["polygon"], ring_HW)
    np.testing.assert_array_equal(found["old"], ring_HW)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    np.testing.assert_array_equal(found["rectangle"], (rows > 2) & (rows < 8) & (columns > 3.2) & (columns < 9))
    np.testing.assert_array_equal(found["circle"], np.hypot(rows - 6, columns - 8) <= 5)
    expected_HW = np.zeros((HEIGHT, WIDTH), bool)
    expected_HW[2:6, 5:8] = crop_HW  # both corners belong to the box
    np.testing.assert_array_equal(found["mask"], expected_HW)


def test_later_shapes_lie_on_top_and_ignore_means_255(tmp_path: Path) -> None:
    drawn = [shape("wall", "rectangle", [[0, 0], [18, 12]]), shape("cat", "rectangle", [[0, 0], [9, 12]])]
    put(tmp_path, [*drawn, shape("__ignore__", "rectangle", [[0, 0], [18, 2]])])
    source = read(tmp_path)
    assert [c["name"] for c in source.classes] == ["cat", "wall"]
    label_HW = tiny_labels.labels(source)["a"]
    assert (label_HW[:2] == 255).all()
    assert (label_HW[2:, :9] == 0).all()
    assert (label_HW[2:, 9:] == 1).all()


def test_background_is_labelme_s_own_or_a_new_class(tmp_path: Path) -> None:
    put(tmp_path, [shape("cat")])
    source = read(tmp_path, unannotated="background")
    assert [c["name"] for c in source.classes] == ["background", "cat"]
    assert np.unique(tiny_labels.labels(source)["a"]).tolist() == [0, 1]
    put(tmp_path, [shape("_background_", points=[[0, 0], [1, 0], [1, 1]])], "b")
    source = read(tmp_path, unannotated="background")
    assert [c["name"] for c in source.classes] == ["_background_", "cat"]
    assert np.unique(tiny_labels.labels(source)["a"]).tolist() == [0, 1]


def test_images_without_shapes_are_unlabelled_and_lists_take_paths(tmp_path: Path) -> None:
    put(tmp_path, [shape()], "cam/a")
    put(tmp_path, [], "cam/b")
    tiny_source.put(tmp_path, "cam/c.jpg", b"x")
    (tmp_path / "val.txt").write_text("cam/a.png\n")
    source = read(tmp_path, lists={"val": "val.txt"})
    assert [name for name, _ in source.files] == [
        "images/cam/a.png", "images/cam/b.png", "images/cam/c.jpg", "masks/cam/a.png",
    ]  # fmt: skip
    assert source.lists["val"] == ["cam/a"]


@pytest.mark.parametrize("stated", ["../images/x.png", "..\\images\\x.png"])
def test_the_image_may_lie_in_another_folder(tmp_path: Path, stated: str) -> None:
    tiny_source.put(tmp_path, "images/x.png", b"x")
    put(tmp_path, [shape()], "labels/x", picture=stated)
    assert [name for name, _ in read(tmp_path).files] == ["images/x.png", "masks/x.png"]


def test_an_embedded_image_stands_in_for_a_missing_one_and_no_path_leads_out(tmp_path: Path) -> None:
    secret = tiny_source.put(tmp_path, "secret.png", b"secret")
    picture = tiny_source.encode(tiny_source.picture(2, HEIGHT, WIDTH))
    root = put(tmp_path / "root", [shape()], "a", picture=str(secret), imageData=base64.b64encode(picture).decode())
    put(root, [shape()], "b", picture="../secret.png")
    source = read(root)
    assert tiny_labels.content(source)["images/a.png"] == picture
    assert tiny_labels.refusals(source) == {"images/b.png": "image-missing"}


def test_the_file_with_the_images_own_name_comes_before_its_copy_and_equals_are_refused(tmp_path: Path) -> None:
    put(tmp_path, [shape("dog")], "a - Copy", picture="a.png")
    put(tmp_path, [shape()], "a")
    source = read(tmp_path)
    assert [c["name"] for c in source.classes] == ["cat"]
    assert tiny_labels.refusals(source) == {"labels/a - Copy.json": "duplicate-name"}

    old, new = (put(tmp_path / "b", [shape()], f"{version}/x", picture="../images/y.png") for version in ("v1", "v2"))
    assert old == put(new, [shape()], "z")
    tiny_source.put(old, "images/y.png", b"x")
    source = read(old)
    assert "masks/y.png" not in dict(source.files)
    assert tiny_labels.refusals(source).keys() == {"labels/v1/x.json", "labels/v2/x.json", "masks/y.png"}


def test_a_picture_inside_that_is_a_file_of_the_tree_is_that_file(tmp_path: Path) -> None:
    picture = tiny_source.encode(tiny_source.picture(2, HEIGHT, WIDTH))
    tiny_source.put(tmp_path, "photos/x.PNG", picture)
    put(tmp_path, [shape()], "json/x", picture="x.png", imageData=base64.b64encode(picture).decode())
    put(tmp_path, [shape()], "json/y", picture="x.PNG", imageData=base64.b64encode(picture + b"other").decode())
    names = [name for name, _ in read(tmp_path).files]
    assert names == ["images/photos/x.PNG", "images/json/y.png", "masks/photos/x.png", "masks/json/y.png"]


def test_what_was_made_of_label_files_and_masks_beside_images_are_no_images(tmp_path: Path) -> None:
    put(tmp_path, [shape()], "a")
    for name in ("a_mask.png", "a_json/img.png", "a_json/label.png", "a_json/label_names.txt"):
        tiny_source.put(tmp_path, name, png(np.zeros((HEIGHT, WIDTH), np.uint8)))
    source = read(tmp_path)
    assert [name for name, _ in source.files] == ["images/a.png", "masks/a.png"]
    assert {name for _, name in source.skipped} == {
        "a_mask.png",
        "a_json/img.png",
        "a_json/label.png",
        "a_json/label_names.txt",
    }


def test_two_files_for_one_image_are_refused(tmp_path: Path) -> None:
    put(tmp_path, [shape()], "a")
    put(tmp_path, [shape()], "b", picture="a.png")
    assert tiny_labels.refusals(read(tmp_path)) == {"labels/b.json": "duplicate-name"}


@pytest.mark.parametrize(
    ("item", "code"),
    [
        (shape(points=[[0, 0], [5, 5], [float("nan"), 3]]), "bad-polygon"),
        (shape(kind="spline", points=[[0, 0], [5, 5]]), "bad-shape"),
        (shape(kind="circle", points=[[0, 0]]), "bad-shape"),
        (shape(kind="circle", points=[[0, 0], [float("inf"), 1]]), "label-file"),
        (shape(kind="rectangle", points=[[0, 0], [1, 1e30]]), "bad-shape"),
        (shape(kind="mask", points=[[0, 0], [2, 2]], mask="AAAA"), "not-an-image"),
        (shape(kind="mask", points=[[0, 0], [2, 2]], mask=SQUARE), "bad-shape"),
        (shape(kind="mask", points=[[17, 0], [18, 1]], mask=SQUARE), "bad-shape"),
        (shape(kind="mask", points=[[0, 0], [2, 2]]), "label-file"),
        (shape(points="no"), "label-file"),
        ("no shape", "label-file"),
        ({"label": 5, "points": RING}, "label-file"),
    ],
)  # fmt: skip
def test_one_broken_shape_refuses_the_mask_but_not_the_image(tmp_path: Path, item: Any, code: str) -> None:
    put(tmp_path, [shape(), item])
    put(tmp_path, [shape()], "b")
    source = read(tmp_path)
    assert tiny_labels.refusals(source) == {"masks/a.png": code}
    assert {"images/a.png", "images/b.png"} <= dict(source.files).keys()


def test_points_are_on_the_upright_photo(tmp_path: Path) -> None:
    """A photo that EXIF turns by 90 degrees: labelme shows it upright, and so its sizes are swapped in the file."""
    root, project = tmp_path / "root", tmp_path / "project"
    upright_HWC = np.zeros((WIDTH, HEIGHT, 3), np.uint8)
    upright_HWC[:6, :4] = 250
    stored = Image.fromarray(upright_HWC).transpose(image_files.TURNS[8])  # what orientation 6 turns back
    photo = image_files.save(stored, "JPEG", quality=95, subsampling=0, exif=image_files.exif(6))
    tiny_source.put(root, "a.jpg", photo)
    corner = shape("cat", "rectangle", [[0, 0], [4, 6]])
    put(root, [corner], picture="a.jpg", imageHeight=WIDTH, imageWidth=HEIGHT)
    tiny_source.write_project(project, root, {"source": "labelme", "unannotated": "background"})
    assert tiny_source.run(project, upto="ingest") == 0
    with chdir(project):
        (row,) = manifest.read(paths.INGESTED / "base/rows.parquet")
        image_HWC, label_HW = manifest.open_image(row, 1 << 20), manifest.open_mask(row, 1 << 20)
    np.testing.assert_array_equal(image_HWC[:, :, 0] > 125, label_HW == 1)


def test_no_labelme_file(tmp_path: Path) -> None:
    tiny_source.put(tmp_path, "a.json", b"{}")
    with pytest.raises(SourceError, match="no labelme file"):
        read(tmp_path)


def test_lines_and_points_are_counted_and_refuse_the_mask_only_where_they_would_become_background(
    tmp_path: Path,
) -> None:
    put(tmp_path, [shape(), shape(kind="line", points=[[0, 0], [5, 5]]), shape("dog", "point", [[0, 0]])])
    source = read(tmp_path)
    assert list(tiny_labels.labels(source)) == ["a"]
    assert [c["name"] for c in source.classes] == ["cat"]
    assert source.skipped == [("shape-without-area", "a line of a"), ("shape-without-area", "a point of a")]
    source = read(tmp_path, unannotated="background")
    assert tiny_labels.refusals(source) == {"masks/a.png": "shape-without-area"}


def test_a_rectangle_of_four_corners_is_drawn(tmp_path: Path) -> None:
    put(tmp_path, [shape(kind="rectangle", points=[[2, 1], [6, 1], [6, 4], [2, 4]])])
    assert (tiny_labels.labels(read(tmp_path))["a"] == 0).sum() == 12


def test_a_file_without_shapes_is_background_where_the_settings_say_so(tmp_path: Path) -> None:
    put(tmp_path, [shape()], "a")
    put(tmp_path, [], "b")
    assert list(tiny_labels.labels(read(tmp_path, unannotated="background"))) == ["a"]
    found = tiny_labels.labels(read(tmp_path, unannotated="background", no_shapes="background"))
    assert not found["b"].any()


def test_labels_and_images_in_parallel_folders_meet_by_name(tmp_path: Path) -> None:
    for name in ("x", "y"):
        tiny_source.put(tmp_path, f"images/{name}.png", tiny_source.encode(tiny_source.picture(1, HEIGHT, WIDTH)))
        put(tmp_path, [shape()], f"labels/{name}", picture=f"{name}.png")
    tiny_source.put(tmp_path, "labels/._x.json", b"mac")
    tiny_source.put(tmp_path, "labels/package.json", b"{}")
    source = read(tmp_path)
    assert sorted(tiny_labels.labels(source)) == ["x", "y"]
    assert source.refused == []
    assert len(source.skipped) == 2
