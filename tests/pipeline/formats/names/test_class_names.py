"""Names of classes that differ in spaces, Unicode form and case: matched uniquely, and reported."""

import unicodedata
from pathlib import Path

import pytest

from pipeline.formats.common import class_list
from pipeline.formats.names import class_names
from tests.support import tiny_settings


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("cat", ["cat", "Cat"], "cat"),
        ("cat ", ["cat", "dog"], "cat"),
        (" fire  hydrant", ["fire hydrant"], "fire hydrant"),
        ("CAT", ["cat", "dog"], "cat"),
        ("cat", ["Cat "], "Cat "),
        (unicodedata.normalize("NFD", "b\u00e4r"), ["b\u00e4r"], "b\u00e4r"),
        ("CAT", ["cat", "Cat"], None),  # two could be meant
        ("cat ", ["CAT", "cat"], "cat"),
        ("cats", ["cat"], None),
        ("", ["cat"], None),
    ],
)
def test_a_name_means_the_only_class_of_its_spelling(name: str, known: list[str], meant: str | None) -> None:
    assert class_names.meant([name], known) == ({} if meant is None else {name: meant})


def test_labels_become_the_classes_of_the_list_and_it_is_reported(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    classes, ids, notes = class_list.named(tmp_path, tiny_settings.data(), ["Cat", "cat ", "cat", "dog"])

    assert [c["name"] for c in classes] == ["background", "cat"]
    assert {name: ids[name] for name in ("Cat", "cat ", "cat", "dog")} == {"Cat": 1, "cat ": 1, "cat": 1, "dog": 255}
    assert notes == [
        "not in classes.txt, so ignored: dog",
        "class names matched by spelling: 2, the first: 'Cat' is 'cat'",
    ]


def test_without_a_list_spaces_make_no_class_and_case_is_reported(tmp_path: Path) -> None:
    classes, ids, notes = class_list.named(tmp_path, tiny_settings.data(classes=None), ["cat ", "cat", "Cat"])

    assert [c["name"] for c in classes] == ["cat", "Cat"]
    assert (ids["cat "], ids["cat"], ids["Cat"]) == (0, 0, 1)
    assert notes[0].startswith("classes that only their case tells apart: cat, Cat;")
    assert notes[1] == "class names matched by spelling: 1, the first: 'cat ' is 'cat'"


def test_the_background_is_known_in_any_case(tmp_path: Path) -> None:
    settings = tiny_settings.data(classes=None, unannotated="background")
    classes, ids, _ = class_list.named(tmp_path, settings, ["Background", "cat"])

    assert [c["name"] for c in classes] == ["Background", "cat"]
    assert class_list.empty_id(settings, ids) == 0
