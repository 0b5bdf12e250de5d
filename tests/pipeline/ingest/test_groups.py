"""Groups of the source's images and of later dumps'."""

from pipeline.ingest.groups import Groups


def test_groups_of_base_and_later_dumps() -> None:
    source = {"groups": {"x/1": "site"}, "group_pattern": "^cam([0-9]+)"}
    groups = Groups(source)
    assert groups.of("x/1", "base") == "site"
    assert groups.of("x/1", "later") == "x"  # the table is the base archive's
    assert groups.of("cam7_3", "later") == "7"
    assert groups.of("may/cam7_3", "later") == "7"  # below the folder that the delivery was packed with
    assert groups.of("a/b/3", "base") == "a/b"
    assert groups.of("images/default/3", "base") == "images/default/3"  # layout is no group
    assert groups.of("3", "base") == "3"
    assert groups.of("3", "later") == "later/3"
    assert groups.of("may/site/night/3", "later") == "site"  # a group of the source, however deep


def test_a_match_that_is_a_group_of_the_source_comes_before_one_in_the_deliverys_own_folder() -> None:
    groups = Groups({"groups": {"cam0_1": "cam0"}, "group_pattern": "([a-z0-9]+)_[0-9]+"})
    assert groups.of("may_2026/cam0_001", "later") == "cam0"
    assert groups.of("may_2026/cam0/x", "later") == "cam0"
    assert groups.of("may_2026/CAM0_001", "later") == "cam0"
    assert groups.of("may_2026/cam9/x", "later") == "may"
    assert groups.known("may_2026/cam0_001") == "cam0"
    assert groups.known("may_2026/cam9_001") == ""
