"""Label Studio's brush against its own converter; its JSON; what we write against ourselves."""

import base64
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline.formats import labelstudio
from pipeline.formats.common import annotations as pictures
from pipeline.formats.common import brush_rle
from pipeline.formats.common.source import Source, SourceError
from pipeline.formats.common.task import Item
from pipeline.imaging import label_maps
from pipeline.imaging.decode import Refused
from tests.support import tiny_settings
from tests.support.synthetic_masks import regions as ragged

GOLDEN = Path(__file__).parents[2] / "golden/label_tools"
NAMES = ("sky", "wall", "floor", "lamp")
CLASSES = [{"id": k, "name": n, "color": [40 * k, 9, 200]} for k, n in enumerate(NAMES)]
TRUTH = np.asarray(Image.open(GOLDEN / "cvat/truth.png"))
BRUSH = json.loads((GOLDEN / "labelstudio/brush.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_brush_is_packed_as_label_studios_own_converter_does(name: str) -> None:
    mask = NAMES.index(name) == TRUTH
    assert brush_rle.encode(mask) == BRUSH["rle"][name]
    np.testing.assert_array_equal(brush_rle.decode(BRUSH["rle"][name], *mask.shape), mask)


def test_values_in_turn_and_runs_beyond_the_longest() -> None:
    noise = np.array(BRUSH["noise"])
    np.testing.assert_array_equal(brush_rle.decode(BRUSH["rle"]["noise"], 7, 5), noise[..., 3] >= 128)
    wide = np.zeros((200, 300), bool)
    wide[150:, 7] = True
    assert brush_rle.encode(wide) == BRUSH["rle"]["wide"]
    np.testing.assert_array_equal(brush_rle.decode(BRUSH["rle"]["wide"], 200, 300), wide)
    bits = f"{8:032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in (3, 4, 8, 16)) + "0" + "00" + f"{7:03b}"
    bits += "".join(f"{v:08b}" for v in (1, 2, 3, 255, 5, 6, 7, 0))  # eight values in turn: two pixels
    packed = [int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8)]
    assert brush_rle.decode(packed, 1, 2).tolist() == [[True, False]]


def slow_brush(rle: list[int], total: int) -> list[int]:
    """All values, bit by bit as the format is described."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    at = 0

    def number(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    assert number(32) == total
    word = number(5) + 1
    sizes = [number(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        repeats = number(1)
        count = number(sizes[number(2)]) + 1
        values += [number(word)] * count if repeats else [number(word) for _ in range(count)]
    return values


@pytest.mark.parametrize("seed", range(20))
def test_a_brush_is_read_as_a_slow_loop_reads_it(seed: int) -> None:
    """Runs of every kind, in words of 1 to 8 bits and lengths of other bits than Label Studio's own."""
    rng = np.random.default_rng(seed)
    height, width, word = int(rng.integers(1, 30)), int(rng.integers(1, 30)), int(rng.integers(1, 9))
    sizes = rng.integers(1, 17, 4).tolist()
    total = done = 4 * height * width
    bits = f"{total:032b}{word - 1:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    while done:
        repeats, kind = int(rng.integers(2)), int(rng.integers(4))
        count = int(rng.integers(1, min(done, 1 << sizes[kind], 60) + 1))
        values = rng.integers(1 << word, size=1 if repeats else count)
        bits += f"{repeats}{kind:02b}{count - 1:0{sizes[kind]}b}" + "".join(f"{v:0{word}b}" for v in values)
        done -= count
    rle = [int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8)]
    want = np.array(slow_brush(rle, total)).reshape(height, width, 4)[..., 3] >= 128
    np.testing.assert_array_equal(brush_rle.decode(rle, height, width), want)


@pytest.mark.parametrize(
    "bad", [[], [0] * 4, [1, 2, 300], ["a"], None, BRUSH["rle"]["sky"][:40], BRUSH["rle"]["noise"]]
)
def test_a_damaged_brush_is_refused(bad: Any) -> None:
    with pytest.raises(Refused) as caught:
        brush_rle.decode(bad, *TRUTH.shape)
    assert caught.value.code == "bad-rle"


def region(label: str, kind: str = "rectanglelabels", size: tuple[int, int] = (4, 10), **value: Any) -> dict[str, Any]:
    return {
        "type": kind, "original_height": size[0], "original_width": size[1], "image_rotation": 0,
        "value": {**value, kind: [label]},
    }  # fmt: skip


def rows(x: int, width: int, label: str) -> dict[str, Any]:
    """A rectangle over whole columns of a picture 10 wide."""
    return region(label, x=10 * x, y=0, width=10 * width, height=100, rotation=0)


