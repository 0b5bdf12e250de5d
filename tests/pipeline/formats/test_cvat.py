"""CVAT's xml against what datumaro and CVAT's own SDK write; what we write against ourselves."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.formats import cvat
from pipeline.formats.common import annotations
from pipeline.formats.common.source import Source, SourceError
from pipeline.formats.common.task import Item, id_prefix, task_name
from pipeline.imaging import label_maps
from pipeline.imaging.decode import Refused
from tests.support import tiny_settings
from tests.support.synthetic_masks import regions as ragged

GOLDEN = Path(__file__).parents[2] / "golden/label_tools"
NAMES = ("sky", "wall", "floor", "lamp")
CLASSES = [{"id": k, "name": n, "color": [40 * k, 9, 200]} for k, n in enumerate(NAMES)]
TRUTH = np.asarray(Image.open(GOLDEN / "cvat/truth.png"))


def xml(body: str, size: str = 'width="6" height="4"') -> bytes:
    return f'<annotations><version>1.1</version><image id="0" name="a.png" {size}>{body}</image></annotations>'.encode()


def painted(body: str, **kind: int) -> np.ndarray:
    (picture,) = cvat.parse(io.BytesIO(xml(body)), Path("a.xml"))[1]
    return annotations.paint(picture, annotations.class_ids(NAMES), max_pixels=10**6, **kind)


def code(body: str) -> str:
    with pytest.raises(Refused) as caught:
        painted(body)
    return caught.value.code


def test_datumaro_writes_what_we_read() -> None:
    labels, (picture,) = cvat.load(GOLDEN / "cvat/annotations.xml")
    assert [label["name"] for label in labels] == list(NAMES)
    assert (picture.name, picture.height, picture.width) == ("night/a b.jpg", *TRUTH.shape)
    got = annotations.paint(picture, annotations.class_ids(NAMES), max_pixels=10**6)
    np.testing.assert_array_equal(got, np.where(TRUTH == 255, 0, TRUTH))  # its sky is a box below everything


def test_run_lengths_are_the_sdks_and_go_by_rows_inside_the_box() -> None:
    for k, name in enumerate(NAMES):
        *counts, left, top, right, bottom = json.loads((GOLDEN / "cvat/masks.json").read_text())[name]
        box = (slice(top, bottom + 1), slice(left, right + 1))
        assert cvat.pack(TRUTH[box] == k) == counts
        np.testing.assert_array_equal(cvat.unpack(counts, bottom - top + 1, right - left + 1), TRUTH[box] == k)
    mask = '<mask label="wall" rle="1,3,2" left="2" top="1" width="3" height="2" z_order="0" occluded="1"/>'
    wanted = np.full((4, 6), 255)
    wanted[1, 3:5], wanted[2, 2] = 1, 1
    np.testing.assert_array_equal(painted(mask), wanted)


def test_z_order_decides_then_the_order_in_the_file() -> None:
    boxes = [
        '<box label="{}" xtl="{}" ytl="0" xbr="{}" ybr="4" z_order="{}"/>'.format(*b)
        for b in (("lamp", 2, 3, 5), ("sky", 0, 4, -1), ("wall", 1, 4, 0), ("floor", 3, 4, 0))
    ]
    assert painted("".join(boxes))[0].tolist() == [0, 1, 3, 2, 255, 255]
    assert painted("".join(boxes), unannotated=0)[0].tolist() == [0, 1, 3, 2, 0, 0]
    assert painted(boxes[3] + boxes[2])[0, 3] == 1


def test_outlines_by_pixel_centres_turned_about_their_middle() -> None:
    assert painted('<polygon label="wall" points="0.4,0.4;2.6,0.4;2.6,1.6;0.4,1.6"/>')[:2].tolist() == [
        [1, 1, 1, 255, 255, 255], [1, 1, 1, 255, 255, 255],
    ]  # fmt: skip
    turned = painted('<box label="wall" xtl="1" ytl="1" xbr="4" ybr="2" rotation="90.0"/>')
    assert np.argwhere(turned == 1).tolist() == [[0, 2], [1, 2], [2, 2]]
    disc = painted('<ellipse label="wall" cx="3" cy="2" rx="2" ry="1"/>')
    assert np.argwhere(disc == 1).tolist() == [[r, c] for r in (1, 2) for c in range(1, 5)]


def test_what_has_no_area_is_lost_and_said_so_but_a_tag_is_of_the_whole_image() -> None:
    rest = '<points label="x" points="1,1"/><polyline label="y" points="1,1;2,2"/><tag label="x"/>'
    (picture,) = cvat.parse(io.BytesIO(xml(rest)), Path("a.xml"))[1]
    assert not picture.shapes
    assert [which for _, which in picture.lost] == ["a points of 'x'", "a polyline of 'y'"]


def one_image(folder: Path, body: str, name: str = "a.png", attributes: str = "", **data: Any) -> Source:
    """images/a.png, 6 x 4 pixels, and a task with that one picture."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "images/a.png")
    image = f'<image id="0" name="{name}" {attributes} width="6" height="4">{body}</image></annotations>'
    (folder / "annotations.xml").write_text(cvat._head(CLASSES, 1, "t") + image)
    return cvat.read(folder, tiny_settings.data(source="cvat", **data), max_pixels=10**6)


