"""Which image a name means: exactly first, then uniquely; what is unclear is refused by name."""

import sys
import unicodedata

import pytest

from pipeline.formats.names import matching

UMLAUT = "gr\u00fcn.png"


@pytest.mark.parametrize(
    ("name", "image", "rule"),
    [
        ("cam0/x.png", "cam0/x.png", "exact"),
        ("cam0\\x.png", "cam0/x.png", "slashes"),
        ("./cam0/x.png", "cam0/x.png", "slashes"),
        (unicodedata.normalize("NFD", UMLAUT), UMLAUT, "Unicode form"),
        ("CAM0/X.PNG", "cam0/x.png", "upper and lower case"),
        ("cam0/x", "cam0/x.png", "same name"),
        ("cam0/x.jpg", "cam0/x.png", "same name"),
        ("cam0/x.jpg.png", "cam0/x.png", "extension"),
        ("images/cam0/x.png", "cam0/x.png", "extension"),
        ("cam0/x_mask.png", "cam0/x.png", "suffix such as _mask"),
        ("cam0/x-label.png", "cam0/x.png", "suffix such as _mask"),
        ("cam0/x.mask.png", "cam0/x.png", "suffix such as _mask"),
        ("cam0/1a2b3c4d-x.png", "cam0/x.png", "prefix of a tool"),
        ("x.png", "cam0/x.png", "folders"),
        ("upload/4/cam0/x.png", "cam0/x.png", "folders"),
    ],
)
def test_a_name_means_the_one_image_that_answers(name, image, rule):
    found = matching.Index(["cam0/x.png", "cam1/y.png", UMLAUT]).find(name)

    assert (found.image, found.rule) == (image, rule)


def test_an_image_stored_under_a_tools_prefix_is_the_tasks():
    assert matching.Index(["24e3f2d0-i0.png", "99e3f2d0-i1.png"]).find("i0.png").image == "24e3f2d0-i0.png"


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("0001_l_mask.png", "0001_l.jpg"),  # the left one of two
        ("bottle label.mask.png", "bottle label.jpg"),
        ("x.png", "x.jfif"),
        ("119_mask.png", "119_sat.jpg"),
        ("7.label.png", "7.image.png"),
    ],
)
def test_words_at_the_end_of_an_images_name_are_its_own(name, image):
    assert matching.Index([image, "y.jpg"]).find(name).image == image


@pytest.mark.parametrize("name", ["20260401-120000.png", "20260401-120000_mask.png", "cam/20260401-120000"])
def test_dates_are_no_prefixes_that_a_tool_put_there(name):
    assert matching.Index(["20260402-120000.jpg", "cam/20260403-120000.jpg"]).find(name).image is None


def test_a_tools_prefix_may_stand_before_a_date():
    index = matching.Index(["20260402-120000.jpg", "20260403-120000.jpg"])
    assert index.find("1a2b3c4d-20260403-120000.png").image == "20260403-120000.jpg"


def test_an_image_whose_name_ends_like_a_masks_takes_no_other_ones_mask():
    assert matching.match(["x_mask.png"], ["x.jpg", "x_l.jpg"]).images == {"x_mask.png": "x.jpg"}
    assert matching.match(["x_mask.png"], ["x_l.jpg", "x_r.jpg"]).images == {}


def test_folders_that_differ_are_another_image():
    assert matching.Index(["cam1/001.png"]).find("cam2/001.png") == matching.Match(None, "folders")


def test_an_exact_name_beats_every_looser_one():
    index = matching.Index(["x.png", "x.jpg", "X.png", "x_mask.png"])

    assert [index.find(name).image for name in ("x.png", "x.jpg", "X.png", "x_mask.png")] == index.images


def test_what_several_images_answer_is_refused_with_their_names():
    matched = matching.match(["a", "sub.png"], ["a.png", "a.jpg", "1/sub.png", "2/sub.png"])

    assert matched.images == {}
    assert "a.png, a.jpg could be meant" in matched.refused["a"]
    assert "1/sub.png, 2/sub.png could be meant" in matched.refused["sub.png"]


def test_the_strictest_of_two_names_has_the_image_and_equals_have_none():
    matched = matching.match(["x.png", "x_mask.png", "Y.PNG", "Y.png", "z_gt.png"], ["x.png", "y.png", "z.png"])

    assert matched.images == {"x.png": "x.png", "z_gt.png": "z.png"}
    assert "x.png already" in matched.refused["x_mask.png"]
    assert matched.refused["Y.PNG"] == matched.refused["Y.png"]


def test_what_was_forgiven_is_counted_with_the_first():
    matched = matching.match(["a_mask.png", "b_mask.png", "c.png"], ["a.jpg", "b.jpg", "c.jpg"])

    assert matched.forgiven == [("suffix such as _mask", "2, the first: a_mask.png is a.jpg")]


def test_a_name_that_is_only_a_suffix_stays_itself():
    assert matching.Index(["cam/x.png"]).find("cam/_mask.png").image is None


def test_a_path_that_only_ends_alike_is_no_match_where_images_may_be_missing():
    index = matching.Index(["cam0/x.png"])

    assert index.find("x.png", folders=False).image is None
    assert index.find("CAM0/X_mask.jpg.png", folders=False).image == "cam0/x.png"


def _calls(count: int, name: str) -> int:
    """How many functions are called to match so many names, none of which can be told."""
    names = [name.format(n=n) for n in range(count)]
    images = [f"s/{n}/image.png" for n in range(count)]
    calls = 0

    def counted(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(counted)
    try:
        matching.match(names, images)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("name", ["deep/{n}/image.png", "deep/{n}/{n:08x}-image.png", "cam/{n}_mask.png"])
def test_matching_names_takes_steps_in_proportion_to_their_number(name):
    small, large = _calls(200, name), _calls(1600, name)

    assert large < 8 * 1.5 * small
