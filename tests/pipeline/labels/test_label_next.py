"""What rank packs for those who label: the folder, CVAT's zip, Label Studio's tasks, all with the same pre-labels."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import config
from pipeline.formats import cvat, labelstudio
from pipeline.formats.common import annotations
from pipeline.labels import label_next
from pipeline.storage import atomic, manifest, predictions
from tests.support import tiny_project
from tests.support.command_line import marginalia


def test_equal_names_get_their_dump_as_a_folder() -> None:
    names = label_next.export_names(["x", "y", "x"], ["base", "base", "night"])
    assert names == ["base/x", "y", "night/x"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Params:
    monkeypatch.chdir(tmp_path)
    params = tiny_project.write(tmp_path)
    assert marginalia("stage", "predict") == 0
    return params


def test_stage_writes_a_folder_with_pre_labels(project: config.Params) -> None:
    Path("reports/label_next/images").mkdir(parents=True)
    Path("reports/label_next/images/old.png").write_bytes(b"of an earlier run")
    assert marginalia("stage", "rank") == 0
    folder = Path("reports/label_next")
    rows = {r.name: r for r in manifest.read(Path("data/split/manifest.parquet"))}
    table = list(csv.DictReader(io.StringIO(Path("reports/rank.csv").read_text())))
    assert [row["place"] for row in table] == ["1", "2", "3", "4"]
    for row in table:
        source = rows[row["name"]]
        assert source.split == "unlabelled"
        assert (folder / f"images/{row['name']}.png").read_bytes() == manifest.read_image_bytes(source)
        with Image.open(folder / f"masks/{row['name']}.png") as mask:
            assert mask.size == (source.width, source.height)
            assert np.array(mask).max() < 4
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert [name for name in found if "/" not in name] == [
        "HOWTO.txt", "classes.txt", "cvat.zip", "cvat_labels.json", "labelstudio.json", "labelstudio.xml", "names.json",
    ]  # fmt: skip
    assert len(found) == 7 + 2 * 4  # four pairs: nothing of the earlier run
    assert (folder / "classes.txt").read_text().split() == tiny_project.NAMES
    before = Path("reports/rank.csv").read_bytes()
    assert marginalia("stage", "rank") == 0
    assert Path("reports/rank.csv").read_bytes() == before


def test_the_tools_files_hold_the_same_pre_labels_and_name_each_image(project: config.Params) -> None:
    assert marginalia("stage", "rank") == 0
    folder = Path("reports/label_next")
    names = json.loads((folder / "names.json").read_text())
    masks = {
        names[p.relative_to(folder / "masks").with_suffix("").as_posix()]: p for p in (folder / "masks").rglob("*.png")
    }
    ids = annotations.class_ids(tiny_project.NAMES)
    shown = {p.name: annotations.paint(p, ids, max_pixels=10**6) for p in cvat.load(folder / "cvat.zip")[1]}
    assert len(shown) == 4
    tasks = {task["data"]["marginalia_id"]: task for task in json.loads((folder / "labelstudio.json").read_text())}
    for image_id, path in masks.items():
        wanted = np.asarray(Image.open(path))
        (name,) = [name for name in shown if name.startswith(f"{image_id[:12]}-")]
        np.testing.assert_array_equal(shown[name], wanted)
        task = tasks[image_id]
        place = labelstudio.image_name(task["data"]["image"])
        assert (folder.parent / place).read_bytes() == (folder / "images" / Path(*Path(place).parts[2:])).read_bytes()
        handed_back = Path("handed_back.json")
        handed_back.write_text(json.dumps([{"data": task["data"], "annotations": task["predictions"]}]))
        (picture,) = labelstudio.load(handed_back)
        np.testing.assert_array_equal(annotations.paint(picture, ids, max_pixels=10**6), wanted)
    labels = json.loads((folder / "cvat_labels.json").read_text())
    assert [label["name"] for label in labels] == [*tiny_project.NAMES, "ignore"]
    assert len((folder / "HOWTO.txt").read_text().splitlines()) == 10


def test_pre_labels_of_another_run_are_an_error(project: config.Params, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.storage import shards

    assert marginalia("stage", "rank") == 0
    Path("reports/rank.csv").unlink()
    before = {p: p.read_bytes() for p in Path("reports").rglob("*") if p.is_file()}
    shards.write_tar(predictions.PRELABELS, [])
    assert marginalia("stage", "rank") == 1
    assert "run the predict stage again" in capsys.readouterr().err
    assert not Path("reports/rank.csv").exists()
    assert {p: p.read_bytes() for p in Path("reports").rglob("*") if p.is_file()} == before  # the old folder, whole


def test_a_pool_without_an_array_is_named(project: config.Params) -> None:
    with np.load(predictions.FILE) as arrays:
        kept = {key: arrays[key] for key in arrays if key != "doubt"}
    with atomic.replacing(predictions.FILE) as file:
        np.savez(file, **kept)
    with pytest.raises(predictions.PoolError, match="'doubt'"):
        predictions.read_pool()