def task(*annotations: dict[str, Any], image: str = "/data/upload/3/0a1b2c3d-a.png", **more: Any) -> dict[str, Any]:
    return {"id": 7, "data": {"image": image}, "annotations": list(annotations), "predictions": [], **more}


def parsed(tmp_path: Path, *tasks: Any) -> list[pictures.Picture]:
    (tmp_path / "export.json").write_text(json.dumps(list(tasks)))
    return labelstudio.load(tmp_path / "export.json")


def painted(tmp_path: Path, *annotations: dict[str, Any]) -> np.ndarray:
    (picture,) = parsed(tmp_path, task(*annotations))
    return pictures.paint(picture, pictures.class_ids(NAMES), max_pixels=10**6)


def test_percent_of_the_image_and_later_over_earlier(tmp_path: Path) -> None:
    result = [rows(0, 6, "wall"), rows(2, 2, "floor"), rows(3, 5, "sky")]
    assert painted(tmp_path, {"result": result})[0].tolist() == [1, 1, 2, 0, 0, 0, 0, 0, 255, 255]
    points = [[10, 0], [40, 0], [40, 50], [10, 50]]
    polygon = painted(tmp_path, {"result": [region("wall", "polygonlabels", points=points)]})
    assert np.argwhere(polygon == 1).tolist() == [[r, c] for r in (0, 1) for c in (1, 2, 3)]
    about_the_corner = painted(tmp_path, {"result": [region("wall", x=50, y=0, width=20, height=25, rotation=90)]})
    assert np.argwhere(about_the_corner == 1).tolist() == [[0, 4], [1, 4]]
    disc = painted(tmp_path, {"result": [region("wall", "ellipselabels", x=50, y=50, radiusX=20, radiusY=50)]})
    assert np.argwhere(disc == 1).tolist() == [
        [0, 4],
        [0, 5],
        *([r, c] for r in (1, 2) for c in range(3, 7)),
        [3, 4],
        [3, 5],
    ]


def test_the_newest_annotation_counts_unless_cancelled_or_ground_truth_says_otherwise(tmp_path: Path) -> None:
    old = {"id": 1, "updated_at": "2026-01-01T00:00:00Z", "result": [rows(0, 10, "sky")]}
    new = {"id": 2, "updated_at": "2026-02-01T00:00:00Z", "result": [rows(0, 10, "wall")]}
    newest = {"id": 3, "updated_at": "2026-03-01T00:00:00Z", "result": [rows(0, 10, "lamp")], "was_cancelled": True}
    assert painted(tmp_path, new, old, newest)[0, 0] == 1
    assert painted(tmp_path, new, {**old, "ground_truth": True}, newest)[0, 0] == 0
    assert not parsed(tmp_path, task(newest))[0].shapes
    assert not parsed(tmp_path, {**task(), "predictions": [new]})[0].shapes


def test_a_brush_drawn_with_plain_labels_has_its_label_in_the_twin(tmp_path: Path) -> None:
    value = {"format": "rle", "rle": brush_rle.encode(TRUTH == 1)}
    size = {"original_height": TRUTH.shape[0], "original_width": TRUTH.shape[1]}
    twins = [
        {"type": "brush", "value": value, **size},
        {"type": "labels", "value": {**value, "labels": ["wall"]}, **size},
    ]
    np.testing.assert_array_equal(painted(tmp_path, {"result": twins}) == 1, TRUTH == 1)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("/data/upload/3/0a1b2c3d-a%20b.png", "a b.png"),
        ("upload/3/0a1b2c3d-a.png", "upload/3/0a1b2c3d-a.png"),
        ("/data/local-files/?d=label_next/images/e1m1/003.png", "label_next/images/e1m1/003.png"),
        ("/data/local-files/?d=x%2Fa%20b%23.png", "x/a b#.png"),
        ("s3://bucket/night/a.png", "night/a.png"),
        ("https://host/night/a.png?token=1", "night/a.png"),
        ("deadbeef-a.png", "deadbeef-a.png"),
        ("data:image/png;base64,AAAA", ""),
    ],
)
def test_image_names(reference: str, name: str) -> None:
    assert labelstudio.image_name(reference) == name


