"""What is written for other programs, read back by our readers: every class id and every ignored pixel."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import paths
from pipeline.formats import coco, cvat, labelstudio, voc
from pipeline.formats.coco import writer
from pipeline.formats.common import annotations
from pipeline.formats.common.task import Item
from pipeline.imaging import label_maps
from pipeline.labels import exporter
from pipeline.storage import manifest, predictions, shards
from tests.support import tiny_settings, tiny_source
from tests.support.command_line import marginalia
from tests.support.synthetic_masks import regions as ragged

GOLDEN = Path(__file__).parents[2] / "golden/label_tools"
TRUTH = np.asarray(Image.open(GOLDEN / "cvat/truth.png"))
CLASSES = [{"id": k, "name": n, "color": [50 * k, 9, 200]} for k, n in enumerate(("sky", "wall", "floor", "lamp"))]
LABEL = ragged(41, 30, 4, 5)
LABEL[3:9, 20:] = 255
PICTURE = tiny_source.picture(1, 41, 30)
ITEMS = [
    Item("0a-x.png", "0a", tiny_source.encode(PICTURE), 41, 30, LABEL),
    Item("1b-y.jpg", "1b", tiny_source.encode(PICTURE, "JPEG"), 41, 30, np.where(LABEL == 255, 255, 3 - LABEL)),
    Item("2c-z.png", "2c", tiny_source.encode(PICTURE), 41, 30, None),
]


def rendered(source: object) -> dict[str, np.ndarray]:
    out = {}
    for name, origin in source.files:
        if name.startswith("masks/"):
            data = origin.read_bytes() if isinstance(origin, Path) else origin()
            out[name.removeprefix("masks/")] = label_maps.decode_mask(data, max_pixels=10**6)
    return out


def same(source: object) -> None:
    assert source.classes == CLASSES or [c["name"] for c in source.classes] == [c["name"] for c in CLASSES]
    assert sorted(name for name, _ in source.files if name.startswith("images/")) == [f"images/{i.name}" for i in ITEMS]
    found = rendered(source)
    assert sorted(found) == ["0a-x.png", "1b-y.png"]
    for item in ITEMS[:2]:
        np.testing.assert_array_equal(found[item.name[:4] + ".png"], item.label_HW)


def test_coco_comes_back_as_it_was(tmp_path: Path) -> None:
    assert coco.write(tmp_path / "c", ITEMS, CLASSES) == 3
    same(coco.read(tmp_path / "c", tiny_settings.data(source="coco"), max_pixels=10**6))
    whole = json.loads((tmp_path / "c/annotations/instances_default.json").read_text())
    assert [c["id"] for c in whole["categories"]] == [1, 2, 3, 4]
    for one in whole["annotations"]:
        rows, columns = np.nonzero(ITEMS[one["image_id"] - 1].label_HW == one["category_id"] - 1)
        x, y, w, h = one["bbox"]
        assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
        assert (one["area"], one["iscrowd"]) == (len(rows), 0)
    assert len({one["id"] for one in whole["annotations"]}) == len(whole["annotations"]) == 8


def test_cocos_run_lengths_are_pycocotools_own() -> None:
    """Column by column: TRUTH is no square, so by rows nothing would fit."""
    counts = json.loads((GOLDEN / "coco/counts.json").read_text())
    for one in writer.annotations(TRUTH, 1, 1):
        assert one["segmentation"] == {"size": [24, 33], "counts": counts[CLASSES[one["category_id"] - 1]["name"]]}


def test_voc_comes_back_as_it_was(tmp_path: Path) -> None:
    splits = {"0a": "labelled", "1b": "test", "2c": "unlabelled"}
    assert voc.write(tmp_path / "v", ITEMS, CLASSES, splits) == 3
    source = voc.read(tmp_path / "v", tiny_settings.data(source="voc"), max_pixels=10**6)
    same(source)
    assert source.classes == CLASSES
    assert source.lists["test"] == ["1b-y"]
    with Image.open(tmp_path / "v/SegmentationClass/0a-x.png") as mask:
        assert mask.mode == "P"
        colours = np.asarray(mask.convert("RGB"))
    wanted = np.array([c["color"] for c in CLASSES] + [label_maps.IGNORE_COLOUR])[np.where(LABEL == 255, 4, LABEL)]
    np.testing.assert_array_equal(colours, wanted)


def test_voc_gives_classes_of_one_colour_different_ones(tmp_path: Path) -> None:
    grey = [{**c, "color": [7, 7, 7]} for c in CLASSES]
    voc.write(tmp_path / "v", ITEMS, grey)
    same(voc.read(tmp_path / "v", tiny_settings.data(source="voc"), max_pixels=10**6))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two labelled images, one with a hidden label and a pre-label, one with neither."""
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 2, "h": 1, "u": 1, "v": 1, "t": 1}, {"a", "h", "v", "t"})
    parts = {"labelled": ["a/00", "a/01"], "unlabelled": ["h/00", "u/00"], "val": ["v/00"], "test": ["t/00"]}
    for part, names in parts.items():
        (source / f"{part}.txt").write_text("\n".join(names))
    tiny_source.write_project(root, source, {"lists": {part: f"{part}.txt" for part in parts}})
    assert tiny_source.run(root) == 0
    hidden = tiny_source.rows(root)["base/h/00"]
    shards.write_tar(root / predictions.PRELABELS, [(f"{hidden.id}.png", label_maps.encode_png(tiny_source.mask(7)))])
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize("form", exporter.FORMATS)
def test_labels_and_pre_labels_but_no_hidden_ones(form: str, root: Path) -> None:
    out = Path("out.zip" if form == "cvat" else "out")
    splits = ["--split", "labelled", "--split", "unlabelled"]
    for _ in range(2):  # a second time replaces the first
        assert marginalia("export-labels", "--format", form, "-o", str(out), *splits) == 0
    rows = {f"{r.id[:12]}": r for r in manifest.read(paths.SPLIT_MANIFEST)}
    if form == "cvat":
        ids = {n: k for k, n in enumerate(tiny_source.CLASSES)} | {"ignore": 255}
        found = {p.name: annotations.paint(p, ids, max_pixels=10**6) for p in cvat.load(out)[1] if p.shapes}
    elif form == "labelstudio":
        tasks = json.loads((out / "tasks.json").read_text())
        for task in tasks:
            assert (out.parent / labelstudio.image_name(task["data"]["image"])).exists()
        tasks = [{**t, "annotations": t["predictions"]} for t in tasks]
        (root / "t.json").write_text(json.dumps(tasks))
        ids = {n: k for k, n in enumerate(tiny_source.CLASSES)} | {"ignore": 255}
        found = {
            Path(p.name).name: annotations.paint(p, ids, max_pixels=10**6)
            for p in labelstudio.load(root / "t.json")
            if p.shapes
        }
    else:
        reader = {"coco": coco, "voc": voc}[form]
        found = rendered(reader.read(out, tiny_settings.data(source=form), max_pixels=10**6))
    got = {rows[name[:12]].name: label for name, label in found.items()}
    assert sorted(got) == ["a/00", "a/01", "h/00"]
    np.testing.assert_array_equal(got["h/00"], tiny_source.mask(7))
    for name in ("a/00", "a/01"):
        np.testing.assert_array_equal(got[name], manifest.open_mask(tiny_source.rows(root)[f"base/{name}"], 10**6))


