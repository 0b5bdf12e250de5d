"""Words in paths: splits in any case and spelling, folders that are only layout, groups of what is left."""

import pytest

from pipeline.formats.names import layout


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("train", "train"), ("Training", "train"), ("TRAIN2017", "train"), ("val", "val"), ("Valid", "val"),
        ("validation", "val"), ("Test", "test"), ("testing", "test"), ("test2012", "test"), (" val ", "val"),
        ("trains", None), ("cam0", None), ("2017", None), ("contest", None), ("", None), ("trainval", None),
    ],
)  # fmt: skip
def test_a_word_states_a_split_in_any_case_and_spelling(word, part):
    assert layout.split_word(word) == part


@pytest.mark.parametrize(
    ("stem", "part"),
    [
        ("instances_val2017", "val"), ("instances_Test", "test"), ("training-labels", "train"), ("valid", "val"),
        ("_annotations.coco", None), ("train_val", None), ("latest", None), ("test.labels", "test"),
    ],
)  # fmt: skip
def test_a_file_name_states_a_split_among_its_words(stem, part):
    assert layout.split_in_name(stem) == part


@pytest.mark.parametrize(
    ("path", "part", "group"),
    [
        ("images/train/cam0/x.png", "train", "cam0"),
        ("Train/images/x.png", "train", ""),
        ("images\\valid\\x.png", "val", ""),
        ("cam0/night/x.png", None, "cam0/night"),
        ("images/default/x.png", None, ""),
        ("JPEGImages/x.jpg", None, ""),
        ("train/test/x.png", None, ""),  # two splits: nobody can tell
        ("test.png", None, ""),  # the file's own name never counts
    ],
)
def test_folders_state_splits_and_groups(path, part, group):
    assert layout.split_in_path(path) == part
    assert layout.group_in_path(path) == group


def test_one_folder_around_everything_is_no_group():
    assert layout.groups(["cam0/1.png", "cam0/2.png"]) is None
    assert layout.groups(["images/default/1.png", "images/default/2.png"]) is None
    assert layout.groups([]) is None


def test_two_folders_are_groups_and_an_image_in_none_is_its_own():
    assert layout.groups(["train/cam0/1.png", "val/cam1/2.png", "3.png"]) == {
        "train/cam0/1": "cam0",
        "val/cam1/2": "cam1",
        "3": "3",
    }


def test_a_folder_in_several_splits_is_a_group_in_each():
    assert layout.groups(["train/cat/1.png", "val/cat/2.png", "train/dog/3.png", "cat/4.png"]) == {
        "train/cat/1": "train/cat",
        "val/cat/2": "val/cat",
        "train/dog/3": "dog",
        "cat/4": "cat",
    }


@pytest.mark.parametrize(
    ("paths", "groups"),
    [
        (["data/1.png", "media/2.png", "lab/3.png"], ["data", "media", "lab"]),
        (["images/data/1.png", "images/media/2.png"], ["data", "media"]),  # both names people gave
        (["train/data/1.png", "val/lab/2.png"], ["1.png", "lab"]),  # alone where it stands: layout
        (["images/default/1.png", "images/Train/2.png"], None),  # CVAT's own, beside a split
        (["data/cam0/1.png", "data/cam1/2.png"], ["cam0", "cam1"]),
        (["media/upload/4/1.png", "media/upload/5/2.png"], ["4", "5"]),  # Label Studio's
        (["data/images/1.png", "lab/images/2.png"], ["data", "lab"]),
        (["JPEGImages/1.png", "lab/2.png"], ["1.png", "lab"]),  # never a place
    ],
)
def test_words_of_layout_are_groups_where_other_places_stand_beside_them(paths, groups):
    wanted = None if groups is None else [g.removesuffix(".png") for g in groups]
    found = layout.groups(paths)
    got = (
        None if found is None else [g.rpartition("/")[2] if g in (p[:-4] for p in paths) else g for g in found.values()]
    )

    assert got == wanted


def test_images_are_listed_by_the_split_of_their_folder():
    paths = ["train/b.png", "val/a.png", "train/a.png", "other/c.png"]

    assert layout.parts(paths) == {"train": ["train/b", "train/a"], "val": ["val/a"]}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Training_Set", "train"), ("Test_Set", "test"), ("testset", "test"), ("val_images", "val"), ("train data", "train"),
        ("Validation-Dataset-2017", "val"), ("train_val", None), ("set", None), ("test_site", None), ("images", None),
    ],
)  # fmt: skip
def test_what_a_split_is_a_set_of_says_nothing_more(name, part):
    assert layout.split_word(name) == part
