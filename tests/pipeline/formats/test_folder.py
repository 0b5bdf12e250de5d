"""The folder source: names, lists, groups and classes, and what is said when they do not fit."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.formats import folder as folders
from pipeline.formats.common.source import Source, SourceError, name_id
from pipeline.imaging import label_maps
from tests.support import tiny_settings, tiny_source


def read(folder: Path, **changes: object) -> Source:
    return folders.read(folder, tiny_settings.data(**{"source": "folder"} | changes), max_pixels=1 << 24)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_source.write_source(tmp_path, {"a": 2, "b": 1}, masked={"a"})
    return tmp_path


def test_name_id_drops_the_last_extension_only() -> None:
    assert name_id("a/b.c/d.tar.jpg") == "a/b.c/d.tar"
    assert name_id("plain") == "plain"
    assert name_id("a.b/plain") == "a.b/plain"


def test_members_are_sorted_whole_and_without_hidden_files(source: Path) -> None:
    tiny_source.put(source, "images/.DS_Store", b"x")
    tiny_source.put(source, "images/.cache/thumb.png", b"x")
    found = read(source)
    names = ["images/a/00.png", "images/a/01.png", "images/b/00.png", "masks/a/00.png", "masks/a/01.png"]
    assert found.files == [(name, source / name) for name in names]
    assert found.groups == {"a/00": "a", "a/01": "a", "b/00": "b"}
    assert [name for _, name in found.skipped] == ["images/.DS_Store", "images/.cache/thumb.png"]
    assert found.lists == dict.fromkeys(("labelled", "unlabelled", "val", "test"))


def test_classes_keep_their_order_and_given_colours(source: Path) -> None:
    (source / "classes.txt").write_text("# made by hand\nroad #102030\ncar\nsky blue #FFffFF\n\n")
    classes = read(source).classes
    assert [(c["id"], c["name"]) for c in classes] == [(0, "road"), (1, "car"), (2, "sky blue")]
    assert classes[0]["color"] == [16, 32, 48]
    assert classes[1]["color"] == list(label_maps.palette(3)[1])
    assert classes[2]["color"] == [255, 255, 255]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 classes"),
        ("a\nb\na\n", "line 3.*'a'"),
        ("\n".join(map(str, range(256))), "256"),
        ("a\n\nb\n", "line 2 is empty"),
    ],
)
def test_unusable_class_files_are_named(source: Path, text: str, message: str) -> None:
    (source / "classes.txt").write_text(text)
    with pytest.raises(SourceError, match=rf"classes\.txt.*{message}"):
        read(source)


def test_colours_are_read_as_hex_or_as_three_numbers(source: Path) -> None:
    (source / "classes.txt").write_text("road 16 32 48\nlane 2\nsky blue  0\t255 7\nzone 1 2\n")
    classes = read(source).classes
    assert [c["name"] for c in classes] == ["road", "lane 2", "sky blue", "zone 1 2"]
    assert [classes[k]["color"] for k in (0, 2)] == [[16, 32, 48], [0, 255, 7]]
    (source / "classes.txt").write_text("road\nwall 0 256 0\n")
    with pytest.raises(SourceError, match=r"classes\.txt: line 2.*0 to 255"):
        read(source)


def test_a_class_file_that_is_named_but_missing_is_an_error(source: Path) -> None:
    (source / "classes.txt").rename(source / "Classes.txt")
    with pytest.raises(SourceError, match=r"classes\.txt: not found \(there is Classes.txt\).*classes: null"):
        read(source)
    with pytest.raises(SourceError, match=r"other\.csv: not found, though"):
        read(source, classes="other.csv")


def test_without_a_class_file_the_masks_say_how_many(source: Path) -> None:
    tiny_source.put(source, "masks/b/00.png", b"broken")
    assert [c["name"] for c in read(source, classes=None).classes] == ["class_0", "class_1", "class_2"]
    for path in (source / "masks/a").iterdir():
        path.write_bytes(tiny_source.encode(np.full((4, 4), 255, np.uint8)))
    with pytest.raises(SourceError, match="no class file"):
        read(source, classes=None)


def test_lists_name_ids_with_or_without_extension(source: Path) -> None:
    (source / "val.txt").write_text("\ufeffa/01.png\n\n b/00 \n", encoding="utf-8")
    assert read(source, lists=tiny_settings.lists(val="val.txt")).lists["val"] == ["a/01", "b/00"]


@pytest.mark.parametrize(
    ("text", "message"), [("a/00\nc/07\nc/08\n", "2 ids.*'c/07'"), ("a/00\na/00\n", "'a/00' is listed twice")]
)
def test_wrong_lists_are_refused_by_name(source: Path, text: str, message: str) -> None:
    (source / "val.txt").write_text(text)
    with pytest.raises(SourceError, match=rf"val\.txt.*{message}"):
        read(source, lists=tiny_settings.lists(val="val.txt"))
    with pytest.raises(SourceError, match=r"gone\.txt.*not found"):
        read(source, lists=tiny_settings.lists(test="gone.txt"))


def test_groups_by_pattern(source: Path) -> None:
    assert read(source, group="/([0-9])").groups == {"a/00": "0", "a/01": "0", "b/00": "0"}
    with pytest.raises(SourceError, match="no group in the image id 'b/00'"):
        read(source, group="(a)")
    with pytest.raises(SourceError, match=r"exactly one"):
        read(source, group="a")
    with pytest.raises(SourceError, match="not a regular expression"):
        read(source, group="(")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no files under images/"):
        read(tmp_path)


def test_real_photographs(shared_data: Path) -> None:
    base = "splits/seed0/1_8"
    lists = tiny_settings.lists(
        labelled=f"{base}/labeled.txt", unlabelled=f"{base}/unlabeled.txt", val="val.txt", test="test.txt"
    )
    source = read(shared_data / "camvid", lists=lists, group="^([^_]+)_")
    assert {part: len(ids or ()) for part, ids in source.lists.items()} == {
        "labelled": 46, "unlabelled": 321, "val": 101, "test": 233,
    }  # fmt: skip
    assert [c["name"] for c in source.classes][:3] == ["sky", "building", "pole"]
    assert len(source.files) == 1402
    assert set((source.groups or {}).values()) == {"0001TP", "0006R0", "0016E5", "Seq05VD"}


def test_a_csv_with_a_header_and_labelmes_ignore_name_the_classes(source: Path) -> None:
    (source / "classes.txt").unlink()
    (source / "class_dict.csv").write_text("name,r,g,b\nroad,16,32,48\nsky blue, 0, 255, 7\nwall,1,2,3\n")
    classes = read(source).classes
    assert [(c["name"], c["color"]) for c in classes] == [
        ("road", [16, 32, 48]),
        ("sky blue", [0, 255, 7]),
        ("wall", [1, 2, 3]),
    ]

    (source / "class_names.txt").write_text("__ignore__\n_background_\ncar\n")
    with pytest.raises(SourceError, match=r"there are class_names\.txt, class_dict\.csv; name the one that counts"):
        read(source)
    assert [c["name"] for c in read(source, classes="class_names.txt").classes] == ["_background_", "car"]


def test_companions_of_images_are_passed_over_and_counted(source: Path) -> None:
    before = read(source).files
    for name in ("images/a/00.json", "images/a/00.pgw", "images/Thumbs.db", "masks/a/._00.png", "images/a/00.CR2"):
        tiny_source.put(source, name, b"II*\x00 of a camera" if name.endswith("CR2") else b"no image")
    found = read(source, group="^([ab])/")
    assert found.files == before
    assert len(found.skipped) == 5


def test_folders_named_as_splits_are_the_splits(tmp_path: Path) -> None:
    tiny_source.write_source(tmp_path, {"Train/cam0": 2, "Train/cam1": 1, "valid/cam2": 1, "TESTING/cam3": 1})
    found = read(tmp_path)
    assert found.lists == {"labelled": None, "unlabelled": None, "val": ["valid/cam2/00"], "test": ["TESTING/cam3/00"]}
    assert found.groups is not None
    assert found.groups["Train/cam0/00"] == "cam0"
    assert "splits by their folders: 1 test, 3 train, 1 val" in found.notes


def test_splits_around_images_and_masks_are_read_too(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        tiny_source.write_source(tmp_path / part, {"": 2})
    (tmp_path / "train/classes.txt").rename(tmp_path / "classes.txt")
    found = read(tmp_path)
    assert found.lists["test"] == ["test/00", "test/01"]
    assert ("masks/val/00.png", tmp_path / "val/masks/00.png") in found.files


def test_linked_folders_are_followed_once(source: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("store")
    tiny_source.put(elsewhere, "x.png", tiny_source.encode(tiny_source.picture(9)))
    (source / "images/cam0").symlink_to(elsewhere)
    (source / "images/loop").symlink_to(source / "images")
    names = [name for name, _ in read(source).files]
    assert "images/cam0/x.png" in names
    assert len(names) == 6


def test_masks_beside_the_images_are_passed_over_by_name(source: Path) -> None:
    tiny_source.put(source, "images/b/00_mask.png", b"x")
    found = read(source)
    assert "images/b/00_mask.png" not in dict(found.files)
    assert [name for _, name in found.skipped] == ["images/b/00_mask.png"]

    tiny_source.put(source, "masks/b/00_mask.png", b"x")  # what has a mask itself is an image
    assert "images/b/00_mask.png" in dict(read(source).files)


def test_folders_of_one_name_in_two_splits_keep_the_users_own_split(tmp_path: Path) -> None:
    """As groups of one name, all of train would be unused because its place is in val."""
    tiny_source.write_source(tmp_path, {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    found = read(tmp_path)
    assert found.groups is not None
    held = {found.groups[key] for key in found.lists["test"] or ()}
    assert held == {"val/cat", "val/dog"}
    assert not held & {group for key, group in found.groups.items() if key.startswith("train")}


@pytest.mark.parametrize(("images", "masks"), [("Images", "Masks"), ("images", "labels"), ("img", "annotations")])
def test_the_two_folders_may_have_other_names(source: Path, images: str, masks: str) -> None:
    names = [name for name, _ in read(source).files]
    (source / "images").rename(source / images)
    (source / "masks").rename(source / masks)
    assert [name for name, _ in read(source).files] == names


def test_several_folders_that_may_hold_the_masks_are_named(source: Path) -> None:
    (source / "masks").rename(source / "labels")
    (source / "annotations").mkdir()
    with pytest.raises(SourceError, match="annotations/, labels/ could each be masks/"):
        read(source)


def test_a_split_beside_images_is_not_passed_over_in_silence(source: Path) -> None:
    tiny_source.put(source, "test/images/x.png", b"x")
    assert ("folder beside images/, not read", "test/") in read(source).skipped
