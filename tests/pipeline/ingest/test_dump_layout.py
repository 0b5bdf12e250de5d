"""How deliveries lie: wrapping folders, masks among images, groups; and that no door lets a held-out place into training."""

import unicodedata
import zipfile
from contextlib import chdir
from pathlib import Path

import pytest

from pipeline.ingest import dump_layout
from tests.support import tiny_source
from tests.support.command_line import marginalia


@pytest.mark.parametrize(
    ("names", "masks"),
    [
        (["images/a.png", "masks/a.png"], ["masks/a.png"]),
        (["may/images/a.png", "may/SegmentationClass/a.png"], ["may/SegmentationClass/a.png"]),
        (["a.jpg", "a_mask.png", "a.target.png", "b_mask.png"], ["a_mask.png", "a.target.png"]),
        (["labels/a.png", "labels/b.png"], []),  # everything lies there: that is its folder's name
        (["cam_l.png", "cam_r.png"], []),
        (["x/A.jpg", "x/a_MASK.png"], ["x/a_MASK.png"]),
        (["a.jpg", "a_mask.jpg", "a_label.jpg", "a_l.jpg", "a_label.png"], ["a_mask.jpg", "a_label.png"]),
    ],
)
def test_masks_are_told_from_images(names: list[str], masks: list[str]) -> None:
    assert list(dump_layout.masks_among(names)) == masks


@pytest.mark.parametrize(
    ("names", "inside"),
    [
        (["images/cam0/1.png", "images/2.png"], ["cam0/1.png", "2.png"]),
        (["may/images/cam0/1.png", "may/images/cam1/2.png"], ["cam0/1.png", "cam1/2.png"]),
        (["a/b/images/1.png"], ["1.png"]),
        (["may/cam0/1.png", "may/cam1/2.png"], ["may/cam0/1.png", "may/cam1/2.png"]),  # may could be a place
        (["a/images/1.png", "b/images/1.png"], ["a/images/1.png", "b/images/1.png"]),
        (["1.png"], ["1.png"]),
        ([], []),
    ],
)
def test_folders_around_images_are_wrapping(names: list[str], inside: list[str]) -> None:
    assert list(dump_layout.without_wrapping(names).values()) == inside


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("may/cam0/1.png", "cam0"),
        ("cam0/2024/1.png", "cam0"),
        ("x/site/cam1/1.png", "site/cam1"),
        ("may/CAM0/1.png", "cam0"),
        ("may/cam9/1.png", ""),
        ("images/default/1.png", ""),
        (unicodedata.normalize("NFD", "may/g\u00e4rten/1.png"), "g\u00e4rten"),  # as macOS packs it
    ],
)
def test_a_folder_that_is_a_group_of_the_source_is_that_group(name: str, group: str) -> None:
    known = dump_layout.known_groups(["cam0", "site/cam1", "g\u00e4rten"])
    assert dump_layout.group(name, known) == group


# How one delivery of the same four cameras may come: member name of camera k's image.
DOORS = {
    "as the source": "images/cam{}/9.png",
    "flat folders": "cam{}/9.png",
    "zipped with its folder": "may/images/cam{}/9.png",
    "in folders of its own": "may/2026/cam{}/9.png",
    "with a folder for the night": "cam{}/night/9.png",
    "with a split": "may/train/images/cam{}/9.png",
    "in capitals": "may/CAM{}/9.png",
}


@pytest.mark.parametrize("door", DOORS)
def test_no_held_out_place_comes_into_training_through_any_door(tmp_path: Path, door: str) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, dict.fromkeys(("cam0", "cam1", "cam2", "cam3"), 3))
    tiny_source.write_project(root, source)
    assert tiny_source.run(root) == 0
    held = {row.group for row in tiny_source.rows(root).values() if row.split in ("val", "test")}
    assert held

    with zipfile.ZipFile(tmp_path / "may.zip", "w") as archive:
        for k in range(4):
            name = DOORS[door].format(k)
            archive.writestr(name, tiny_source.encode(tiny_source.picture(100 + k)))
            mask = name.replace("images/", "masks/") if "images/" in name else name.replace(".png", "_mask.png")
            archive.writestr(mask, tiny_source.encode(tiny_source.mask(100 + k)))
        archive.writestr("__MACOSX/._9.png", b"mac")
    with chdir(root):
        assert marginalia("add-dump", tmp_path / "may.zip") == 0
    assert tiny_source.run(root, dumps=("base", "may")) == 0

    rows = [row for row in tiny_source.rows(root).values() if row.dump == "may"]
    assert len(rows) == 4, "the masks are no images"
    assert {row.split for row in rows if row.group in held} == {"unused"}
    assert {row.group for row in rows} == {f"cam{k}" for k in range(4)}


def test_a_delivery_of_one_held_out_place_keeps_its_folder(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, dict.fromkeys(("cam0", "cam1", "cam2", "cam3"), 3))
    tiny_source.write_project(root, source)
    assert tiny_source.run(root) == 0
    held = next(row.group for row in tiny_source.rows(root).values() if row.split == "test")

    with zipfile.ZipFile(tmp_path / "may.zip", "w") as archive:
        archive.writestr(f"{held}/images/night/9.png", tiny_source.encode(tiny_source.picture(100)))
    with chdir(root):
        assert marginalia("add-dump", tmp_path / "may.zip") == 0
    assert tiny_source.run(root, dumps=("base", "may")) == 0

    assert [(row.group, row.split) for row in tiny_source.rows(root).values() if row.dump == "may"] == [
        (held, "unused")
    ]