POLYGON = '<polygon label="wall" points="0,0;6,0;6,2;0,2"/>'
POLYLINE = '<polyline label="wall" points="1,1;2,2"/>'


def test_a_line_refuses_the_mask_only_where_it_would_become_background(tmp_path: Path) -> None:
    source = one_image(tmp_path, POLYGON + POLYLINE)
    assert dict(source.files).keys() == {"images/a.png", "masks/a.png"}
    assert source.skipped == [("shape-without-area", "a polyline of 'wall' of a.png")]

    source = one_image(tmp_path, POLYGON + POLYLINE, unannotated="background")
    assert dict(source.files).keys() == {"images/a.png"}
    assert [(name, code) for name, code, _ in source.refused] == [("masks/a.png", "shape-without-area")]


def test_an_image_without_shapes_is_background_where_the_settings_say_so(tmp_path: Path) -> None:
    assert "masks/a.png" not in dict(one_image(tmp_path, "", unannotated="background").files)
    source = one_image(tmp_path, "", unannotated="background", no_shapes="background")
    mask = dict(source.files)["masks/a.png"]
    assert not label_maps.decode_mask(mask(), max_pixels=10**6).any()


def test_names_without_extension_and_in_another_case_are_the_image(tmp_path: Path) -> None:
    source = one_image(tmp_path, POLYGON, name="A")
    assert "masks/a.png" in dict(source.files)
    assert source.notes == ["images matched to the labels' names by extension: 1, the first: A is a.png"]


def test_a_subset_is_a_split_in_any_case(tmp_path: Path) -> None:
    source = one_image(tmp_path, POLYGON, attributes='subset="Test"')
    assert source.lists["test"] == ["a"]


def test_images_of_one_name_are_told_apart_by_their_subset(tmp_path: Path) -> None:
    for folder in ("default", "test"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "images" / folder / "000000.png")
    image = '<image id="{}" name="000000.png" subset="{}" width="6" height="4">{}</image>'
    upper, lower = (f'<polygon label="wall" points="0,{y};6,{y};6,{y + 2};0,{y + 2}"/>' for y in (0, 2))
    body = image.format(0, "Test", upper) + image.format(1, "default", lower)
    (tmp_path / "annotations.xml").write_text(cvat._head(CLASSES, 2, "t") + body + "</annotations>")

    source = cvat.read(tmp_path, tiny_settings.data(source="cvat"), max_pixels=10**6)

    files = dict(source.files)
    rows = {name: (label_maps.decode_mask(files[f"masks/{name}.png"](), max_pixels=99) == 1).any(axis=1)
            for name in ("test/000000", "default/000000")}  # fmt: skip
    assert {name: found.tolist() for name, found in rows.items()} == {
        "test/000000": [True, True, False, False],
        "default/000000": [False, False, True, True],
    }
    assert source.lists["test"] == ["test/000000"]
    assert not source.refused


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('<mask label="wall" rle="1,3,3" left="2" top="1" width="3" height="2"/>', "bad-rle"),
        ('<mask label="wall" rle="9,-3" left="2" top="1" width="3" height="2"/>', "bad-rle"),
        ('<mask label="wall" rle="" left="2" top="1" width="3" height="2"/>', "bad-shape"),
        ('<mask label="wall" rle="6" left="4" top="1" width="3" height="2"/>', "bad-shape"),
        ('<mask label="wall" rle="6" left="-1" top="1" width="3" height="2"/>', "bad-shape"),
        ('<polygon label="wall" points="1,1;2,2;nan,3"/>', "bad-polygon"),
        ('<polygon label="wall" points="1,1;2"/>', "bad-shape"),
        ('<box label="wall" xtl="1" ytl="1" xbr="2"/>', "bad-shape"),
        ('<box label="wal" xtl="1" ytl="1" xbr="2" ybr="3"/>', "unknown-class"),
    ],
)
def test_a_bad_shape_refuses_its_record_alone(body: str, why: str) -> None:
    assert code(body) == why


