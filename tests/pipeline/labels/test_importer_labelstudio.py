"""Label Studio exports brought back: what is unclear is refused by the source's own rule, what is left out is counted."""

import json
from pathlib import Path
from typing import Any

from tests.support.label_project import add, codes


def rectangle(*labels: str) -> dict[str, Any]:
    value = {"x": 0, "y": 0, "width": 40, "height": 100, "rotation": 0, "rectanglelabels": list(labels)}
    return {"id": "r1", "original_width": 64, "original_height": 48, "type": "rectanglelabels", "value": value}


def annotation(number: int, *results: dict[str, Any]) -> dict[str, Any]:
    return {"id": number, "updated_at": f"2026-01-0{number}", "result": list(results)}


def test_import_refuses_them_by_the_same_rule_and_counts_what_it_leaves_out(root: Path) -> None:
    line = rectangle("wall") | {"id": "line", "value": {"points": [[0, 0], [1, 1]], "polygonlabels": ["wall"]}}
    tasks = [
        {"id": 1, "data": {"image": "u/00.png"}, "annotations": [annotation(1, rectangle("wall")), annotation(2)]},
        {"id": 2, "data": {"image": "u/01.png"}, "annotations": [annotation(1, rectangle("wall", "sky"))]},
        {"id": 3, "data": {"image": "a/00.png"}, "annotations": [annotation(1, rectangle("wall"), line)]},
    ]
    Path("back.json").write_text(json.dumps(tasks))
    result = add(Path("back.json"))

    assert codes(result) == {"u/00.png": "bad-shape", "u/01.png": "bad-shape"}
    assert result.taken == 1
    assert result.passed_over == [("shape-without-area", "region line of a/00.png")]


def test_a_label_that_is_not_quite_a_class_is_that_class_and_it_is_reported(root: Path) -> None:
    tasks = [
        {"id": 1, "data": {"image": "u/00.png"}, "annotations": [annotation(1, rectangle("Wall "))]},
        {"id": 2, "data": {"image": "u/01.png"}, "annotations": [annotation(1, rectangle("wal"))]},
    ]
    Path("back.json").write_text(json.dumps(tasks))
    result = add(Path("back.json"))

    assert result.taken == 1
    assert codes(result) == {"u/01.png": "unknown-class"}
    assert result.forgiven == [("spelling of a class", "'Wall ' of u/00.png is 'wall'")]
