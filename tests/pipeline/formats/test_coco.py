"""COCO: Datumaro's and pycocotools' files, the painting order, what is background, and records that cannot be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.formats import coco
from pipeline.formats.common.source import Source, SourceError
from pipeline.imaging import label_maps
from tests.support import tiny_labels, tiny_source
from tests.support.tiny_labels import GOLDEN, png

HOME = GOLDEN / "coco"


def read(root: Path, **data: Any) -> Source:
    return tiny_labels.read(coco.read, root, "coco", **data)


def tree(root: Path, annotations: list[dict[str, Any]], **changes: Any) -> Path:
    """One 6 x 4 image (width x height) with the categories 3 `mat`, 7 `cup`, and a second image that has no labels."""
    for name in ("a.png", "b.png"):
        tiny_source.put(root, f"images/{name}", b"x")
    document = {
        "images": [{"id": 5, "file_name": "a.png", "width": 6, "height": 4}, {"id": 6, "file_name": "b.png"}],
        "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "mat"}],
        "annotations": [{"id": n, "image_id": 5} | item for n, item in enumerate(annotations)],
    } | changes
    tiny_source.put(root, "annotations/labels.json", json.dumps(document).encode())
    return root


def box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


MAT, CUP = {"category_id": 3}, {"category_id": 7}


@pytest.mark.parametrize(
    "file", ["annotations/instances_val.json", "compressed_val.json", "panoptic/panoptic_val.json"]
)
def test_run_lengths_and_panoptic_pngs_of_datumaro_give_what_was_drawn(file: str) -> None:
    source = read(HOME, annotations=file)
    assert [c["name"] for c in source.classes] == ["background", "cat", "dog"]
    found = tiny_labels.labels(source)
    assert sorted(found) == ["val/deep/two", "val/one"]
    for name, label_HW in found.items():
        truth = f"coco/truth/{name.removeprefix('val/').replace('/', '_')}.png"
        np.testing.assert_array_equal(label_HW, tiny_labels.golden(truth))
    assert source.lists["test"] == ["val/deep/two", "val/one"]
    assert source.groups == {"val/deep/two": "deep", "val/one": "val/one"}


def test_polygons_differ_from_pycocotools_on_the_outline_only() -> None:
    """pycocotools moves the outline by up to half a pixel; two polygons of one annotation are a union, not even-odd."""
    ours_HW = tiny_labels.labels(read(HOME, annotations="polygons_val.json"))["val/one"] != 255
    theirs_HW = tiny_labels.golden("coco/truth/polygons.png") == 1
    rings = json.loads((HOME / "polygons_val.json").read_text())["annotations"][0]["segmentation"]
    differing = np.argwhere(ours_HW != theirs_HW) + 0.5
    assert theirs_HW.sum() - len(differing) > 0
    for row, column in differing:
        assert min(far(np.array([column, row]), np.reshape(ring, (-1, 2))) for ring in rings) < 0.75
    assert len(differing) < 0.15 * theirs_HW.sum()


def far(point: np.ndarray, ring: np.ndarray) -> float:
    a, b = ring, np.roll(ring, -1, axis=0)
    along = np.clip(((point - a) * (b - a)).sum(axis=1) / ((b - a) ** 2).sum(axis=1), 0, 1)
    return float(np.hypot(*(a + along[:, None] * (b - a) - point).T).min())


def test_run_lengths_go_down_the_columns(tmp_path: Path) -> None:
    """Row by row, these 4 pixels would be the first of the upper row."""
    source = read(tree(tmp_path, [MAT | {"segmentation": {"size": [4, 6], "counts": [0, 4, 20]}}]))
    expected_HW = np.full((4, 6), 255)
    expected_HW[:, 0] = 0
    np.testing.assert_array_equal(tiny_labels.labels(source)["a"], expected_HW)


@pytest.mark.parametrize("turn", [1, -1])
def test_the_smaller_annotation_lies_on_top_whatever_the_order(tmp_path: Path, turn: int) -> None:
    drawn = [MAT | {"segmentation": [box(0, 0, 6, 3)]}, CUP | {"segmentation": [box(2, 1, 4, 4)], "iscrowd": 1}]
    label_HW = tiny_labels.labels(read(tree(tmp_path, drawn[::turn])))["a"]
    expected_HW = np.full((4, 6), 255)
    expected_HW[:3], expected_HW[1:4, 2:4] = 0, 1
    np.testing.assert_array_equal(label_HW, expected_HW)


def test_several_polygons_are_a_union(tmp_path: Path) -> None:
    source = read(tree(tmp_path, [MAT | {"segmentation": [box(0, 0, 4, 4), box(2, 0, 6, 4)]}]))
    assert (tiny_labels.labels(source)["a"] == 0).all()


def test_classes_are_in_the_categories_order_and_the_rest_is_as_told(tmp_path: Path) -> None:
    root = tree(tmp_path, [CUP | {"segmentation": [box(0, 0, 6, 1)]}])
    source = read(root)
    assert [(c["id"], c["name"]) for c in source.classes] == [(0, "mat"), (1, "cup")]
    assert np.unique(tiny_labels.labels(source)["a"]).tolist() == [1, 255]
    source = read(root, unannotated="background")
    assert [c["name"] for c in source.classes] == ["background", "mat", "cup"]
    assert np.unique(tiny_labels.labels(source)["a"]).tolist() == [0, 2]
    assert "masks/b.png" not in dict(source.files)  # nobody drew there: not labelled, rather than all background
    assert "images/b.png" in dict(source.files)


def test_a_class_file_gives_the_order_and_leaves_classes_out(tmp_path: Path) -> None:
    drawn = [CUP | {"segmentation": [box(0, 0, 6, 1)]}, MAT | {"segmentation": [box(0, 1, 6, 2)]}]
    root = tree(tmp_path, drawn)
    (root / "classes.txt").write_text("plate\ncup\n")
    source = read(root)
    assert [c["name"] for c in source.classes] == ["plate", "cup"]
    assert tiny_labels.labels(source)["a"][:, 0].tolist() == [1, 255, 255, 255]
    assert "not in classes.txt, so ignored: mat" in source.notes


def test_things_and_stuff_of_two_files_meet_on_one_image(tmp_path: Path) -> None:
    root = tree(tmp_path, [CUP | {"segmentation": [box(0, 0, 6, 1)]}])
    stuff = json.loads((root / "annotations/labels.json").read_text())
    stuff["categories"] = [{"id": 100, "name": "grass"}]
    stuff["annotations"] = [{"id": 1, "image_id": 5, "category_id": 100, "segmentation": [box(0, 0, 6, 4)]}]
    (root / "annotations/stuff.json").write_text(json.dumps(stuff))
    for name in ("captions_x.json", "person_keypoints_x.json", "image_info_x.json", "._labels.json", "foreign.json"):
        (root / "annotations" / name).write_text("{}")
    source = read(root)
    assert [name for _, name in source.skipped] == ["._labels.json", "foreign.json"]
    assert [c["name"] for c in source.classes] == ["mat", "cup", "grass"]
    assert tiny_labels.labels(source)["a"][:, 0].tolist() == [1, 2, 2, 2]


def panoptic(root: Path, colours: list[tuple[int, int, int]], segments: list[dict[str, int]]) -> Path:
    pixels = np.array(colours, np.uint8).reshape(1, -1, 3)
    tree(root, [{"file_name": "a.png", "segments_info": segments}])
    tiny_source.put(root, "annotations/labels/a.png", png(pixels))
    return root


def test_a_panoptic_id_is_red_plus_256_green_plus_65536_blue(tmp_path: Path) -> None:
    root = panoptic(
        tmp_path,
        [(1, 2, 3), (3, 2, 1), (0, 0, 0)],
        [{"id": 1 + 2 * 256 + 3 * 65536, "category_id": 3}, {"id": 3 + 2 * 256 + 65536, "category_id": 7}],
    )
    assert tiny_labels.labels(read(root))["a"].tolist() == [[0, 1, 255]]
    assert tiny_labels.labels(read(root, unannotated="background"))["a"].tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("segments", [[], [{"id": 5, "category_id": 3}], [{"id": 9, "category_id": 4}], [{"id": 9}]])
def test_a_segment_that_nobody_describes_refuses_the_mask(tmp_path: Path, segments: list[dict[str, int]]) -> None:
    root = panoptic(tmp_path, [(9, 0, 0)], segments)
    assert tiny_labels.refusals(read(root)) == {"masks/a.png": "label-file"}


def test_a_panoptic_png_with_a_palette_is_refused(tmp_path: Path) -> None:
    root = panoptic(tmp_path, [(9, 0, 0)], [{"id": 9, "category_id": 3}])
    tiny_source.put(root, "annotations/labels/a.png", tiny_labels.palette_png(np.array([[9]]), [(0, 0, 0)] * 10))
    assert tiny_labels.refusals(read(root)) == {"masks/a.png": "panoptic-png"}


def test_images_that_are_not_there_or_lie_outside_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (tmp_path / "secret.png").write_bytes(b"x")
    names = ["a.png", "gone.png", "../secret.png", "/etc/hostname", "link.png", "a.png"]
    images = [{"id": n, "file_name": name, "width": 6, "height": 4} for n, name in enumerate(names)]
    tree(root, [], images=[*images, {"id": 0, "file_name": "b.png"}, {"file_name": "b.png"}, 7])
    (root / "images/link.png").symlink_to(tmp_path / "secret.png")
    source = read(root, classes=None)
    assert [name for name, _ in source.files] == ["images/a.png"]
    codes = sorted(code for _, code, _ in source.refused)
    assert codes == ["duplicate-name"] + ["image-missing"] * 4 + ["label-file"] * 3


def test_the_published_lists_for_coco(tmp_path: Path) -> None:
    root = tree(tmp_path, [], images=[{"id": 1, "file_name": "000000000009.jpg", "width": 1, "height": 1}])
    tiny_source.put(root, "train2017/000000000009.jpg", b"x")
    (root / "annotations/labels.json").rename(root / "annotations/instances_train2017.json")
    (root / "labeled.txt").write_text("train2017/000000000009.jpg masks/000000000009.png\n")
    source = read(root, lists={"labelled": "labeled.txt"})
    assert source.lists["labelled"] == ["train2017/000000000009"]
    (root / "labeled.txt").write_text("000000000009\n")
    assert read(root, lists={"labelled": "labeled.txt"}).lists["labelled"] == ["train2017/000000000009"]


def test_what_is_no_coco_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no JSON label file"):
        read(tmp_path)
    tiny_source.put(tmp_path, "annotations/x.json", b"[1]")
    with pytest.raises(SourceError, match=r"no COCO label file \(x\.json: no COCO file \('images'"):
        read(tmp_path)
    with pytest.raises(SourceError, match=r"x\.json: not a COCO file: 'images'"):
        read(tmp_path, annotations="annotations/x.json")
    with pytest.raises(SourceError, match=r"no file other\.json"):
        read(tmp_path, annotations="other.json")
    with pytest.raises(SourceError, match=r"data\.annotations: '/.*relative to data\.path"):
        read(tmp_path, annotations=str(tmp_path / "annotations/x.json"))


def test_random_masks_come_back_through_both_forms_of_run_lengths(tmp_path: Path) -> None:
    mask_HW = np.random.default_rng(1).random((4, 6)) < 0.5
    for compressed in (False, True):
        root = tree(tmp_path, [MAT | {"segmentation": label_maps.to_rle(mask_HW, compressed=compressed)}])
        np.testing.assert_array_equal(tiny_labels.labels(read(root))["a"] == 0, mask_HW)


def test_two_versions_of_the_labels_are_refused_and_named(tmp_path: Path) -> None:
    root = tree(tmp_path, [CUP | {"segmentation": [box(0, 0, 6, 1)]}])
    old = (root / "annotations/labels.json").read_text()
    (root / "annotations/old.json").write_text(old)
    with pytest.raises(SourceError, match=r"labels a as 'cup', as labels\.json does: two versions.*data\.annotations"):
        read(root)
    assert sorted(tiny_labels.labels(read(root, annotations="annotations/old.json"))) == ["a"]


@pytest.mark.parametrize("segmentation", [[], [[0, 0, 3, 3]], [[[0, 0], [3, 3]]], None])
def test_what_covers_no_pixel_is_counted_and_refused_only_where_it_would_become_background(
    tmp_path: Path, segmentation: Any
) -> None:
    root = tree(tmp_path, [MAT | {"segmentation": [box(0, 0, 6, 1)]}, CUP | {"segmentation": segmentation}])
    source = read(root)
    assert tiny_labels.labels(source)["a"][:, 0].tolist() == [0, 255, 255, 255]
    assert source.skipped == [("shape without area", "annotation 1 (labels/labels.json:annotations[1]) of a")]

    source = read(root, unannotated="background")
    assert tiny_labels.refusals(source) == {"masks/a.png": "shape-without-area"}


def test_a_short_ring_beside_a_long_one_is_left_out(tmp_path: Path) -> None:
    source = read(tree(tmp_path, [MAT | {"segmentation": [box(0, 0, 6, 1), [0, 0, 3, 3]]}]), unannotated="background")
    assert tiny_labels.labels(source)["a"][:, 0].tolist() == [1, 0, 0, 0]


def test_an_image_without_shapes_is_background_where_the_settings_say_so(tmp_path: Path) -> None:
    root = tree(tmp_path, [CUP | {"segmentation": [box(0, 0, 6, 1)]}])
    tiny_source.put(root, "images/b.png", png(np.zeros((1, 2), np.uint8)))
    source = read(root, unannotated="background")
    assert "b" not in tiny_labels.labels(source)
    assert any("1 images without a shape are unlabelled" in note for note in source.notes)
    assert not any("without a shape" in note for note in read(root).notes)
    found = tiny_labels.labels(read(root, unannotated="background", no_shapes="background"))
    assert found["b"].tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="set unannotated: background too"):
        read(root, no_shapes="background")


def test_whole_ids_written_with_a_point_are_read(tmp_path: Path) -> None:
    source = read(tree(tmp_path, [CUP | {"image_id": 5.0, "category_id": 7.0, "segmentation": [box(0, 0, 6, 1)]}]))
    assert tiny_labels.labels(source)["a"][0, 0] == 1


@pytest.mark.parametrize(
    ("name", "lies"),
    [
        ("..\\..\\media\\upload\\4\\0a1b2c3d-x.png", "images/0a1b2c3d-x.png"),
        ("x.png", "data/x.png"),
        ("X.PNG", "images/x.png"),
        ("/home/me/x.png", "images/x.png"),
    ],
)
def test_a_file_name_means_the_one_image_that_answers(tmp_path: Path, name: str, lies: str) -> None:
    images = [{"id": 5, "file_name": name, "width": 6, "height": 4}]
    root = tree(tmp_path, [CUP | {"segmentation": [box(0, 0, 6, 1)]}], images=images)
    tiny_source.put(root, lies, b"x")
    source = read(root)
    assert source.refused == []
    assert root / lies in dict(source.files).values()


@pytest.mark.parametrize(
    ("file", "part"),
    [("instances_Test.json", "test"), ("VALID.json", "val"), ("test-labels.json", "test"), ("labels.json", None)],
)
def test_a_label_files_name_states_the_split_in_any_case(tmp_path: Path, file: str, part: str | None) -> None:
    root = tree(tmp_path, [CUP | {"segmentation": [box(0, 0, 6, 1)]}])
    (root / "annotations/labels.json").rename(root / "annotations" / file)
    lists = read(root).lists
    assert lists["test"] == (["a"] if part else None)  # val alone is the test set, as in papers


def test_a_layout_folder_in_file_names_is_no_group(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"JPEGImages/{n}.png", "width": 6, "height": 4} for n in range(2)]
    root = tree(tmp_path, [], images=images)
    for n in range(2):
        tiny_source.put(root, f"JPEGImages/{n}.png", b"x")
    assert read(root, classes=None).groups == {"JPEGImages/0": "JPEGImages/0", "JPEGImages/1": "JPEGImages/1"}


def test_images_of_one_name_are_told_apart_by_the_split_that_the_label_file_states(tmp_path: Path) -> None:
    for folder, file in (("train", "Training_coco"), ("Val", "coco-valid")):
        tiny_source.put(tmp_path, f"images/{folder}/a.png", b"x")
        document = {
            "images": [{"id": 1, "file_name": "a.png", "width": 6, "height": 4}],
            "categories": [{"id": 3, "name": "mat"}],
            "annotations": [{"id": 1, "image_id": 1, "segmentation": [box(0, 0, 3, 3)]} | MAT],
        }
        tiny_source.put(tmp_path, f"annotations/{file}.json", json.dumps(document).encode())
    source = read(tmp_path)
    assert {name for name, _ in source.files if name.startswith("masks/")} == {"masks/train/a.png", "masks/Val/a.png"}
    assert source.lists["test"] == ["Val/a"]


def split_files(root: Path, annotated: dict[str, list[int]], images: int = 4) -> Source:
    """Label files by name that all list the images 0.png, 1.png...; each annotates those of its numbers."""
    for number in range(images):
        tiny_source.put(root, f"images/{number}.png", b"x")
    listed = [{"id": n, "file_name": f"{n}.png", "width": 6, "height": 4} for n in range(images)]
    for number, (file, numbers) in enumerate(annotated.items()):
        drawn = [{"id": n, "image_id": n, "category_id": number, "segmentation": [box(0, 0, 3, 4)]} for n in numbers]
        categories = [{"id": n, "name": f"class {n}"} for n in range(len(annotated))]
        document = {"images": listed, "annotations": drawn, "categories": categories}
        tiny_source.put(root, f"annotations/{file}.json", json.dumps(document).encode())
    return read(root)


def test_images_that_train_and_val_files_both_list_are_of_the_one_that_annotates_them(tmp_path: Path) -> None:
    source = split_files(tmp_path, {"instances_train": [0, 1], "instances_val": [2, 3]})

    assert source.lists["test"] == ["2", "3"]
    line = "4, the first: 0 is train"
    assert f"images listed by several splits, of the one that annotates them: {line}" in source.notes


def test_an_image_that_train_and_val_annotate_is_evaluated_on_and_it_is_said(tmp_path: Path) -> None:
    source = split_files(tmp_path, {"instances_train": [0, 1, 2], "stuff_val": [2, 3]})

    assert source.lists["test"] == ["2", "3"]
    files = "instances_train.json and stuff_val.json"
    assert (
        f"images annotated for several splits, taken for evaluation: 1, the first: 2 is val ({files})" in source.notes
    )


def test_an_image_that_val_lists_and_nobody_annotates_is_not_trained_on(tmp_path: Path) -> None:
    source = split_files(tmp_path, {"instances_train": [0, 1], "instances_val": [2]})

    assert [name for name, _ in source.files if name.startswith("images/")] == [f"images/{n}.png" for n in range(3)]
    assert "left out: 1 val images without labels" in source.notes


def test_ids_may_be_text_and_a_number_in_quotes_is_that_number(tmp_path: Path) -> None:
    """Of images, categories and annotations; Roboflow and home-made exports write "7", "img_001" or "cat"."""
    drawn = [
        {"image_id": "photo a", "category_id": "mat", "segmentation": [box(0, 0, 3, 4)]},
        {"image_id": "6", "category_id": 7.0, "segmentation": [box(3, 0, 6, 4)]},
    ]
    size = {"width": 6, "height": 4}
    images = [{"id": "photo a", "file_name": "a.png"} | size, {"id": 6, "file_name": "b.png"} | size]
    categories = [{"id": "mat", "name": "mat"}, {"id": "7", "name": "cup"}]
    source = read(tree(tmp_path, drawn, images=images, categories=categories))

    assert [c["name"] for c in source.classes] == ["cup", "mat"]
    found = tiny_labels.labels(source)
    np.testing.assert_array_equal(found["a"], [[1] * 3 + [255] * 3] * 4)
    np.testing.assert_array_equal(found["b"], [[255] * 3 + [0] * 3] * 4)