@pytest.mark.parametrize(
    "data",
    [
        b'<!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>',
        b"<annotations><image",
        b"<html/>",
        b"\x00\x01",
        b"<annotations>" + b"<a>" * 40 + b"</a>" * 40 + b"</annotations>",
        b'<annotations><image id="0" name="a" width="0" height="4"/></annotations>',
        b'<annotations><track id="0" label="a"></track></annotations>',
    ],
)
def test_hostile_or_foreign_xml_is_refused_whole(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "annotations.xml").write_bytes(data)
    with pytest.raises(SourceError, match=r"annotations\.xml"):
        cvat.load(tmp_path / "annotations.xml")


def test_too_much_xml_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.xml").write_bytes(xml(""))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("annotations.xml", xml(""))
    assert len(cvat.load(tmp_path / "a.zip")[1]) == 1
    monkeypatch.setattr(cvat, "MAX_BYTES", 50)
    for name in ("a.xml", "a.zip"):
        with pytest.raises(SourceError, match="in parts"):
            cvat.load(tmp_path / name)


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"annotations\.xml: not found; export"):
        cvat.read(tmp_path, tiny_settings.data(source="cvat"), max_pixels=10**6)


def test_a_label_that_stands_there_twice_counts_once() -> None:
    text = "".join(f"<label><name>{n}</name><color>#0{k}0000</color></label>" for k, n in enumerate("abab"))
    labels, _ = cvat.parse(io.BytesIO(f"<annotations>{text}</annotations>".encode()), Path("a.xml"))
    assert labels == [{"name": "a", "color": [0, 0, 0]}, {"name": "b", "color": [1, 0, 0]}]


def test_every_pixel_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Specks, holes, ignored pixels, names that XML must escape; the image's bytes; unlabelled images."""
    names = ["sky & <clouds>", 'a "wall"', "ignore", "lamp"]
    classes = [{"id": k, "name": n, "color": [k, 9, 200]} for k, n in enumerate(names)]
    label = ragged(61, 83, 4, 2)
    label[10:14, 3:50] = 255
    items = [
        Item(task_name("ab" * 32, "e1m1/003.png"), "ab" * 32, b"bytes", 61, 83, label),
        Item(task_name("cd" * 32, "x.png"), "cd" * 32, b"more", 5, 4, None),
    ]
    assert cvat.write(tmp_path / "t.zip", items, classes) == 2
    labels, (first, second) = cvat.load(tmp_path / "t.zip")
    assert [(label["name"], label["color"]) for label in labels[:4]] == [(n, [k, 9, 200]) for k, n in enumerate(names)]
    for kind in ({}, {"unannotated": 1}):
        got = annotations.paint(first, annotations.class_ids(names), max_pixels=10**6, **kind)
        np.testing.assert_array_equal(got, label)
    assert len(first.shapes) < 100 < len(np.unique(label)) * 61
    assert not second.shapes
    with zipfile.ZipFile(tmp_path / "t.zip") as archive:
        assert archive.read(f"images/{first.name}") == b"bytes"
    assert id_prefix(first.name) == "abababababab"
    assert id_prefix(f"images/deadbeef-{first.name}") == "abababababab"
    assert id_prefix("images/e1m1/003.png") is None


def test_a_folder_with_images_is_a_source(tmp_path: Path) -> None:
    classes = CLASSES[:3]
    label = np.where(TRUTH == 3, 255, TRUTH)
    item = Item("images_a.png", "", b"", *label.shape, label)
    (tmp_path / "images/night").mkdir(parents=True)
    for name in ("images_a", "b"):
        Image.fromarray(np.zeros((*label.shape, 3), np.uint8)).save(tmp_path / f"images/night/{name}.png")
    text = cvat._head(classes, 1, "t") + cvat.image_xml(0, item, classes)
    text += '<image id="1" name="gone.png" width="6" height="4"><tag label="sky"/></image></annotations>'
    (tmp_path / "annotations.xml").write_text(text)
    data = tiny_settings.data(source="cvat", path=str(tmp_path))
    source = cvat.read(tmp_path, data, max_pixels=10**6)
    assert source.classes == classes
    assert [name for name, _ in source.files] == [
        "images/night/b.png",
        "images/night/images_a.png",
        "masks/night/images_a.png",
    ]
    np.testing.assert_array_equal(label_maps.decode_mask(source.files[2][1](), max_pixels=10**6), label)
    assert [(name, code) for name, code, _ in source.refused] == [("gone.png", "labels-without-image")]


