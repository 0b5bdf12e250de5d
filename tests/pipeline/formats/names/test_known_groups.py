"""Which group of the source the folders of a delivery mean: whole ones first, then the end of only one."""

import unicodedata

import pytest

from pipeline.formats.names.known_groups import GroupMatch, KnownGroups


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
        ("site/images/cam1/1.png", "site/cam1"),
        ("site\\cam1\\1.png", "site/cam1"),
    ],
)
def test_a_folder_that_is_a_group_of_the_source_is_that_group(name: str, group: str) -> None:
    known = KnownGroups(["cam0", "site/cam1", "g\u00e4rten"])
    assert known.find(name).group == group


@pytest.mark.parametrize(
    ("name", "group", "candidates"),
    [
        ("cam1/1.png", "a/cam1", ("a/cam1",)),
        ("may/images/CAM1/night/1.png", "a/cam1", ("a/cam1",)),
        ("cam0/1.png", "", ("a/cam0", "b/cam0")),
        ("b/cam1/1.png", "", ()),  # b has other cameras: this is a new one of it
        ("north/cam7/1.png", "c/north/cam7", ("c/north/cam7",)),  # the longest end
        ("1.png", "", ()),
        ("cam9/1.png", "", ()),
    ],
)
def test_a_folder_that_only_one_group_ends_in_is_that_group(name: str, group: str, candidates: tuple[str, ...]) -> None:
    known = KnownGroups(["a/cam0", "a/cam1", "b/cam0", "c/north/cam7", "d/south/cam7"])
    assert known.find(name) == GroupMatch(group, candidates, by_end=bool(candidates))


def test_an_image_that_is_its_own_group_is_recognised_by_its_whole_name_alone() -> None:
    known = KnownGroups([], singles=["2019/cam0"])
    assert known.find("cam0/1.png").candidates == ()
    assert known.find("may/2019/cam0/1.png").group == "2019/cam0"
