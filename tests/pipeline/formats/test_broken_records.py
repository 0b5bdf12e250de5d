"""COCO run lengths with a wrong total, polygons with NaN or two points, 10 MB of JSON nesting: the record is
quarantined, the parser is bounded, and the good labels beside it are used."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.formats import coco, labelme
from pipeline.formats.coco import masks
from pipeline.formats.common import parsing, rasterize
from pipeline.formats.common.source import SourceError
from pipeline.imaging import decode
from tests.support import tiny_labels, tiny_source

BOX = [0, 0, 30, 0, 30, 20, 0, 20]
GOOD = {"category_id": 1, "segmentation": [BOX]}
BROKEN = {
    "wrong total": ({"size": [48, 64], "counts": [0, 48, 24]}, "bad-rle"),
    "wrong total, compressed": ({"size": [48, 64], "counts": "0`1h0"}, "bad-rle"),
    "negative run": ({"size": [48, 64], "counts": [48 * 64 + 5, -5]}, "bad-rle"),
    "rows and columns swapped": ({"size": [64, 48], "counts": [0, 48 * 64]}, "bad-rle"),
    "a bomb of run lengths": ({"size": [10**6, 10**6], "counts": [0, 10**12]}, "too-many-pixels"),
    "no counts": ({"size": [48, 64]}, "bad-rle"),
    "NaN": ([[0, 0, 9, float("nan"), 9, 9]], "bad-polygon"),
    "infinite": ([[0, 0, 9, float("inf"), 9, 9]], "bad-polygon"),
    "two points": ([[0, 0, 9, 9]], "shape-without-area"),
    "an odd number": ([[0, 0, 9, 9, 5, 5, 5]], "bad-polygon"),
    "words": ([["a", "b", "c", "d", "e", "f"]], "bad-polygon"),
    "a good and a broken polygon": ([BOX, [0, 0, 9, 9, 5, 5, 5]], "bad-polygon"),
    "nothing": ([], "shape-without-area"),
    "null": (None, "shape-without-area"),
}


def tree(root: Path, annotations: list[Any]) -> Path:
    for n, name in enumerate(("good", "bad")):
        tiny_source.put(root, f"images/{name}.png", tiny_source.encode(tiny_source.picture(n + 1)))
    document = {
        "images": [
            {"id": n, "file_name": f"{name}.png", "width": 64, "height": 48} for n, name in ((1, "good"), (2, "bad"))
        ],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": annotations,
    }
    tiny_source.put(root, "annotations/labels.json", json.dumps(document).encode())
    return root


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_a_broken_record_costs_its_own_mask(tmp_path: Path, what: str) -> None:
    """A half painted mask would be a wrong label, so the good annotation of the same image goes too."""
    segmentation, code = BROKEN[what]
    bad = [GOOD | {"image_id": 2}, {"id": 77, "image_id": 2, "category_id": 1, "segmentation": segmentation}]
    root, project = tree(tmp_path / "source", [GOOD | {"image_id": 1}, *bad]), tmp_path / "project"
    tiny_source.write_project(project, root, {"source": "coco", "unannotated": "background"})
    assert tiny_source.run(project, upto="ingest") == 0
    quarantine = tiny_source.quarantine(project, "data/ingested/base/quarantine.json")
    assert {name: (item["code"], item["kept"]) for name, item in quarantine.items()} == {"bad": (code, True)}
    assert "annotation 77" in quarantine["bad"]["reason"]
    rows = {row.name: row for row in tiny_source.rows(project, "data/ingested/base/rows.parquet").values()}
    assert rows["good"].mask_shard is not None
    assert rows["bad"].mask_shard is None


def test_a_zigzag_is_refused_before_it_fills_the_memory() -> None:
    """300 kB of text that cross 20,000 rows 30,000 times."""
    zigzag = np.array([(n % 64, 20_000 * (n % 2)) for n in range(30_000)], float)
    tracemalloc.start()
    with pytest.raises(decode.Refused, match="crosses rows 600000000 times"):
        rasterize.fill([zigzag], 20_000, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_annotations_beyond_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MAX_HELD", 5 * 30 * 20)
    root = tree(tmp_path, [GOOD | {"image_id": n} for n in (1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2)])
    assert tiny_labels.refusals(tiny_labels.read(coco.read, root, "coco")) == {"masks/bad.png": "label-file"}


@pytest.mark.parametrize("annotation", [7, None, {}, {"image_id": 99}, {"image_id": [1]}, {"image_id": True}, []])
def test_an_annotation_of_no_image_is_listed(tmp_path: Path, annotation: Any) -> None:
    source = tiny_labels.read(coco.read, tree(tmp_path, [GOOD | {"image_id": 1}, annotation]), "coco")
    assert [code for _, code, _ in source.refused] == ["label-without-image"]
    assert "annotations[1]" in source.refused[0][0]
    assert list(tiny_labels.labels(source)) == ["good"]


@pytest.mark.parametrize("annotation", [{"category_id": 9}, {"category_id": {}}, {"category_id": "one"}, {}])
def test_an_unknown_category_refuses_the_mask(tmp_path: Path, annotation: dict[str, Any]) -> None:
    root = tree(tmp_path, [GOOD | {"image_id": 1}, {"image_id": 2, "segmentation": [BOX]} | annotation])
    assert tiny_labels.refusals(tiny_labels.read(coco.read, root, "coco")) == {"masks/bad.png": "label-file"}


@pytest.mark.parametrize(
    "size", [(0, 5), (-4, 5), (10**6, 10**6), ("a", 5), (float("nan"), 5), (2.5, 4), (None, None), (10**400, 5)]
)
def test_a_stated_size_is_checked_before_memory_is_taken(tmp_path: Path, size: tuple[Any, Any]) -> None:
    root = tree(tmp_path, [GOOD | {"image_id": 1}])
    document = json.loads((root / "annotations/labels.json").read_text())
    document["images"][0] |= {"height": size[0], "width": size[1]}
    (root / "annotations/labels.json").write_text(json.dumps(document))
    source = tiny_labels.read(coco.read, root, "coco")
    tracemalloc.start()
    codes = set(tiny_labels.refusals(source).values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes <= {"label-file", "too-many-pixels", "corrupt"}
    assert codes
    assert peak < 4 << 20


NESTED = {
    "10 MB of lists": b"[" * 10_000_000,
    "10 MB of objects": b'{"a":' * 2_000_000,
    "closed": b"[" * 5_000_000 + b"]" * 5_000_000,
    "just too deep": b"[" * 70 + b"]" * 70,
}


@pytest.mark.parametrize("what", sorted(NESTED))
def test_deep_nesting_is_a_named_error(tmp_path: Path, what: str) -> None:
    path = tiny_source.put(tmp_path, "annotations/labels.json", NESTED[what])
    with pytest.raises(SourceError, match=r"labels\.json: JSON nested deeper than 64 levels"):
        parsing.read_json(path)
    tiny_source.put(tmp_path, "images/a.png", b"x")
    with pytest.raises(SourceError, match=r"labels\.json"):
        tiny_labels.read(coco.read, tmp_path, "coco")


def test_what_is_no_deeper_is_read(tmp_path: Path) -> None:
    path = tiny_source.put(tmp_path, "x.json", b"[" * 64 + b"]" * 64)
    assert parsing.read_json(path)


def test_a_file_over_its_cap_is_not_opened(tmp_path: Path) -> None:
    path = tiny_source.put(tmp_path, "x.json", b"[1, 2, 3]")
    with pytest.raises(SourceError, match=r"9 bytes of JSON, over the limit of 8"):
        parsing.read_json(path, max_bytes=8)


def test_one_bad_labelme_file_costs_its_own_mask(tmp_path: Path) -> None:
    triangle = {"label": "cat", "points": [[0, 0], [9, 0], [9, 9]]}
    documents_by_name = {
        "good": json.dumps({"shapes": [triangle], "imageHeight": 9, "imageWidth": 9}).encode(),
        "bad": b'{"shapes": ' + b"[" * 10_000_000,
        "cut": b'{"shapes": [{"label": "cat", "poi',
    }
    for name, data in documents_by_name.items():
        tiny_source.put(tmp_path, f"{name}.png", b"x")
        tiny_source.put(tmp_path, f"{name}.json", data)
    source = tiny_labels.read(labelme.read, tmp_path, "labelme")
    assert tiny_labels.refusals(source) == {"masks/bad.png": "label-file", "masks/cut.png": "label-file"}
    assert np.unique(tiny_labels.pixels(tiny_labels.content(source)["masks/good.png"])).tolist() == [0, 255]
    assert len([name for name, _ in source.files if name.startswith("images/")]) == 3
