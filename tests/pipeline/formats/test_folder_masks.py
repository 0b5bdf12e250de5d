"""What a folder's masks say: ids, colours, a palette, or a file for each class."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.formats import folder
from pipeline.formats.common.source import Source, SourceError
from pipeline.imaging import label_maps
from pipeline.imaging.decode import Refused
from tests.support import tiny_labels, tiny_source
from tests.support.tiny_labels import palette_png, png

COLOURS = [(10, 20, 30), (200, 0, 0), (0, 0, 200)]
IDS_HW = np.array([[0, 1, 2, 2], [0, 1, 1, 255], [0, 0, 255, 255]], np.uint8)
CLASSES = "sky 10 20 30\nwall 200 0 0\nfloor 0 0 200\n"


def coloured(ids_HW: np.ndarray, void: tuple[int, int, int] = label_maps.IGNORE_COLOUR) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[:3], table[255] = COLOURS, void
    return table[ids_HW]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/00", "a/01", "b"):
        tiny_source.put(tmp_path, f"images/{name}.png", tiny_source.encode(tiny_source.picture(1, *IDS_HW.shape)))
    (tmp_path / "classes.txt").write_text(CLASSES)
    return tmp_path


def read(root: Path, **data: Any) -> Source:
    return tiny_labels.read(folder.read, root, "folder", **data)


def whole_palette(void: tuple[int, int, int] = label_maps.IGNORE_COLOUR) -> list[tuple[int, int, int]]:
    return [*COLOURS, *[(0, 0, 0)] * 252, void]


def test_a_palette_is_read_as_indices_whatever_it_shows(root: Path) -> None:
    """Opened as RGB, these would be colours of no class, or of other classes."""
    strange = [(7, 7, 7), (8, 8, 8), (9, 9, 9)] + [(1, 1, 1)] * 253
    data = palette_png(IDS_HW, strange)
    tiny_source.put(root, "masks/a/00.png", data)
    source = read(root)
    assert tiny_labels.content(source)["masks/a/00.png"] == data
    np.testing.assert_array_equal(tiny_labels.labels(source)["a/00"], IDS_HW)
    assert source.notes == ["masks: ids (found by looking)"]


def test_a_palette_that_agrees_with_its_indices_is_packed_as_it_is(root: Path) -> None:
    path = tiny_source.put(root, "masks/b.png", palette_png(IDS_HW, whole_palette()))
    assert ("masks/b.png", path) in read(root).files


def test_a_palette_whose_indices_are_no_ids_counts_by_its_colours(root: Path) -> None:
    moved = [(0, 0, 0)] * 10 + COLOURS + [label_maps.IGNORE_COLOUR] * 243
    tiny_source.put(root, "masks/b.png", palette_png(np.where(IDS_HW == 255, 99, IDS_HW + 10), moved))
    source = read(root)
    np.testing.assert_array_equal(tiny_labels.labels(source)["b"], IDS_HW)
    assert source.notes == ["masks: colours (found by looking)"]


def test_a_palette_that_could_mean_either_is_asked_about(root: Path) -> None:
    turned = palette_png(IDS_HW, [COLOURS[1], COLOURS[2], COLOURS[0], *whole_palette()[3:]])
    tiny_source.put(root, "masks/b.png", turned)
    with pytest.raises(SourceError, match=r"masks/b\.png.*different classes; set data\.masks"):
        read(root)
    np.testing.assert_array_equal(tiny_labels.labels(read(root, masks="ids"))["b"], IDS_HW)
    by_colour = np.array([1, 2, 0], np.uint8)[np.minimum(IDS_HW, 2)]
    by_colour[IDS_HW == 255] = 255
    np.testing.assert_array_equal(tiny_labels.labels(read(root, masks="colours"))["b"], by_colour)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_become_ids(root: Path, mode: str) -> None:
    (root / "classes.txt").write_text(CLASSES + "ignore 1 2 3\n")
    if mode == "P":  # in an order that means nothing
        data = palette_png(np.where(IDS_HW == 255, 0, 3 - IDS_HW), [(1, 2, 3), *COLOURS[::-1]])
    else:
        data = png(np.asarray(Image.fromarray(coloured(IDS_HW, void=(1, 2, 3))).convert(mode)))
    tiny_source.put(root, "masks/a/00.png", data)
    tiny_source.put(root, "masks/b.png", png(coloured(IDS_HW)))  # VOC's cream means ignore without being told
    source = read(root, masks="colours")
    np.testing.assert_array_equal(tiny_labels.labels(source)["a/00"], IDS_HW)
    np.testing.assert_array_equal(tiny_labels.labels(source)["b"], IDS_HW)


def test_a_colour_of_no_class_refuses_its_mask_alone(root: Path) -> None:
    alien = coloured(IDS_HW)
    alien[0, 0] = (11, 20, 30)
    tiny_source.put(root, "masks/a/00.png", png(alien))
    tiny_source.put(root, "masks/b.png", png(coloured(IDS_HW)))
    source = read(root)
    assert source.notes == ["masks: colours (found by looking)"]
    assert tiny_labels.refusals(source) == {"masks/a/00.png": "unknown-colour"}


def test_transparent_pixels_are_ignored_and_half_transparent_ones_refused(root: Path) -> None:
    rgba = np.dstack([coloured(np.minimum(IDS_HW, 2)), np.where(IDS_HW == 255, 0, 255)]).astype(np.uint8)
    tiny_source.put(root, "masks/a/00.png", png(rgba))
    rgba[0, 0, 3] = 128
    tiny_source.put(root, "masks/b.png", png(rgba))
    source = read(root)
    content = tiny_labels.content(source)
    np.testing.assert_array_equal(tiny_labels.pixels(content["masks/a/00.png"]), IDS_HW)
    assert tiny_labels.refusals(source) == {"masks/b.png": "rgb-mask"}
    assert source.tally["colour masks with transparent pixels (ignored)"] == 2  # rendered twice


def test_transparent_pixels_are_ignored_also_where_a_class_has_the_colour_of_ignore(root: Path) -> None:
    (root / "classes.txt").write_text("sky 224 224 192\nwall 200 0 0\n")
    rgba = np.array([[[224, 224, 192, 255], [200, 0, 0, 255], [200, 0, 0, 0]]], np.uint8)
    tiny_source.put(root, "masks/b.png", png(rgba))
    assert tiny_labels.labels(read(root))["b"].tolist() == [[0, 1, 255]]


def test_mixed_or_unexplained_masks_are_asked_about(root: Path) -> None:
    tiny_source.put(root, "masks/a/00.png", png(coloured(IDS_HW)))
    with pytest.raises(SourceError, match="only a class file says what they mean"):
        read(root, classes=None)
    tiny_source.put(root, "masks/b.png", png(IDS_HW))
    with pytest.raises(SourceError, match=r"b\.png holds class ids but .*00\.png colours"):
        read(root)
    (root / "classes.txt").write_text("sky 1 1 1\nwall 1 1 1\n")
    with pytest.raises(SourceError, match="two classes have the colour 1 1 1"):
        read(root, masks="colours")


@pytest.mark.parametrize("text", ["ignore 0 0 0\nsky\n", "sky\nignore\n"])
def test_ignore_lines_stand_last_and_have_a_colour(root: Path, text: str) -> None:
    (root / "classes.txt").write_text(text)
    with pytest.raises(SourceError, match=r"line \d.*ignore"):
        read(root)


PARTS = {"sky": IDS_HW == 0, "wall": (IDS_HW == 1) | (IDS_HW == 2), "floor": IDS_HW == 2}


@pytest.mark.parametrize("layout", ["masks/{name}/{what}.png", "masks/{what}/{name}.png", "masks/{name}_{what}.png"])
@pytest.mark.parametrize("inside", [1, 255, "P", "1", "RGB"])
def test_one_file_per_class_in_each_layout(root: Path, layout: str, inside: int | str) -> None:
    for name in ("a/00", "b"):
        for what, part_HW in PARTS.items():
            if isinstance(inside, int):
                data = png(part_HW.astype(np.uint8) * np.uint8(inside))
            elif inside == "P":
                data = palette_png(part_HW, [(255, 255, 255), (0, 0, 0)])  # shown inverted: the index counts
            else:
                picture = Image.fromarray(part_HW.astype(np.uint8) * np.uint8(255)).convert(inside)
                picture.save(root / "one.png")
                data = (root / "one.png").read_bytes()
            tiny_source.put(root, layout.format(name=name, what=what), data)
    source = read(root)
    assert source.notes[0] == "masks: binary, one file per class (found by looking)"
    found = tiny_labels.labels(source)
    assert sorted(found) == ["a/00", "b"]
    for label_HW in found.values():
        np.testing.assert_array_equal(label_HW, IDS_HW)  # the floor lies on the wall: the later class counts
    assert source.tally["binary masks with overlapping classes (the later one counts)"] == 2
    assert source.tally["pixels in more than one class"] == 2 * (IDS_HW == 2).sum()


def test_the_class_list_s_order_decides_an_overlap(root: Path) -> None:
    (root / "classes.txt").write_text("sky\nfloor\nwall\n")
    for what, part_HW in PARTS.items():
        tiny_source.put(root, f"masks/b/{what}.png", png(part_HW.astype(np.uint8)))
    expected = np.where(np.isin(IDS_HW, (1, 2)), 2, IDS_HW)
    np.testing.assert_array_equal(tiny_labels.labels(read(root))["b"], expected)


def test_pixels_in_no_class_are_ignored_or_background(root: Path) -> None:
    for what in ("sky", "wall"):
        tiny_source.put(root, f"masks/{what}/b.png", png(PARTS[what].astype(np.uint8)))
    with pytest.raises(SourceError, match=r"classes\.txt: .*needs a class named background"):
        read(root, unannotated="background")
    source = read(root, classes=None, unannotated="background")
    assert [c["name"] for c in source.classes] == ["background", "sky", "wall"]
    expected = np.where(IDS_HW == 255, 0, np.where(IDS_HW == 0, 1, 2))
    np.testing.assert_array_equal(tiny_labels.labels(source)["b"], expected)


def test_broken_parts_refuse_the_whole_mask(root: Path) -> None:
    three = np.array([[0, 1, 2]], np.uint8)
    tiny_source.put(root, "masks/a/00/sky.png", png(three))
    tiny_source.put(root, "masks/a/01/sky.png", png(np.ones((3, 4), np.uint8)))
    tiny_source.put(root, "masks/a/01/wall.png", png(np.ones((4, 3), np.uint8)))
    tiny_source.put(root, "masks/b/sky.png", png(np.ones((3, 4), np.uint8)))
    tiny_source.put(root, "masks/b/ski.png", png(np.ones((3, 4), np.uint8)))
    assert tiny_labels.refusals(read(root)) == {
        "masks/a/00.png": "binary-mask",
        "masks/a/01.png": "mask-size",
        "masks/b/ski.png": "mask-without-image",
    }


def ingested(root: Path, project: Path, **data: Any) -> dict[str, dict[str, Any]]:
    tiny_source.write_project(project, root, data)
    assert tiny_source.run(project, upto="ingest") == 0
    return tiny_source.quarantine(project, "data/ingested/base/quarantine.json")


def test_255_and_65535_are_ignored_and_minus_one_is_refused_with_the_way_out(root: Path, tmp_path: Path) -> None:
    wide = np.where(IDS_HW == 255, 65535, IDS_HW).astype(np.uint16)
    tiny_source.put(root, "masks/a/00.png", png(wide))
    signed = np.where(IDS_HW == 255, -1, IDS_HW)
    for name, kind in (("a/01", np.int32), ("b", np.float32)):
        Image.fromarray(signed.astype(kind)).save(tiny_source.put(root, f"masks/{name}.tif", b""))
    quarantine = ingested(root, tmp_path / "project")
    assert {name: item["code"] for name, item in quarantine.items()} == dict.fromkeys(
        ("a/01", "b"), "unsupported-depth"
    )
    for item in quarantine.values():
        assert "-1 as 255" in item["reason"]
        assert item["kept"]


def test_refused_masks_reach_the_quarantine_list(root: Path, tmp_path: Path) -> None:
    """Their images stay as unlabelled ones, except where a list needs the mask; classes and sources are named."""
    alien = coloured(IDS_HW)
    alien[0, 0] = (11, 20, 30)
    for name in ("a/00", "a/01"):
        tiny_source.put(root, f"masks/{name}.png", png(alien))
    tiny_source.put(root, "masks/b.png", png(coloured(IDS_HW)))
    (root / "val.txt").write_text("a/01\n")
    project = tmp_path / "project"
    quarantine = ingested(root, project, lists={"val": "val.txt"}, masks="colours")
    assert {name: (item["code"], item["kept"]) for name, item in quarantine.items()} == {
        "a/00": ("unknown-colour", True),
        "a/01": ("unknown-colour", False),
    }
    about = json.loads((project / "data/pulled/source.json").read_text())
    assert [name for name, _, _ in about["refused"]] == ["masks/a/00.png", "masks/a/01.png"]


def test_masks_of_0_and_255_are_two_classes_where_the_list_has_two(root: Path) -> None:
    (root / "classes.txt").write_text("background\nobject\n")
    for name in ("a/00", "b"):
        tiny_source.put(root, f"masks/{name}.png", png(np.where(IDS_HW == 1, 255, 0).astype(np.uint8)))
    source = read(root)
    np.testing.assert_array_equal(tiny_labels.labels(source)["b"], IDS_HW == 1)
    assert any("0 is the first, 255 the second" in note for note in source.notes)

    (root / "classes.txt").write_text(CLASSES)  # three classes: 255 means ignore
    assert set(np.unique(tiny_labels.labels(read(root))["b"])) == {0, 255}
    (root / "classes.txt").write_text("background\nobject\n")
    tiny_source.put(
        root, "masks/a/01.png", png(np.full(IDS_HW.shape, 1, np.uint8))
    )  # one mask of ids: ids they all are
    assert set(np.unique(tiny_labels.labels(read(root))["b"])) == {0, 255}


def test_masks_by_other_names_are_matched_and_reported(root: Path) -> None:
    data = png(IDS_HW)
    for name in ("a/00_mask.png", "A/01.PNG", "b.png.png"):
        tiny_source.put(root, f"masks/{name}", data)
    tiny_source.put(root, "masks/c.png", data)
    source = read(root, masks="ids")
    assert sorted(tiny_labels.labels(source)) == ["a/00", "a/01", "b"]
    assert len([note for note in source.notes if note.startswith("masks matched to images by")]) == 3
    assert source.refused == [("masks/c.png", "mask-without-image", "no image has this name")]


def test_a_suffix_of_all_masks_is_no_class(root: Path) -> None:
    for name in ("a/00", "a/01", "b"):
        tiny_source.put(root, f"masks/{name}_mask.png", png(IDS_HW % 2))
    source = read(root, classes=None)
    assert [c["name"] for c in source.classes] == ["class_0", "class_1"]
    assert "masks: ids (found by looking)" in source.notes


def test_two_masks_of_one_image_are_both_refused(root: Path) -> None:
    for name in ("b.png", "b.bmp"):
        tiny_source.put(root, f"masks/{name}", png(IDS_HW))
    source = read(root)
    assert "b" not in tiny_labels.labels(source)
    assert len(source.refused) == 2
    assert all("keep the right one" in reason for _, _, reason in source.refused)


def two_classes(root: Path, classes: str = "background\ncrack\n", **masks: np.ndarray) -> Source:
    (root / "classes.txt").write_text(classes)
    for name, mask in masks.items():
        tiny_source.put(root, f"images/{name}.png", tiny_source.encode(tiny_source.picture(1, *IDS_HW.shape)))
        tiny_source.put(root, f"masks/{name}.png", png(mask))
    return read(root)


WHITE_HW = np.where(IDS_HW > 0, 255, 0).astype(np.uint8)


def test_one_smoothed_mask_does_not_turn_the_white_of_all_others_into_ignore(root: Path) -> None:
    source = two_classes(root, c=WHITE_HW, d=WHITE_HW, smoothed=np.where(IDS_HW == 1, 254, WHITE_HW).astype(np.uint8))
    files = dict(source.files)
    for name in ("c", "d"):
        np.testing.assert_array_equal(label_maps.decode_mask(files[f"masks/{name}.png"](), max_pixels=99), IDS_HW > 0)
    with pytest.raises(Refused, match="this one also 254"):
        files["masks/smoothed.png"]()


def test_a_mask_with_the_second_class_says_that_255_is_ignore(root: Path) -> None:
    source = two_classes(root, c=WHITE_HW, d=np.where(IDS_HW == 2, 1, WHITE_HW).astype(np.uint8))
    assert all(isinstance(origin, Path) for _, origin in source.files)


def test_one_class_and_masks_of_0_and_255_name_the_missing_line(root: Path) -> None:
    with pytest.raises(SourceError, match="put a line for what is 0, such as `background`"):
        two_classes(root, "crack\n", c=WHITE_HW)


def test_black_and_white_in_colours_are_two_classes_that_state_none(root: Path) -> None:
    source = two_classes(root, c=np.repeat(WHITE_HW[..., None], 3, axis=2))
    np.testing.assert_array_equal(tiny_labels.labels(source)["c"], IDS_HW > 0)
    stated = two_classes(root, "background 0 0 9\ncrack 9 0 0\n", c=np.repeat(WHITE_HW[..., None], 3, axis=2))
    with pytest.raises(Refused, match=r"end that file with `ignore 0 0 0`"):
        dict(stated.files)["masks/c.png"]()


def test_folders_of_binary_masks_name_classes_in_any_case(root: Path) -> None:
    (root / "classes.txt").write_text("sky\nwall\n")
    tiny_source.put(root, "masks/Sky/b.png", png(np.where(IDS_HW == 0, 255, 0).astype(np.uint8)))
    tiny_source.put(root, "masks/WALL/b.png", png(np.where(IDS_HW == 1, 255, 0).astype(np.uint8)))
    np.testing.assert_array_equal(tiny_labels.labels(read(root))["b"], np.where(IDS_HW < 2, IDS_HW, 255))


def benign(root: Path, images: list[str], masks: dict[str, np.ndarray], classes: str = "tissue\ntumour\n") -> Source:
    """Images 4 x 3 by name, and masks by name."""
    for number, name in enumerate(images):
        tiny_source.put(root, f"images/{name}", tiny_source.encode(tiny_source.picture(number, 3, 4)))
    for name, ids_HW in masks.items():
        tiny_source.put(root, f"masks/{name}", png(ids_HW))
    (root / "classes.txt").write_text(classes)
    return read(root)


LEFT_HW, RIGHT_HW = (np.array([row] * 3, np.uint8) for row in ([1, 1, 0, 0], [0, 0, 0, 1]))


@pytest.mark.parametrize("white", [1, 255])
def test_numbered_masks_of_one_image_are_united_where_there_is_one_class(tmp_path: Path, white: int) -> None:
    """As BUSI has them: a second tumour of the picture is in a mask of its own."""
    masks = {"b (1)_mask.png": LEFT_HW * white, "b (1)_mask_1.png": RIGHT_HW * white, "b (2)_mask.png": LEFT_HW * white}
    source = benign(tmp_path, ["b (1).png", "b (2).png"], masks)

    found = tiny_labels.labels(source)
    np.testing.assert_array_equal(found["b (1)"], [[1, 1, 0, 1]] * 3)
    np.testing.assert_array_equal(found["b (2)"], LEFT_HW)
    said = "of 1 images, the first: b (1).png has b (1)_mask.png, b (1)_mask_1.png"
    assert f"numbered masks united, as there is one class: {said}" in source.notes
    assert not source.refused


def test_numbered_masks_of_several_classes_are_not_united(tmp_path: Path) -> None:
    masks = {"a_mask.png": LEFT_HW, "a_mask_1.png": 2 * RIGHT_HW, "b_mask.png": LEFT_HW}
    source = benign(tmp_path, ["a.png", "b.png"], masks, "tissue\ntumour\nbone\n")

    np.testing.assert_array_equal(tiny_labels.labels(source)["a"], LEFT_HW)
    assert [(name, code) for name, code, _ in source.refused] == [("masks/a_mask_1.png", "mask-without-image")]


def test_a_mask_of_two_images_that_differ_in_extension_is_refused(tmp_path: Path) -> None:
    """x.png may be the mask of either; the alphabet must not decide."""
    source = benign(tmp_path, ["x.jpg", "x.png", "y.jpg"], {"x.png": LEFT_HW, "y.png": LEFT_HW})

    assert sorted(tiny_labels.labels(source)) == ["y"]
    assert source.refused == [("masks/x.png", "duplicate-name", "x is there as x.jpg, x.png; keep the right one")]


def test_folders_that_are_not_read_are_named_and_ground_truth_is_masks(tmp_path: Path) -> None:
    tiny_source.put(tmp_path, "imgs/a.png", tiny_source.encode(tiny_source.picture(0, 3, 4)))
    tiny_source.put(tmp_path, "GT/a.png", png(LEFT_HW))
    tiny_source.put(tmp_path, "extra/b.png", png(LEFT_HW))
    (tmp_path / "classes.txt").write_text("tissue\ntumour\n")
    source = read(tmp_path)

    assert list(tiny_labels.labels(source)) == ["a"]
    assert ("folder beside images/, not read", "extra/") in source.skipped
