"""What masks hold, and when pull stops because nothing can come of them."""

import numpy as np
import pytest

from pipeline.formats.common.source import SourceError
from pipeline.imaging import label_maps
from pipeline.ingest import label_counts

CLASSES = [{"id": 0, "name": "sky"}, {"id": 1, "name": "wall"}]


def counted(*masks: list[list[int]], classes: int = 2) -> label_counts.LabelCounts:
    counts = label_counts.LabelCounts(classes)
    for number, mask in enumerate(masks):
        counts.add(f"m{number}", label_maps.encode_png(np.array(mask, np.uint8)), 1 << 20)
    return counts


def test_shares_are_of_the_labelled_pixels_and_ignored_ones_of_all() -> None:
    counts = counted([[0, 0, 1, 255]], [[0, 255, 255, 255]])

    assert counts.shares(CLASSES) == [
        ("pixels: sky", "75.00 %"),
        ("pixels: wall", "25.00 %"),
        ("pixels: ignored", "50.00 % of all"),
    ]
    assert counts.usable == 2


def test_masks_that_cannot_be_used_are_remembered_with_their_reason() -> None:
    counts = counted([[0, 7]], [[255, 255]])
    counts.add("broken", b"no picture", 1 << 20)

    assert counts.usable == 0
    assert [name for name, _ in counts.refused] == ["m0", "m1", "broken"]
    assert counts.refused[0][1] == "ids outside 0..1: 7"


def test_no_image_and_no_label_stop_with_the_first_three_reasons() -> None:
    many = [(f"x{n}", f"reason {n}") for n in range(5)]
    with pytest.raises(SourceError, match=r"src: not one image can be used \(5 refused\):\n  x0: reason 0\n.*\n  x2"):
        label_counts.demand_images(0, many, "src")
    with pytest.raises(SourceError, match="src: not one label can be used"):
        label_counts.demand_labels(counted(), [], "src")
    label_counts.demand_images(1, many, "src")
    label_counts.demand_labels(counted([[0, 1]]), many, "src")


def test_ids_from_one_are_explained() -> None:
    with pytest.raises(SourceError, match="run from 1 to 2, and 2 classes have the ids 0 to 1: put a line for id 0"):
        label_counts.demand_labels(counted([[1, 2]]), [], "src")


def test_a_listed_class_without_a_pixel_stops_unless_that_is_allowed() -> None:
    absent = counted([[0, 0]]).absent(CLASSES)

    assert absent == ["wall"]
    with pytest.raises(SourceError, match=r"'wall' of classes\.txt: it cannot be learnt.*missing_classes: allow"):
        label_counts.demand_classes(absent, "classes.txt", "stop", "src")
    label_counts.demand_classes(absent, "classes.txt", "allow", "src")
    label_counts.demand_classes(absent, None, "stop", "src")
    label_counts.demand_classes([], "classes.txt", "stop", "src")
