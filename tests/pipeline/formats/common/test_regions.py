"""Cutting a label map into regions, against a flood fill; painting it together again."""

import numpy as np
import pytest

from pipeline.formats.common import annotations, regions
from tests.support.synthetic_masks import regions as ragged


def flood(label: np.ndarray) -> list[tuple[int, frozenset]]:
    """(id, pixels) of every 4-connected region, by a stack."""
    left = {(r, c) for r in range(label.shape[0]) for c in range(label.shape[1])}
    found = []
    while left:
        todo, mine = [left.pop()], set()
        value = int(label[todo[0]])
        while todo:
            r, c = todo.pop()
            mine.add((r, c))
            for place in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if place in left and label[place] == value:
                    left.remove(place)
                    todo.append(place)
        found.append((value, frozenset(mine)))
    return found


def pixels(patch: annotations.Patch) -> frozenset:
    rows, columns = np.nonzero(patch.mask_HW)
    return frozenset(zip((rows + patch.top).tolist(), (columns + patch.left).tolist(), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_large_regions_stand_alone_and_specks_of_a_class_together(seed: int) -> None:
    label = ragged(19 + seed, 31, 4, seed)
    label[5:8] = 255
    got = [(value, pixels(patch)) for value, patch in regions.regions(label, 12)]
    wanted = flood(label)
    alone = [(v, p) for v, p in wanted if len(p) >= 12]
    specks = {v: frozenset().union(*(p for w, p in wanted if w == v and len(p) < 12)) for v, _ in wanted}
    together = [(v, p) for v, p in specks.items() if p]
    assert len(together) >= 2
    assert set(got) == set(alone + together)
    assert len(got) == len(alone) + len(together)
    assert [v for v, _ in got] == sorted(v for v, _ in got)


def test_a_spiral_is_one_region_and_touching_corners_are_two() -> None:
    spiral = np.zeros((9, 9), np.uint8)
    spiral[0], spiral[:, 8], spiral[8], spiral[2:, 0], spiral[2, :7], spiral[2:7, 6], spiral[6, 2:7] = [1] * 7
    assert [v for v, _ in regions.regions(spiral, 2)].count(1) == 1
    corners = np.kron(np.eye(2, dtype=np.uint8), np.ones((4, 4), np.uint8))
    assert [v for v, _ in regions.regions(corners, 16)] == [0, 0, 1, 1]


def test_a_row_end_does_not_touch_the_next_row() -> None:
    label = np.zeros((2, 6), np.uint8)
    label[0, 4:], label[1, :2] = 1, 1
    assert [pixels(p) for v, p in regions.regions(label, 1) if v == 1] == [{(0, 4), (0, 5)}, {(1, 0), (1, 1)}]


def shape(label: str, top: int, left: int, mask: list, level: int = 0) -> annotations.Shape:
    return annotations.Shape(label, lambda height, width: annotations.Patch(top, left, np.array(mask, bool)), level)


def test_a_higher_level_lies_on_top_and_of_equal_ones_the_later() -> None:
    drawn = [
        shape("high", 0, 1, [[1, 1]], level=2),
        shape("low", 0, 0, [[1, 1], [1, 1]], level=-1),
        shape("first", 1, 0, [[1, 1, 1]]),
        shape("second", 1, 1, [[0, 1]]),
    ]
    ids = {"low": 0, "first": 1, "second": 2, "high": 3}
    got = annotations.paint(annotations.Picture("x", 2, 4, drawn), ids, max_pixels=8)
    assert got.tolist() == [[0, 3, 3, 255], [1, 1, 2, 255]]
    assert annotations.paint(annotations.Picture("x", 2, 4, drawn), ids, max_pixels=8, unannotated=7)[0, 3] == 7


def test_unknown_classes_are_named_with_the_nearest_known_one() -> None:
    drawn = [shape("raod", 0, 0, [[1]]), shape("zzz", 0, 0, [[1]])]
    with pytest.raises(
        annotations.Refused, match=r"2 unknown classes: 'raod' \(did you mean 'road'\?\), 'zzz' \(known:"
    ) as e:
        annotations.paint(annotations.Picture("x", 2, 2, drawn), annotations.class_ids(["road", "sky"]), max_pixels=4)
    assert e.value.code == "unknown-class"
    with pytest.raises(annotations.Refused) as e:
        annotations.paint(annotations.Picture("x", 10**6, 10**6, []), {}, max_pixels=4)
    assert e.value.code == "too-many-pixels"


def test_the_ignore_label_is_the_first_name_that_is_no_class() -> None:
    assert annotations.ignore_name(["sky"]) == "ignore"
    assert annotations.ignore_name(["ignore", "sky"]) == "void"
    assert annotations.class_ids(["ignore", "sky"]) == {"ignore": 0, "sky": 1, "void": 255}
    assert annotations.ignore_label(["sky", "ignore", "void"]) == "void"
    assert annotations.ignore_label(["sky", "void"], ["sky", "void"]) is None
    assert annotations.ignore_label(["sky"]) is None


def test_turning_goes_clockwise_as_seen() -> None:
    """A bar to the right of its centre, turned by 90 degrees, hangs below it."""
    bar = annotations.turned(annotations.rectangle(2, 2, 5, 3), 90, (2.5, 2.5))
    patch = annotations.polygon(bar, 6, 6)
    assert pixels(patch) == {(2, 2), (3, 2), (4, 2)}
    ring = annotations.ellipse(8, 5, 6.2, 3.1)
    rows, columns = np.mgrid[:12, :16]
    inside = ((columns + 0.5 - 8) / 6.2) ** 2 + ((rows + 0.5 - 5) / 3.1) ** 2 < 1
    assert pixels(annotations.polygon(ring, 12, 16)) == pixels(annotations.Patch(0, 0, inside))


def test_what_leaves_the_image_is_cut_off() -> None:
    assert pixels(annotations.polygon([[-5, -5], [2, -5], [2, 1], [-5, 1]], 4, 4)) == {(0, 0), (0, 1)}
    assert pixels(annotations.polygon([[9, 9], [12, 9], [12, 12]], 4, 4)) == frozenset()
