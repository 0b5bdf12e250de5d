"""Cityscapes trees: the published table, both kinds of ids, cities as groups, dummy test labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.formats import cityscapes
from pipeline.formats.common.source import Source, SourceError
from tests.support import tiny_labels, tiny_source
from tests.support.tiny_labels import GOLDEN, png

AACHEN, BOCHUM = "train/aachen/aachen_000000_000019", "train/bochum/bochum_000000_000600"
VAL, TEST = "val/lindau/lindau_000000_000019", "test/berlin/berlin_000000_000019"
# cityscapesscripts' trainId2label, by hand: trainId -> id
PUBLISHED = dict(enumerate((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)))


def read(root: Path, **data: Any) -> Source:
    return tiny_labels.read(cityscapes.read, root, "cityscapes", **data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    every = np.append(np.arange(34), 255).astype(np.uint8).reshape(5, 7)
    for key in (AACHEN, BOCHUM, VAL, TEST):
        tiny_source.put(tmp_path, f"leftImg8bit/{key}_leftImg8bit.png", b"x")
        tiny_source.put(tmp_path, f"gtFine/{key}_gtFine_labelIds.png", png(every))
        for other in ("color", "instanceIds"):
            tiny_source.put(tmp_path, f"gtFine/{key}_gtFine_{other}.png", b"not to be read")
    return tmp_path


def test_label_ids_become_train_ids_by_the_published_table(root: Path) -> None:
    label = tiny_labels.labels(read(root))[AACHEN].ravel()
    for number in range(34):
        assert label[number] == {k: v for v, k in PUBLISHED.items()}.get(number, 255)
    assert label[34] == 255  # license plate, -1
    assert [c["id"] for c in cityscapes.CLASSES] == list(range(19))
    assert [c["name"] for c in cityscapes.CLASSES][:3] == ["road", "sidewalk", "building"]


def test_datumaro_s_export(tmp_path: Path) -> None:
    """Its label ids have Cityscapes' order; what is not drawn is 0, unlabeled."""
    found = tiny_labels.labels(read(GOLDEN / "cityscapes"))
    assert sorted(found) == ["val/deep/two", "val/one"]
    for name, label_HW in found.items():
        drawn_HW = tiny_labels.golden(f"cityscapes/truth/{name.removeprefix('val/').replace('/', '_')}.png")
        expected_HW = np.select([drawn_HW == 7, drawn_HW == 25], [0, 12], 255)  # road, rider; parking is not evaluated
        assert {7, 9, 25} <= set(np.unique(drawn_HW))
        np.testing.assert_array_equal(label_HW, expected_HW)


def test_cities_are_groups_and_test_dummies_are_left_out(root: Path) -> None:
    source = read(root)
    assert source.groups == {AACHEN: "aachen", BOCHUM: "bochum", VAL: "lindau"}
    assert source.lists == {"labelled": None, "unlabelled": None, "val": None, "test": [VAL]}
    assert not any("berlin" in name for name, _ in source.files)


def test_train_ids_are_packed_as_they_are_where_they_exist(root: Path) -> None:
    ids_HW = np.array([[0, 18, 255]], np.uint8)
    path = tiny_source.put(root, f"gtFine/{AACHEN}_gtFine_labelTrainIds.png", png(ids_HW))
    source = read(root)
    assert (f"masks/{AACHEN}.png", path) in source.files
    assert source.notes[:2] == ["gtFine labelTrainIds: 1 masks", "gtFine labelIds: 2 masks"]
    assert sorted(tiny_labels.labels(read(root, cityscapes_ids="trainIds"))) == [AACHEN]
    assert tiny_labels.labels(read(root, cityscapes_ids="labelIds"))[AACHEN].shape == (5, 7)


def test_train_ids_taken_for_label_ids_are_refused(root: Path) -> None:
    tiny_source.put(root, f"gtFine/{AACHEN}_gtFine_labelIds.png", png(np.array([[34]], np.uint8)))
    assert tiny_labels.refusals(read(root)) == {f"masks/{AACHEN}.png": "mask-class-id"}


def test_coarse_labels_and_train_extra(root: Path) -> None:
    extra = "train_extra/augsburg/augsburg_000000_000000"
    tiny_source.put(root, f"leftImg8bit/{extra}_leftImg8bit.png", b"x")
    tiny_source.put(root, f"gtCoarse/{extra}_gtCoarse_labelIds.png", png(np.full((2, 2), 7, np.uint8)))
    assert extra not in tiny_labels.labels(read(root))
    assert f"images/{extra}.png" in dict(read(root).files)
    assert list(tiny_labels.labels(read(root, annotations="gtCoarse"))) == [extra]


def test_unimatch_s_lists_name_the_images(root: Path) -> None:
    pair = f"leftImg8bit/{BOCHUM}_leftImg8bit.png gtFine/{BOCHUM}_gtFine_labelTrainIds.png\n"
    (root / "labeled.txt").write_text(pair)
    assert read(root, lists={"labelled": "labeled.txt"}).lists["labelled"] == [BOCHUM]


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gtFine: no \*_gtFine_labelTrainIds\.png"):
        read(root, cityscapes_ids="trainIds")
    with pytest.raises(SourceError, match="no leftImg8bit/SPLIT/CITY"):
        read(root / "gtFine")
    (root / "classes.txt").write_text("road\nrest\n")
    with pytest.raises(SourceError, match="mapped to the 19 published classes"):
        read(root)


def test_a_single_city_is_no_group(tmp_path: Path) -> None:
    for frame in range(3):
        stem = f"train/aachen/aachen_{frame:06d}_000019"
        tiny_source.put(tmp_path, f"leftImg8bit/{stem}_leftImg8bit.png", b"x")
        tiny_source.put(tmp_path, f"gtFine/{stem}_gtFine_labelTrainIds.png", png(np.zeros((2, 2), np.uint8)))
    assert len(set((read(tmp_path).groups or {}).values())) == 3
