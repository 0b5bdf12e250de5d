"""pull packs a folder byte for byte and says what it means; the real photographs go through every data stage."""

import json
import os
from pathlib import Path

import pytest
import yaml

from pipeline import config
from pipeline.formats import looks_like
from pipeline.ingest import pull
from pipeline.storage import shards
from tests.support import tiny_labels, tiny_source


def test_a_folder_is_packed_byte_for_byte_and_always_the_same(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 3, "b": 2}, masked={"a"})
    tiny_source.write_project(root, source, {"group": "^([a-z])/"})
    packed = []
    for _ in range(2):
        assert tiny_source.run(root, upto="pull") == 0
        packed.append((root / "data/pulled/base.tar").read_bytes())
    assert packed[0] == packed[1]
    archive = root / "data/pulled/base.tar"
    found = {m.name: shards.read(archive, m.offset, m.length) for m in shards.members(archive)}
    on_disk = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*.png")}
    assert found == on_disk
    about = json.loads((root / "data/pulled/source.json").read_text())
    assert about["source"] == "folder"
    assert about["ignore"] == 255
    assert about["groups"]["b/01"] == "b"
    assert [c["name"] for c in about["classes"]] == list(tiny_source.CLASSES)
    assert list((root / "data/offered").iterdir()) == []


def test_a_wrong_source_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_source.write_project(tmp_path / "project", tmp_path / "nowhere")
    assert tiny_source.run(tmp_path / "project", upto="pull") == 1
    assert "no such folder or archive" in capsys.readouterr().err
    assert not (tmp_path / "project/data/pulled").exists()


def test_real_photographs_go_through_every_data_stage(shared_data: Path, tmp_path: Path) -> None:
    """Twelve training, four val and four test pictures of CamVid with the lists of its 1/8 split."""
    camvid, source, root = shared_data / "camvid", tmp_path / "source", tmp_path / "project"
    lists = {"labelled": "splits/seed0/1_8/labeled.txt", "unlabelled": "splits/seed0/1_8/unlabeled.txt"}
    lists |= {"val": "val.txt", "test": "test.txt"}
    for part, (name, count) in zip(lists, zip(lists.values(), (4, 8, 4, 4), strict=True), strict=True):
        ids = (camvid / name).read_text().split()
        chosen = ids[:: len(ids) // count][:count]
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("\n".join(chosen))
        for key in chosen:
            tiny_source.put(source, f"images/{key}.jpg", (camvid / f"images/{key}.jpg").read_bytes())
            if part != "unlabelled":
                tiny_source.put(source, f"masks/{key}.png", (camvid / f"masks/{key}.png").read_bytes())
    (source / "classes.txt").write_bytes((camvid / "classes.txt").read_bytes())
    tiny_source.write_project(root, source, {"lists": lists})
    assert yaml.safe_load((root / "params.yaml").read_text())["data"]["lists"] == lists
    assert tiny_source.run(root) == 0
    summary = tiny_source.summary(root)
    assert summary["counts"] == {"labelled": 4, "unlabelled": 8, "val": 4, "test": 4, "unused": 0}
    assert summary["missing"] == {"labelled": ["bicyclist"], "val": [], "test": []}  # four pictures are few
    assert all(row.width == 480 and row.height == 360 for row in tiny_source.rows(root).values())
    assert tiny_source.quarantine(root) == {}


def test_the_table_says_what_was_decided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_source.write_project(tmp_path / "project", tiny_labels.GOLDEN / "voc", {"source": "voc"})
    assert tiny_source.run(tmp_path / "project", upto="pull") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "pull: voc" in said
    assert "masks: colours" in said
    assert "3: background, cat, dog" in said
    assert "2 test" in said


def test_a_format_without_a_reader_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_source.write_project(tmp_path, tmp_path, {"source": "vocc"})
    assert tiny_source.run(tmp_path, upto="pull") == 1
    assert "data.source: Input should be 'demo', 'folder', 'voc'" in capsys.readouterr().err


def test_every_source_of_the_settings_has_a_reader() -> None:
    stated = set(config.Data.model_fields["source"].annotation.__args__)
    assert stated - {"demo"} == pull.READERS.keys()


def test_params_yaml_and_the_settings_agree_on_what_there_is() -> None:
    """Every key of data is in the project's own params.yaml, so that a user finds it there."""
    text = (Path(__file__).parents[3] / "params.yaml").read_text()
    assert yaml.safe_load(text)["data"].keys() == config.Data.model_fields.keys()


def test_a_name_that_is_no_utf8_costs_its_own_file(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 2, "b": 2, "c": 2})
    with open(os.fsencode(source / "images/a") + b"/caf\xe9.png", "wb") as file:  # noqa: PTH123  # a path of bytes
        file.write(tiny_source.encode(tiny_source.picture(77)))
    tiny_source.write_project(root, source)
    assert tiny_source.run(root) == 0
    found = tiny_source.quarantine(root)
    assert found["images/a/caf\ufffd.png"]["code"] == "bad-name"
    assert len(tiny_source.rows(root)) == 6