def test_an_empty_project_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_settings.write(tmp_path / "params.yaml")
    for words in (("export-labels", "--format", "coco", "-o", "out"), ("import-labels", "back.xml")):
        assert marginalia(*words) == 1
        assert "run `dvc repro`" in capsys.readouterr().err


def test_a_folder_with_other_files_is_not_replaced(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_source.put(root, "out/thesis.tex", b"years of work")
    assert marginalia("export-labels", "--format", "coco", "-o", "out") == 1
    assert "name a new folder" in capsys.readouterr().err
    assert (root / "out/thesis.tex").exists()
    assert marginalia("export-labels", "--format", "voc", "-o", "out/thesis.tex") == 1
    assert (root / "out/thesis.tex").read_bytes() == b"years of work"
    for room, form in (("images", "coco"), ("JPEGImages", "voc"), ("annotations", "coco")):
        tiny_source.put(root, f"{form}-{room}/{room}/2007_000033.jpg", b"a data set with the same folders")
        assert marginalia("export-labels", "--format", form, "-o", f"{form}-{room}") == 1
        assert (root / f"{form}-{room}/{room}/2007_000033.jpg").exists()
    assert marginalia("export-labels", "--format", "coco", "-o", "new", "--split", "unused") == 1
    assert "no image in unused" in capsys.readouterr().err
