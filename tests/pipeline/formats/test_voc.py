"""VOC trees: Datumaro's export, the official palette and border, lists."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.formats import voc
from pipeline.formats.common.source import Source, SourceError
from tests.support import tiny_labels, tiny_source
from tests.support.tiny_labels import GOLDEN, palette_png, png

IDS_HW = np.array([[0, 15, 20, 255], [0, 1, 255, 255]], np.uint8)


def read(root: Path, **data: Any) -> Source:
    return tiny_labels.read(voc.read, root, "voc", **data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VOCdevkit/VOC2012 with four images, of which two have masks; one is listed for val, one for test."""
    home = tmp_path / "VOC2012"
    palette = [tuple(voc.colour(k)) for k in range(255)] + [(224, 224, 192)]
    for name in ("2007_01", "2007_02", "2007_03", "2007_04"):
        tiny_source.put(home, f"JPEGImages/{name}.jpg", b"x")
    for name in ("2007_01", "2007_02"):
        tiny_source.put(home, f"SegmentationClass/{name}.png", palette_png(IDS_HW, palette))
    for part, names in {
        "train": "2007_01",
        "val": "2007_02",
        "test": "2007_04",
        "trainval": "2007_01\n2007_02",
    }.items():
        tiny_source.put(home, f"ImageSets/Segmentation/{part}.txt", f"{names}\n".encode())
    return tmp_path


def test_datumaro_s_export_has_the_labels_that_were_drawn() -> None:
    source = read(GOLDEN / "voc")
    assert [(c["name"], c["color"]) for c in source.classes] == [
        ("background", [0, 0, 0]), ("cat", [250, 10, 60]), ("dog", [10, 60, 250]),
    ]  # fmt: skip
    found = tiny_labels.labels(source)
    assert sorted(found) == ["deep/two", "one"]
    for name, label_HW in found.items():
        np.testing.assert_array_equal(label_HW, tiny_labels.golden(f"voc/truth/{name.replace('/', '_')}.png"))
    assert source.lists["test"] == ["one", "deep/two"]  # in the order of its list


def test_the_official_palette_is_the_published_one() -> None:
    assert [voc.colour(k) for k in (0, 1, 2, 8, 15, 20, 255)] == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [64, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip


def test_official_masks_are_packed_as_they_are_with_the_border_as_ignore(root: Path) -> None:
    source = read(root)
    path = root / "VOC2012/SegmentationClass/2007_01.png"
    assert ("masks/2007_01.png", path) in source.files
    np.testing.assert_array_equal(tiny_labels.labels(source)["2007_01"], IDS_HW)
    assert [c["name"] for c in source.classes][15] == "person"
    assert len(source.classes) == 21


def test_without_test_labels_val_is_tested_and_the_test_images_are_left_out(root: Path) -> None:
    source = read(root)
    assert source.lists == {"labelled": None, "unlabelled": None, "val": None, "test": ["2007_02"]}
    names = [name for name, _ in source.files if name.startswith("images/")]
    assert names == ["images/2007_01.jpg", "images/2007_02.jpg", "images/2007_03.jpg"]


def test_lists_of_the_user_win(root: Path) -> None:
    (root / "VOC2012/labelled.txt").write_text("JPEGImages/2007_02.jpg SegmentationClass/2007_02.png\n")
    source = read(root, lists={"labelled": "labelled.txt"})
    assert source.lists == {"labelled": ["2007_02"], "unlabelled": None, "val": None, "test": None}
    assert "images/2007_04.jpg" in dict(source.files)


def test_the_same_masks_as_rgb_give_the_same_ids(root: Path) -> None:
    """A palette that was lost on the way: colours of VOC's own table count."""
    table = np.array([voc.colour(k) for k in range(256)], np.uint8)
    tiny_source.put(root, "VOC2012/SegmentationClass/2007_01.png", png(table[IDS_HW]))
    tiny_source.put(root, "VOC2012/SegmentationClass/2007_02.png", png(table[IDS_HW]))
    np.testing.assert_array_equal(tiny_labels.labels(read(root))["2007_01"], IDS_HW)


def test_another_mask_folder_can_be_named(root: Path) -> None:
    tiny_source.put(root, "VOC2012/SegmentationClassAug/2007_03.png", png(IDS_HW))
    assert sorted(tiny_labels.labels(read(root, annotations="SegmentationClassAug"))) == ["2007_03"]
    with pytest.raises(SourceError, match="SegmentationClasAug"):
        read(root, annotations="SegmentationClasAug")


@pytest.mark.parametrize("line", ["cat", "cat:1,2", "cat:1,2,x::", ":1,2,3::", "cat:1,2,300::"])
def test_a_bad_labelmap_is_named_with_its_line(root: Path, line: str) -> None:
    (root / "VOC2012/labelmap.txt").write_text(f"# label:color_rgb:parts:actions\nbackground:0,0,0::\n{line}\n")
    if line == "cat":  # without colours Datumaro means VOC's palette
        assert read(root).classes[1]["color"] == [128, 0, 0]
        return
    with pytest.raises(SourceError, match=r"labelmap\.txt: line \d"):
        read(root)


def test_no_voc_tree(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no folder JPEGImages"):
        read(tmp_path)


def test_a_labelmap_s_colours_count_over_a_palette_in_another_order(tmp_path: Path) -> None:
    """labelmap.txt states the colours, and nothing states the indices."""
    tiny_source.put(tmp_path, "JPEGImages/a.jpg", b"x")
    tiny_source.put(tmp_path, "SegmentationClass/a.png", palette_png(np.array([[0, 1]]), [(9, 9, 9), (0, 0, 0)]))
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\ncat:9,9,9::\n")
    assert tiny_labels.labels(read(tmp_path))["a"].tolist() == [[1, 0]]


def test_a_class_name_may_hold_colons_and_commas(root: Path) -> None:
    lines = ["# label:color_rgb:parts:actions", "", "background:0,0,0::", "road:asphalt:1,2,3::", "car, parked:4,5,6::"]
    (root / "VOC2012/labelmap.txt").write_text("\n".join(lines))
    classes = read(root, missing_classes="allow").classes
    assert [(c["name"], c["color"]) for c in classes] == [
        ("background", [0, 0, 0]),
        ("road:asphalt", [1, 2, 3]),
        ("car, parked", [4, 5, 6]),
    ]


def test_labelme2vocs_pngs_lie_beside_its_arrays(root: Path) -> None:
    home = root / "VOC2012"
    (home / "SegmentationClass").rename(home / "SegmentationClassPNG")
    tiny_source.put(home, "SegmentationClass/2007_01.npy", b"array")
    source = read(root)
    assert {"masks/2007_01.png", "masks/2007_02.png"} <= dict(source.files).keys()
    assert ("no image (.npy)", "SegmentationClass/2007_01.npy") in source.skipped


def test_two_lists_of_one_split_are_both_used(root: Path) -> None:
    tiny_source.put(root, "VOC2012/ImageSets/Segmentation/valid.txt", b"2007_01\n2007_02\n")
    assert read(root, annotations="SegmentationClass").lists["test"] == ["2007_02", "2007_01"]


def test_a_photograph_named_like_a_mask_is_an_image_where_it_has_a_mask_itself(root: Path) -> None:
    home = root / "VOC2012"
    for name in ("2007_01_label", "2007_02_label"):
        tiny_source.put(home, f"JPEGImages/{name}.png", b"x")
    tiny_source.put(home, "SegmentationClass/2007_01_label.png", png(IDS_HW))
    names = dict(read(root).files).keys()
    assert "images/2007_01_label.png" in names
    assert "images/2007_02_label.png" not in names
