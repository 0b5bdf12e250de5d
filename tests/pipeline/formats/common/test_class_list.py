"""Class lists as tables: what Excel and other programs make of them."""

from pathlib import Path

import pytest

from pipeline.formats.common import class_list
from pipeline.formats.common.source import SourceError


def read(tmp_path: Path, text: str) -> list[tuple[str, list[int]]]:
    (tmp_path / "classes.csv").write_bytes(text.encode("utf-8-sig"))
    lines = class_list.read_lines(tmp_path / "classes.csv", "")
    return [(item["name"], item["color"]) for item in class_list.parse(lines, tmp_path / "classes.csv")[0]]


def test_a_table_of_excel_with_semicolons_ids_and_empty_rows(tmp_path: Path) -> None:
    text = "id;name;r;g;b\r\n1;Straße;128;64;128\r\n0;Hintergrund;0;0;0\r\n;;;;\r\n;;;;\r\n"
    assert read(tmp_path, text) == [("Hintergrund", [0, 0, 0]), ("Straße", [128, 64, 128])]


@pytest.mark.parametrize("header", ["name,red,green,blue", "Label\tR\tG\tB", '"name";"r";"g";"b"'])
def test_the_header_says_which_column_is_what(tmp_path: Path, header: str) -> None:
    between = next(letter for letter in ",;\t" if letter in header)
    row = between.join(["sky", "1", "2", "3"])
    assert read(tmp_path, f"{header}\n{row}\n") == [("sky", [1, 2, 3])]


def test_ids_that_leave_a_gap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"column 'id' holds 1, 2; ids count from 0"):
        read(tmp_path, "id,name\n1,road\n2,car\n")


def test_a_name_with_commas_in_a_plain_list_is_a_name(tmp_path: Path) -> None:
    assert [name for name, _ in read(tmp_path, "car, parked\nroad\n")] == ["car, parked", "road"]
