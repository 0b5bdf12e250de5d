"""Labels whose names are not quite those of their images: the rules are a source's, each use of one is reported."""

import unicodedata
from pathlib import Path

import pytest

from pipeline.imaging import label_maps
from pipeline.labels.finder import Finder
from pipeline.labels.parse import Record
from pipeline.storage import manifest
from tests.support import tiny_source
from tests.support.command_line import marginalia
from tests.support.label_project import NEW, add, codes


def _masks(folder: str, *names: str) -> Path:
    for name in names:
        tiny_source.put(Path(folder), f"masks/{name}", label_maps.encode_png(NEW))
    return Path(folder)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("U/00.PNG", "upper and lower case"),
        ("u/00_mask.png", "suffix such as _mask"),
        ("u/00.jpg.png", "same name"),
        ("BASE/U/00_Mask.PNG", "suffix such as _mask"),
        ("u/24e3f2d0-00.png", "prefix of a tool"),
    ],
)
def test_a_name_is_forgiven_what_a_source_forgives_and_it_is_reported(root: Path, name: str, rule: str) -> None:
    result = add(_masks("back", name))

    assert result.taken == 1, result.refused
    assert [(used, line.endswith(" is base/u/00")) for used, line in result.forgiven] == [(rule, True)]


def test_the_table_names_the_rule(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert marginalia("import-labels", _masks("back", "u/00_mask.png", "u/01_mask.png")) == 0

    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "matched by suffix such as _mask 2, the first: u/00_mask.png is base/u/00" in out


def test_a_held_out_image_is_recognised_under_any_spelling_too(root: Path) -> None:
    result = add(_masks("back", "T/00_mask.PNG", "V/00.png", "u/00.png"))

    assert codes(result) == {"T/00_mask.PNG": "held-out", "V/00.png": "held-out"}
    assert result.taken == 1


def test_the_end_of_a_path_alone_names_no_image(root: Path) -> None:
    """The image that was meant may have been left out of this project, and another of its name would take the labels."""
    result = add(_masks("back", "elsewhere/00.png", "u/00.png"))

    assert codes(result) == {"elsewhere/00.png": "unknown-image"}


def test_the_right_name_has_the_image_whatever_the_order_and_equals_have_none(root: Path) -> None:
    result = add(_masks("back", "u/00.png", "U/00_mask.png", "u/01_mask.png", "u/01_seg.png"))

    assert result.taken == 1
    assert codes(result) == {
        "U/00_mask.png": "labels-twice", "u/01_mask.png": "ambiguous-name", "u/01_seg.png": "ambiguous-name",
    }  # fmt: skip


def test_two_unicode_forms_are_one_name() -> None:
    name = "g\u00e4rten/\u00fc"
    row = manifest.Row("1" * 64, name, "folder", "base", "g", 4, 4, "s", 0, 1, None, None, None, "0" * 16, "labelled")
    record = Record(unicodedata.normalize("NFD", f"{name}.png"), "", lambda row: NEW)

    assert Finder([row]).found(record) == (row, "Unicode form")