def test_a_source_that_stops_says_what_was_decided_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 2, "b": 2}, masked=set())
    tiny_source.put(source, "masks/a/00.txt", b"not a mask")
    tiny_source.write_project(root, source)
    assert tiny_source.run(root, upto="pull") == 1
    error = capsys.readouterr().err
    assert "not one label can be used" in error
    assert "passed over: no image (.txt): 1, the first: masks/a/00.txt" in error


TASK = json.dumps([{"id": 1, "data": {"image": "a.png"}, "annotations": [{"id": 1, "result": []}]}])
LABELME = json.dumps(
    {"version": "5", "flags": {}, "shapes": [], "imagePath": "a.png", "imageHeight": 4, "imageWidth": 4}
)
COCO = json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []})


@pytest.mark.parametrize(
    ("source", "file", "content", "said"),
    [
        ("coco", "export.json", TASK, "this looks like a Label Studio export: set data.source: labelstudio"),
        ("coco", "images/a.json", LABELME, "this looks like labelme's files: set data.source: labelme"),
        ("folder", "annotations/instances.json", COCO, "this looks like COCO data: set data.source: coco"),
        (
            "coco",
            "annotations.xml",
            "<annotations></annotations>",
            "this looks like a CVAT export: set data.source: cvat",
        ),
        ("labelme", "JPEGImages/a.jpg", "", "this looks like a Pascal VOC tree: set data.source: voc"),
        ("coco", "leftImg8bit/train/x/a.png", "", "this looks like a Cityscapes tree: set data.source: cityscapes"),
        ("folder", "labels/a.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5", "labels/a.txt and its like look like YOLO's labels"),
        ("folder", "data.zip", "PK", "data.zip lies in it packed: unpack it, or name it in data.path"),
    ],
)
def test_a_source_of_another_format_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, file: str, content: str, said: str
) -> None:
    tiny_source.put(tmp_path / "source", file, content.encode())
    if not file.startswith(("JPEGImages", "left", "data")):
        tiny_source.put(tmp_path / "source", "images/a.png", tiny_source.encode(tiny_source.picture(1, 4, 4)))
    tiny_source.write_project(tmp_path / "project", tmp_path / "source", {"source": source})

    assert tiny_source.run(tmp_path / "project", upto="pull") == 1
    assert said in capsys.readouterr().err


def test_a_folder_of_geotiffs_is_not_told_to_be_another_format(tmp_path: Path) -> None:
    for name in ("images/a.tif", "masks/a.tif"):
        tiny_source.put(tmp_path, name, b"no tif")
    assert looks_like.hint(tmp_path, "geotiff") is None
    assert "data.source: folder" in str(looks_like.hint(tmp_path, "coco"))