def test_a_bad_region_refuses_its_task_alone(tmp_path: Path) -> None:
    turned = {**rows(0, 1, "sky"), "image_rotation": 90}
    bad = [
        [turned], [region("sky", x="a", y=0, width=1, height=1)],
        [region("sky", "polygonlabels", points=[[1, 2], [3], [4, 5]])],
        [rows(0, 1, "sky"), {**rows(0, 1, "sky"), "original_width": 11}],
        [{**rows(0, 1, "sky"), "original_width": None}], [region("sky", "brushlabels", format="png", rle=[1])],
        [rows(0, 1, "sly")],
    ]  # fmt: skip
    codes = []
    for picture in parsed(tmp_path, *(task({"result": result}) for result in bad)):
        with pytest.raises(Refused) as caught:
            pictures.paint(picture, pictures.class_ids(NAMES), max_pixels=10**6)
        codes.append(caught.value.code)
    assert codes == ["bad-shape", "bad-shape", "bad-shape", "bad-shape", "bad-shape", "bad-rle", "unknown-class"]


@pytest.mark.parametrize(
    "text", ["{", "{}", "[1]", '[{"image": "a.png", "label": []}]', "[" * 100_000, "[" * 80 + "]" * 80]
)
def test_what_is_no_export_is_refused_whole(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=r"a\.json"):
        labelstudio.load(tmp_path / "a.json")


def submitted(path: Path) -> None:
    """What a user does who accepts every prediction: the region lists become annotations."""
    tasks = json.loads(path.read_text())
    for one in tasks:
        one["annotations"] = [{"id": 1, "result": p["result"]} for p in one.pop("predictions")]
    path.write_text(json.dumps(tasks))


def test_every_pixel_comes_back_as_it_was_written(tmp_path: Path) -> None:
    label = ragged(61, 83, 4, 2)
    label[10:14, 3:50] = 255
    items = [Item("e1m1/a b#1.png", "ab" * 32, b"", 61, 83, label), Item("x.png", "cd" * 32, b"", 5, 4, None)]
    assert labelstudio.write(tmp_path / "tasks.json", items, CLASSES, "next/images", "m1") == 2
    submitted(tmp_path / "tasks.json")
    first, second = labelstudio.load(tmp_path / "tasks.json")
    assert (first.name, first.id) == ("next/images/e1m1/a b#1.png", "ab" * 32)
    np.testing.assert_array_equal(pictures.paint(first, pictures.class_ids(NAMES), max_pixels=10**6), label)
    assert not second.shapes


def test_the_configuration_names_every_class_and_ignore() -> None:
    classes = [*CLASSES, {"id": 4, "name": 'a "b" & <c>', "color": [1, 2, 3]}]
    root = ElementTree.fromstring(labelstudio.config_xml(classes))
    for tag in ("BrushLabels", "PolygonLabels"):
        labels = [(e.get("value"), e.get("background")) for e in root.find(tag)]
        assert labels[1] == ("wall", "#2809c8")
        assert labels[4:] == [('a "b" & <c>', "#010203"), ("ignore", "#e0e0c0")]


def test_a_folder_with_images_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((4, 10, 3), np.uint8)).save(tmp_path / "images/a.png")
    (tmp_path / "e.json").write_text(json.dumps([task({"result": [rows(0, 4, "wall"), rows(4, 2, "sky")]})]))
    data = tiny_settings.data(source="labelstudio", path=str(tmp_path), unannotated="background")
    source = labelstudio.read(tmp_path, data, max_pixels=10**6)
    assert [c["name"] for c in source.classes] == ["background", "sky", "wall"]
    assert [name for name, _ in source.files] == ["images/a.png", "masks/a.png"]
    got = label_maps.decode_mask(source.files[1][1](), max_pixels=10**6)
    assert got[0].tolist() == [2, 2, 2, 2, 1, 1, 0, 0, 0, 0]


def source_of(root: Path, *results: dict[str, Any], data: dict[str, str] | None = None, **settings: Any) -> Source:
    """images/a.png, 10 x 4 pixels, and one task."""
    (root / "images").mkdir(exist_ok=True)
    Image.fromarray(np.zeros((4, 10, 3), np.uint8)).save(root / "images/a.png")
    one = task({"result": list(results)})
    (root / "e.json").write_text(json.dumps([one | ({"data": data} if data else {})]))
    return labelstudio.read(root, tiny_settings.data(source="labelstudio", **settings), max_pixels=10**6)


def mask_of(source: Source) -> np.ndarray:
    return label_maps.decode_mask(dict(source.files)["masks/a.png"](), max_pixels=10**6)


def bitmask(pixels_HWC: np.ndarray, **changes: Any) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(pixels_HWC).save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return region("wall", "bitmasklabels", **({"imageDataURL": url} | changes))


