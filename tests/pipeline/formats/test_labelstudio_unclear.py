"""Label Studio tasks that several people annotated, and regions with several labels: said, and never settled in silence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.formats import labelstudio
from pipeline.formats.common.source import Source
from pipeline.imaging.decode import Refused
from tests.support import tiny_labels, tiny_source


def rectangle(*labels: str, x: float = 0, which: str = "r1", kind: str = "rectanglelabels") -> dict[str, Any]:
    value = {"x": x, "y": 0, "width": 40, "height": 100, "rotation": 0, kind: list(labels)}
    return {"id": which, "original_width": 10, "original_height": 4, "type": kind, "value": value}


def annotation(number: int, *results: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": number, "updated_at": f"2026-01-0{number}", "result": list(results), **more}


def read(root: Path, *annotations: dict[str, Any], **data: Any) -> Source:
    tiny_source.put(root, "images/a.png", tiny_source.encode(np.zeros((4, 10, 3), np.uint8)))
    tasks = [{"id": 7, "data": {"image": "a.png"}, "annotations": list(annotations)}]
    tiny_source.put(root, "export.json", json.dumps(tasks).encode())
    return tiny_labels.read(labelstudio.read, root, "labelstudio", **data)


def reason(source: Source) -> str:
    content = tiny_labels.content(source)["masks/a.png"]
    assert isinstance(content, Refused)
    return str(content)


def test_an_empty_annotation_after_a_full_one_refuses_the_mask(tmp_path: Path) -> None:
    source = read(tmp_path, annotation(1, rectangle("cat")), annotation(2))

    assert reason(source) == (
        "annotation 2 is empty and came after 1, which has regions; delete one, or mark the right one as ground truth"
    )


@pytest.mark.parametrize("settings", [{}, {"unannotated": "background", "no_shapes": "background"}])
def test_the_mark_of_ground_truth_settles_it(tmp_path: Path, settings: dict[str, str]) -> None:
    full, empty = annotation(1, rectangle("cat")), annotation(2)
    tiny_source.put(tmp_path, "classes.txt", b"background\ncat\n")
    kept = tiny_labels.labels(read(tmp_path, {**full, "ground_truth": True}, empty, **settings))
    assert kept["a"][0, 0] == 1

    source = read(tmp_path, full, {**empty, "ground_truth": True}, **settings)
    erased = tiny_labels.labels(source)
    assert not erased["a"].any() if settings else not erased
    assert [name for kind, name in source.skipped if "later one" in kind] == ["annotation 1 of a.png"]


def test_a_cancelled_empty_annotation_does_not_count(tmp_path: Path) -> None:
    found = tiny_labels.labels(read(tmp_path, annotation(1, rectangle("cat")), annotation(2, was_cancelled=True)))
    assert found["a"][0, 0] == 0


def test_the_last_of_two_full_ones_counts_and_the_other_is_counted(tmp_path: Path) -> None:
    source = read(tmp_path, annotation(2, rectangle("dog")), annotation(1, rectangle("cat")))

    assert [c["name"] for c in source.classes] == ["dog"]
    assert [name for kind, name in source.skipped if "later one" in kind] == ["annotation 1 of a.png"]


def test_a_region_with_two_labels_refuses_the_mask(tmp_path: Path) -> None:
    assert reason(read(tmp_path, annotation(1, rectangle("cat", "dog")))) == (
        "region r1 has the labels 'cat', 'dog'; leave it one"
    )


def test_the_second_label_may_stand_in_a_twin_of_the_region(tmp_path: Path) -> None:
    twins = [rectangle("cat"), rectangle("dog", kind="labels")]
    assert "'cat', 'dog'" in reason(read(tmp_path, annotation(1, *twins)))

    same = [rectangle("cat"), rectangle("cat", kind="labels")]
    assert tiny_labels.labels(read(tmp_path, annotation(1, *same)))["a"][0, 0] == 0