def taken_and_refused(
    folder: Path, images: tuple[str, ...], names: tuple[str, ...]
) -> tuple[dict[str, int], list[tuple[str, str]], str]:
    """Files under images/, pictures in a task, each all of one class -> class of each mask, refusals, their reasons."""
    for image in images:
        (folder / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "images" / image)
    text = cvat._head(CLASSES, len(names), "t")
    for n, name in enumerate(names):
        text += cvat.image_xml(n, Item(name, "", b"", 4, 6, np.full((4, 6), n % 3, np.uint8)), CLASSES)
    (folder / "annotations.xml").write_text(text + "</annotations>")
    source = cvat.read(folder, tiny_settings.data(source="cvat"), max_pixels=10**6)
    got = {
        name: int(np.unique(label_maps.decode_mask(origin(), max_pixels=10**6)).item())
        for name, origin in source.files
        if name.startswith("masks/")
    }
    return got, [(name, code) for name, code, _ in source.refused], " ".join(reason for *_, reason in source.refused)


def test_pictures_that_could_all_be_one_image_are_all_refused(tmp_path: Path) -> None:
    """images/001.png lies flat: which camera's it is nobody can say, in whatever order the task lists them."""
    cams = ("cam1/001.png", "cam2/001.png")
    for n, names in enumerate(
        (cams, cams[::-1], ("a/images/001.png", "b/images/001.png"), ("my_images/001.png", "a/001.png"))
    ):
        got, refused, said = taken_and_refused(tmp_path / str(n), ("001.png", "b.png"), (*names, "x/b.png"))
        assert got == {"masks/b.png": 2}
        assert refused == [(name, "labels-without-image") for name in names]
        assert said.count(f"001.png could be each of {', '.join(names)}; keep one") == 2
    six = tuple(f"cam{n}/001.png" for n in range(6))
    got, refused, said = taken_and_refused(tmp_path / "six", ("001.png",), six)
    assert (got, [name for name, _ in refused]) == ({}, list(six))
    assert "cam2/001.png, cam3/001.png and 2 more;" in said


@pytest.mark.parametrize(
    ("names", "wanted", "code"),
    [
        (("cam1/001.png", "001.png"), 1, "labels-without-image"),  # the exact name wins from any place
        (("images/001.png", "cam1/001.png"), 0, "labels-without-image"),
        (("task/images/001.png", "cam1/001.png"), 0, "labels-without-image"),
        (("task/images/001.png", "001.png"), 1, "labels-twice"),
        (("001.png", "001.png"), 0, "labels-twice"),
        (("001.png", "images/001.png"), 0, "labels-twice"),
        (("cam1/001.png", "cam1/001.png"), 0, "labels-twice"),
    ],
)
def test_the_nearest_name_has_the_image(tmp_path: Path, names: tuple[str, ...], wanted: int, code: str) -> None:
    got, refused, _ = taken_and_refused(tmp_path, ("001.png",), names)
    assert got == {"masks/001.png": wanted}
    assert refused == [(names[1 - wanted], code)]


def test_labels_of_another_folders_image_are_not_taken_for_its_namesake(tmp_path: Path) -> None:
    """cam2/001.png was not delivered: its labels must not land on cam1/001.png, nor keep that one's own away."""
    (tmp_path / "images/cam1").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "images/cam1/001.png")
    own, other = np.zeros((4, 6), np.uint8), np.ones((4, 6), np.uint8)
    text = cvat._head(CLASSES, 2, "t")
    for n, (name, label) in enumerate((("cam2/001.png", other), ("task/images/cam1/001.png", own))):
        text += cvat.image_xml(n, Item(name, "", b"", 4, 6, label), CLASSES)
    (tmp_path / "annotations.xml").write_text(text + "</annotations>")
    source = cvat.read(tmp_path, tiny_settings.data(source="cvat"), max_pixels=10**6)
    assert [(name, code) for name, code, _ in source.refused] == [("cam2/001.png", "labels-without-image")]
    (mask,) = [origin for name, origin in source.files if name == "masks/cam1/001.png"]
    np.testing.assert_array_equal(label_maps.decode_mask(mask(), max_pixels=10**6), own)


def test_a_photograph_named_like_a_mask_is_an_image_where_the_tool_labels_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "images/a_label.png")
    source = one_image(tmp_path, POLYGON, name="a_label.png")
    assert "masks/a_label.png" in dict(source.files)