def test_a_bitmask_is_painted_where_it_is_opaque(tmp_path: Path) -> None:
    pixels_HWC = np.zeros((4, 10, 4), np.uint8)
    pixels_HWC[1:3, 2:5] = 255
    ids_HW = mask_of(source_of(tmp_path, bitmask(pixels_HWC)))
    np.testing.assert_array_equal(ids_HW == 0, pixels_HWC[..., 3] > 0)
    ids_HW = mask_of(source_of(tmp_path, bitmask(pixels_HWC[..., :3])))
    np.testing.assert_array_equal(ids_HW == 0, pixels_HWC[..., 0] > 0)


@pytest.mark.parametrize("changes", [{"imageDataURL": "http://x/a.png"}, {"imageDataURL": "data:image/png;base64,!"}])
def test_a_bitmask_that_cannot_be_read_refuses_the_mask(tmp_path: Path, changes: dict[str, str]) -> None:
    source = source_of(tmp_path, bitmask(np.zeros((4, 10, 4), np.uint8), **changes))
    with pytest.raises(Refused, match="bitmask"):
        mask_of(source)
    smaller = source_of(tmp_path, bitmask(np.full((3, 10, 4), 255, np.uint8)))
    with pytest.raises(Refused, match="10 x 3 on an image of 10 x 4"):
        mask_of(smaller)


def test_regions_without_label_and_points_are_counted_or_refuse_the_mask(tmp_path: Path) -> None:
    nameless = rows(4, 2, "sky") | {"id": "n1", "type": "rectangle"}
    nameless["value"] = {k: v for k, v in nameless["value"].items() if k != "rectanglelabels"}
    point = {**region("sky", "keypointlabels", x=1, y=1, width=0.3), "id": "p1"}
    drawn = {**rows(0, 4, "wall"), "id": "w1"}
    source = source_of(tmp_path, drawn, nameless, point)
    assert mask_of(source)[0].tolist() == [0] * 4 + [255] * 6
    assert [name for _, name in source.skipped] == ["region n1 of a.png", "region p1 of a.png"]

    source = source_of(tmp_path, drawn, nameless, unannotated="background")
    assert [(name, code) for name, code, _ in source.refused] == [("masks/a.png", "shape-without-area")]


def test_the_text_that_an_image_answers_to_is_its_name(tmp_path: Path) -> None:
    data = {"caption": "a car", "img": "/data/upload/1/24e3f2d0-a.png"}
    assert mask_of(source_of(tmp_path, rows(0, 4, "wall"), data=data))[0, 0] == 0
    windows = {"image": "/data/local-files/?d=myfiles\\dataset1\\a.png"}
    assert mask_of(source_of(tmp_path, rows(0, 4, "wall"), data=windows))[0, 0] == 0


def test_an_empty_annotation_is_background_where_the_settings_say_so(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("background\nwall\n")
    ids_HW = mask_of(source_of(tmp_path, unannotated="background", no_shapes="background"))
    assert ids_HW.shape == (4, 10)
    assert not ids_HW.any()


def test_macos_own_files_beside_the_export_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "images/a.png")
    region = {"points": [[0, 0], [100, 0], [100, 100]], "polygonlabels": ["wall"]}
    result = [{"original_width": 2, "original_height": 2, "value": region}]
    (tmp_path / "export.json").write_text(
        json.dumps([{"data": {"image": "a.png"}, "annotations": [{"result": result}]}])
    )
    (tmp_path / "._export.json").write_bytes(b"mac")
    source = labelstudio.read(tmp_path, tiny_settings.data(source="labelstudio"), max_pixels=99)
    assert "masks/a.png" in dict(source.files)


def test_two_uploads_of_one_file_name_are_told_apart_by_what_stands_before_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    tasks = []
    for number, name in enumerate(("aaaaaaaa-001.png", "bbbbbbbb-001.png")):
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "images" / name)
        region = {"points": [[0, 0], [100, 0], [100, 100]], "polygonlabels": [f"class {number}"]}
        result = [{"original_width": 2, "original_height": 2, "value": region}]
        tasks.append({"data": {"image": f"/data/upload/1/{name}"}, "annotations": [{"result": result}]})
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    source = labelstudio.read(tmp_path, tiny_settings.data(source="labelstudio"), max_pixels=99)
    assert {name for name, _ in source.files if name.startswith("masks/")} == {
        "masks/aaaaaaaa-001.png",
        "masks/bbbbbbbb-001.png",
    }
    assert not source.refused


def test_an_export_of_predictions_alone_says_that_they_are_no_labels(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(json.dumps([{"data": {"image": "a.png"}, "predictions": [{"result": []}]}]))
    with pytest.raises(SourceError, match="1 tasks and not one that somebody submitted; predictions"):
        labelstudio.read(tmp_path, tiny_settings.data(source="labelstudio"), max_pixels=99)
