"""Labels that come back twice, for unknown images, of a wrong size, of unknown classes; and the whole way round."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import config, paths
from pipeline.formats import cvat
from pipeline.formats.common import brush_rle
from pipeline.formats.common.task import Item, task_name
from pipeline.imaging import label_maps
from pipeline.ingest import split
from pipeline.labels import importer
from pipeline.labels import registry as labels
from pipeline.storage import atomic, manifest, predictions, shards
from tests.support import tiny_source
from tests.support.command_line import marginalia

CLASSES = [{"id": k, "name": n, "color": [50 * k, 9, 200]} for k, n in enumerate(tiny_source.CLASSES)]
NEW = np.tile(np.array([0, 0, 1, 2], np.uint8), (48, 16))  # no band of any pre-label or mask looks like this


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a labelled, u and a later dump unlabelled, v val, t test, h unlabelled with hidden labels; pre-labels of all."""
    home = tmp_path_factory.mktemp("f19")
    source, root = home / "source", home / "project"
    tiny_source.write_source(source, {"a": 3, "u": 3, "v": 1, "t": 1, "h": 1}, {"a", "v", "t", "h"})
    (source / "classes.txt").write_text("".join("{} {} {} {}\n".format(c["name"], *c["color"]) for c in CLASSES))
    parts = {"labelled": ["a/00", "a/01", "a/02"], "unlabelled": ["u/00", "u/01", "u/02", "h/00"]}
    parts |= {"val": ["v/00"], "test": ["t/00"]}
    for part, names in parts.items():
        (source / f"{part}.txt").write_text("\n".join(names))
    tiny_source.write_project(root, source, {"lists": {part: f"{part}.txt" for part in parts}}, pool={"label_next": 3})
    known = {"base": {"archive": "data/pulled/base.tar"}, "d": {"archive": "data/dumps/d.tar"}}
    (root / "dumps.yaml").write_text(yaml.safe_dump({"dumps": known}))
    later = [(f"images/m/{n}.png", tiny_source.encode(tiny_source.picture(9000 + n))) for n in range(2)]
    shards.write_tar(root / "data/dumps/d.tar", later)
    assert tiny_source.run(root, dumps=("base", "d")) == 0
    rows = [row for row in manifest.read(root / paths.SPLIT_MANIFEST) if row.split in ("labelled", "unlabelled")]
    shards.write_tar(
        root / predictions.PRELABELS,
        [(f"{r.id}.png", label_maps.encode_png(tiny_source.mask(n))) for n, r in enumerate(rows)],
    )
    write_pool(root, rows)
    return root


def write_pool(root: Path, rows: list[manifest.Row]) -> None:
    n, ones = len(rows), np.ones(len(rows))
    arrays = {key: np.array([getattr(r, key) for r in rows]) for key in ("id", "name", "dump", "group", "split")}
    arrays |= dict.fromkeys(("confidence", "margin", "entropy"), ones) | {"embedding": np.arange(2.0 * n).reshape(n, 2)}
    arrays |= {"area": np.full((n, 3), 1 / 3), "doubt": np.arange(3.0 * n).reshape(n, 3)}
    arrays["margins"] = np.full((n, predictions.MARGIN_BINS), 1 / predictions.MARGIN_BINS)
    with atomic.replacing(root / predictions.FILE) as file:
        np.savez(file, classes=np.array(tiny_source.CLASSES), **arrays)


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def row(name: str) -> manifest.Row:
    return tiny_source.rows(Path())[name]


def zipped(path: Path, *given: tuple[str, np.ndarray], classes: list[dict[str, Any]] = CLASSES) -> Path:
    """CVAT's zip of label maps by DUMP/NAME or by any other name."""
    known = tiny_source.rows(Path())
    items = [
        Item(task_name(known[name].id, f"{name}.png") if name in known else name, "", b"", *label.shape, label)
        for name, label in given
    ]
    cvat.write(path, items, classes)
    return path


def add(path: Path, **options: Any) -> importer.Imported:
    return importer.add(path, params=config.load(), **options)


def codes(result: importer.Imported) -> dict[str, str]:
    return {item.name.partition("-")[2] or item.name: item.code for item in result.refused}


def rebuilt() -> dict[str, manifest.Row]:
    assert marginalia("stage", "index") == 0
    assert marginalia("stage", "split") == 0
    return tiny_source.rows(Path())


def snapshot() -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in [labels.FILE, *sorted(Path("data/labels").glob("*"))] if p.is_file()}


def test_out_to_cvat_corrected_back_and_into_training(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert marginalia("stage", "rank") == 0
    chosen = set(json.loads(Path("reports/label_next/names.json").read_text()))
    assert len(chosen) == 3
    before = {name: r.split for name, r in tiny_source.rows(root).items()}
    with zipfile.ZipFile("reports/label_next/cvat.zip") as archive:
        text = archive.read("annotations.xml").decode()
    head, *found = text.split("<image ")
    name = found[0].partition('name="')[2].partition('"')[0]
    patch = '<polygon label="wall" points="10,4;30,4;30,14;10,14" z_order="1"></polygon></image>'
    Path("back.xml").write_text("<image ".join([head, found[0].replace("</image>", patch), *found[1:]]))
    assert marginalia("import-labels", "back.xml", "--by", "anna") == 0
    out = capsys.readouterr().out
    assert out.count("unchanged-pre-label: just as it was handed out") == 2  # nobody looked at the other two
    (mine,) = [r for r in tiny_source.rows(root).values() if name.startswith(r.id[:12])]
    wanted = label_maps.decode_mask(
        shards.read(
            predictions.PRELABELS,
            *next(m for m in shards.members(predictions.PRELABELS) if m.name == f"{mine.id}.png")[1:],
        ),
        max_pixels=10**6,
    )
    wanted[4:14, 10:30] = 1
    after = rebuilt()
    key = f"{mine.dump}/{mine.name}"
    assert before[key] == "unlabelled"
    assert (after[key].split, after[key].mask_import) == ("labelled", "back")
    np.testing.assert_array_equal(manifest.open_mask(after[key], 10**6), wanted)
    assert {name: r.split for name, r in after.items()} == before | {key: "labelled"}
    entry = yaml.safe_load(labels.FILE.read_text())["labels"]["back"]
    assert (entry["images"], entry["tool"], entry["by"]) == (1, "cvat", "anna")
    about = json.loads(shards.read(Path(entry["archive"]), *shards.members(Path(entry["archive"]))[0][1:]))
    assert about["images"][mine.id]["image"] == key
    stood = snapshot()
    assert marginalia("import-labels", "back.xml") == 0
    assert "nothing new" in capsys.readouterr().out
    assert snapshot() == stood


def test_a_pre_label_of_an_earlier_model_is_no_label(root: Path) -> None:
    """The task came back untouched after a retraining: nobody looked, though the pool has other pre-labels by now."""
    assert marginalia("stage", "rank") == 0
    shutil.copytree("reports/label_next", "task")
    names = [member.name for member in shards.members(predictions.PRELABELS)]
    shards.write_tar(
        predictions.PRELABELS, [(name, label_maps.encode_png(tiny_source.mask(90 + n))) for n, name in enumerate(names)]
    )
    assert marginalia("stage", "rank") == 0
    result = add(Path("task"))
    assert result[:4] == (None, "folder", 0, 0)
    assert {item.code for item in result.refused} == {"unchanged-pre-label"}
    assert add(Path("task"), accept_unchanged=True).taken == len(result.refused) == 3


def test_what_cannot_be_used_is_named_and_stops_nothing(root: Path) -> None:
    before = tiny_source.rows(root)
    path = zipped(
        Path("a.zip"), ("base/u/00", NEW), ("base/u/01", NEW[:, :60]), ("base/v/00", NEW), ("base/t/00", NEW),
        ("0123456789ab-gone.png", NEW), ("d/m/0", np.full((48, 64), 255, np.uint8)), ("u/00.png", NEW),
    )  # fmt: skip
    result = add(path)
    assert (result.name, result.taken) == ("a", 1)
    assert codes(result) == {
        "base_u_01.png": "mask-size", "base_v_00.png": "held-out", "base_t_00.png": "held-out", "gone.png": "unknown-image",
        "d_m_0.png": "mask-all-ignore", "u/00.png": "labels-twice",
    }  # fmt: skip
    after = rebuilt()
    assert {n for n in after if (after[n].split, after[n].mask_digest) != (before[n].split, before[n].mask_digest)} == {
        "base/u/00"
    }


def test_unknown_classes_are_named_with_the_nearest(root: Path) -> None:
    wrong = [{**c, "name": c["name"].replace("floor", "flor")} for c in CLASSES]
    result = add(zipped(Path("a.zip"), ("base/u/00", NEW), ("base/u/01", NEW % 2), classes=wrong))
    assert (result.taken, codes(result)) == (1, {"base_u_00.png": "unknown-class"})
    assert "'flor' (did you mean 'floor'?)" in result.refused[0].reason


def test_nothing_usable_is_an_error_that_changes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot()
    assert marginalia("import-labels", str(zipped(Path("a.zip"), ("nobody.png", NEW)))) == 1
    assert "nobody.png: unknown-image" in capsys.readouterr().out
    Path("b.json").write_text("{")
    Path("c.txt").write_text("x")
    Path("d.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    tiny_source.put(Path("e"), "names.json", b"[1]")
    tiny_source.put(Path("e"), "masks/x.png", b"")
    for name in ("b.json", "c.txt", "d.zip", "e", "absent.zip"):
        assert marginalia("import-labels", name) == 1
        assert name in capsys.readouterr().err
    assert snapshot() == before


def test_a_later_import_wins_and_the_first_may_come_back(root: Path) -> None:
    one, two = zipped(Path("one.zip"), ("base/u/00", NEW)), zipped(Path("two.zip"), ("base/u/00", NEW[::-1, ::-1]))
    assert [add(path).name for path in (one, two, two, one, one)] == ["one", "two", None, "one-2", None]
    Path("three.zip").write_bytes(one.read_bytes())
    both = zipped(Path("both.zip"), ("base/u/00", NEW), ("base/u/01", NEW))
    assert add(Path("three.zip"))[:4] == (None, "cvat", 0, 1)
    assert add(both)[:4] == ("both", "cvat", 1, 1)  # of a task exported every week only what is new
    assert add(two).name == "two-2"
    after = rebuilt()
    np.testing.assert_array_equal(manifest.open_mask(after["base/u/00"], 10**6), NEW[::-1, ::-1])
    assert (after["base/u/00"].mask_import, after["base/u/01"].mask_import) == ("two-2", "both")


def test_any_dump_hidden_labels_and_labels_that_were_wrong(root: Path) -> None:
    given = [(name, NEW) for name in ("d/m/1", "base/h/00", "base/a/01")]
    old = tiny_source.summary(root)
    assert add(zipped(Path("a.zip"), *given)).taken == 3
    after = rebuilt()
    for name, label in given:
        assert (after[name].split, after[name].mask_import) == ("labelled", "a")
        np.testing.assert_array_equal(manifest.open_mask(after[name], 10**6), label)
    new = tiny_source.summary(root)
    assert new["counts"]["labelled"] == old["counts"]["labelled"] + 2
    assert new["test_hash"] == old["test_hash"]
    assert new["label_hash"] != old["label_hash"]
    own = manifest.open_mask(after["base/a/00"], 10**6)
    result = add(zipped(Path("b.zip"), ("base/a/00", own)))
    assert result[:4] == (None, "cvat", 0, 1)  # it is what training sees already


def test_an_imported_mask_never_moves_a_group_into_the_test_set(tmp_path: Path) -> None:
    """Without lists groups are drawn; u's draw is below split.test, but it had no masks when the test set was drawn."""
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 2, "b": 2, "c": 2, "u": 2}, {"a", "b", "c"})
    seed = next(s for s in range(200) if split.draw("u", s) < 0.3 and min(split.draw(g, s) for g in "abc") > 0.35)
    tiny_source.write_project(root, source, split={"seed": seed, "test": 0.3, "val": 0.01})
    assert tiny_source.run(root) == 0
    with chdir(root):
        before = tiny_source.rows(Path())
        add(zipped(Path("a.zip"), ("base/u/00", NEW)))
        after = rebuilt()
    assert {n: r.split for n, r in after.items()} == {n: r.split for n, r in before.items()} | {"base/u/00": "labelled"}


def test_a_corrected_group_keeps_its_say_in_the_drawing(tmp_path: Path) -> None:
    """Groups a, b, c: test, val, train. Were c to drop out of the drawing, the val group would train."""
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 2, "b": 2, "c": 2}, {"a", "b", "c"})
    tiny_source.write_project(root, source)
    assert tiny_source.run(root) == 0
    with chdir(root):
        before = tiny_source.rows(Path())
        trained = [name for name, r in before.items() if r.split == "labelled"]
        assert {r.split for r in before.values()} == {"labelled", "val", "test"}
        assert add(zipped(Path("a.zip"), *((name, NEW) for name in trained))).taken == len(trained) == 2
        after = rebuilt()
    assert all(after[name].mask_import == "a" for name in trained)
    assert {n: r.split for n, r in after.items()} == {n: r.split for n, r in before.items()}


def labelstudio_json(path: Path) -> None:
    value = [
        {
            "original_height": 48, "original_width": 64, "type": "brushlabels",
            "value": {"format": "rle", "rle": brush_rle.encode(k == NEW), "brushlabels": [name]},
        }
        for k, name in enumerate(tiny_source.CLASSES)
    ]  # fmt: skip
    task = {"data": {"image": "/data/upload/1/0a1b2c3d-x.png", "marginalia_id": row("base/u/00").id}}
    path.write_text(json.dumps([{**task, "annotations": [{"result": value}]}]))


def coco_json(path: Path) -> None:
    label = {"id": 1, "file_name": "images/u/00.png", "height": 48, "width": 64}
    found = [
        {"id": k, "image_id": 1, "category_id": 7 - k, "segmentation": label_maps.to_rle(k == NEW)}
        for k in range(len(CLASSES))
    ]
    categories = [{"id": 7 - k, "name": name} for k, name in enumerate(tiny_source.CLASSES)]
    path.write_text(json.dumps({"images": [label], "annotations": found, "categories": categories}))


def folder(path: Path, encode: Callable[[np.ndarray], bytes] = tiny_source.encode, names: str = "") -> None:
    tiny_source.put(path, "masks/u/00.png", encode(NEW))
    if names:
        (path / "classes.txt").write_text(names)


def palette(label: np.ndarray) -> bytes:
    """Colours that mean nothing: who opened it as RGB would find no class."""
    picture = Image.fromarray(label, "P")
    picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "write",
    [
        labelstudio_json, coco_json, folder,
        lambda path: folder(path, palette),
        lambda path: folder(path, lambda label: tiny_source.encode(label_maps.colourise(label, [c["color"] for c in CLASSES]))),
        lambda path: folder(path, lambda label: tiny_source.encode(np.array([2, 1, 0], np.uint8)[label]), "floor\nwall\nsky"),
        lambda path: tiny_source.put(path, "u/00.png", tiny_source.encode(NEW)),
        lambda path: [tiny_source.put(path, "masks/x.png", tiny_source.encode(NEW)),
                      (path / "names.json").write_text(json.dumps({"x": row("base/u/00").id}))],
    ],
    ids=["labelstudio", "coco", "ids", "palette", "colours", "other-order", "masks-only", "names.json"],
)  # fmt: skip
def test_every_tool_brings_the_same_mask_back(write: Callable[[Path], Any], root: Path) -> None:
    write(Path("back"))
    result = add(Path("back"))
    assert (result.name, result.taken, result.refused) == ("back", 1, [])
    np.testing.assert_array_equal(manifest.open_mask(rebuilt()["base/u/00"], 10**6), NEW)


def zip_of_masks(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("masks/u/00.png", tiny_source.encode(NEW))


def test_a_zip_of_masks_is_a_folder_of_them(root: Path) -> None:
    zip_of_masks(Path("back.zip"))
    assert add(Path("back.zip"))[:3] == ("back", "folder", 1)
    np.testing.assert_array_equal(manifest.open_mask(rebuilt()["base/u/00"], 10**6), NEW)
    assert not list(Path("data/labels").glob(".importing*"))


@pytest.mark.parametrize(("unannotated", "rest"), [("ignore", 255), ("background", 0)])
def test_pixels_in_no_shape_are_what_the_project_says(unannotated: str, rest: int, root: Path) -> None:
    """The image's class `background` is there, or the source itself would have been refused."""
    source = json.loads(Path("data/pulled/source.json").read_text())
    source["classes"][0]["name"] = "background"
    Path("data/pulled/source.json").write_text(json.dumps(source))
    settings = yaml.safe_load(Path("params.yaml").read_text())
    settings["data"]["unannotated"] = unannotated
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    name = task_name(row("base/u/00").id, "x.png")
    body = '<polygon label="wall" points="0,0;64,0;64,20;0,20"/>'
    Path("a.xml").write_text(
        f'<annotations><image id="0" name="{name}" width="64" height="48">{body}</image></annotations>'
    )
    assert add(Path("a.xml")).taken == 1
    mask = manifest.open_mask(rebuilt()["base/u/00"], 10**6)
    assert np.unique(mask[:20]).tolist() == [1]
    assert np.unique(mask[20:]).tolist() == [rest]


def test_a_folder_of_masks_refuses_its_bad_ones_alone(root: Path) -> None:
    home = Path("back")
    tiny_source.put(home, "masks/u/00.png", tiny_source.encode(np.where(NEW == 2, 65535, NEW).astype(np.uint16)))
    tiny_source.put(home, "masks/u/01.png", tiny_source.encode(np.full((48, 64), 9, np.uint8)))
    tiny_source.put(home, "masks/u/02.png", b"no picture")
    tiny_source.put(home, "masks/h/00.png", tiny_source.encode(np.full((48, 64), 300, np.uint16)))
    result = add(home)
    assert codes(result) == {"h/00.png": "mask-class-id", "u/01.png": "mask-class-id", "u/02.png": "not-an-image"}
    np.testing.assert_array_equal(manifest.open_mask(rebuilt()["base/u/00"], 10**6), np.where(NEW == 2, 255, NEW))


def test_a_voc_folder_says_by_its_labelmap_what_its_ids_mean(root: Path) -> None:
    """Its first class is another than ours: taken as our ids, floor would come in as wall. Images are no masks."""
    home = Path("back")
    name = task_name(row("base/u/00").id, "x")
    tiny_source.put(
        home, "labelmap.txt", b"# label:color_rgb:parts:actions\nfloor:1,1,1::\nwall:2,2,2::\nsky:3,3,3::\n"
    )
    tiny_source.put(home, f"SegmentationClass/{name}.png", tiny_source.encode(2 - NEW))
    tiny_source.put(home, f"JPEGImages/{name}.png", tiny_source.encode(np.zeros((48, 64), np.uint8)))
    result = add(home)
    assert (result.taken, result.refused) == (1, [])
    np.testing.assert_array_equal(manifest.open_mask(rebuilt()["base/u/00"], 10**6), NEW)


def test_a_name_that_two_dumps_have_is_not_guessed(root: Path) -> None:
    rows = manifest.read(paths.SPLIT_MANIFEST)
    twin = next(r for r in rows if r.dump == "d")
    manifest.write(paths.SPLIT_MANIFEST, [*rows, replace(twin, id="f" * 64, dump="e")])
    tiny_source.put(Path("back"), f"{twin.name}.png", tiny_source.encode(NEW))
    assert codes(add(Path("back"))) == {f"{twin.name}.png": "ambiguous-name"}
    tiny_source.put(Path("other"), f"d/{twin.name}.png", tiny_source.encode(NEW))
    assert add(Path("other")).taken == 1


def test_index_stops_at_labels_that_are_not_the_registered_ones(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(zipped(Path("a.zip"), ("base/u/00", NEW)))
    add(zipped(Path("b.zip"), ("base/u/01", NEW)))
    a, b, registry = Path("data/labels/a.tar"), Path("data/labels/b.tar"), labels.FILE.read_text()
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    assert marginalia("stage", "index") == 1
    assert "not the labels that labels.yaml registered as 'a'" in capsys.readouterr().err
    a.unlink()
    assert marginalia("stage", "index") == 1
    assert "dvc pull data/labels/a.tar.dvc" in capsys.readouterr().err
    a.write_bytes(kept)
    labels.FILE.write_text(registry.replace("tool: cvat", "toll: cvat"))
    assert marginalia("stage", "index") == 1
    assert "labels.yaml: labels.a.to" in capsys.readouterr().err
    labels.FILE.write_text(registry)
    source = json.loads(Path("data/pulled/source.json").read_text())
    source["classes"] = [source["classes"][k] for k in (1, 0, 2)]
    Path("data/pulled/source.json").write_text(json.dumps(source))
    assert marginalia("stage", "index") == 1
    assert "add new classes at the end" in capsys.readouterr().err


def test_two_imports_at_once_leave_both(root: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    paths = [
        zipped(Path(f"p{n}.zip"), (name, NEW)) for n, name in enumerate(("base/u/00", "base/u/01", "d/m/0", "d/m/1"))
    ]
    with ThreadPoolExecutor(4) as threads:
        assert sorted(r.name for r in threads.map(add, paths)) == ["p0", "p1", "p2", "p3"]
    assert len(labels.places(labels.read(), tiny_source.CLASSES)) == 4


def test_a_run_that_dies_before_the_registry_is_written_leaves_it_as_it_was(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped(Path("a.zip"), ("base/u/00", NEW))

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(labels, "write", die)
        with pytest.raises(KeyboardInterrupt):
            add(path)
    assert not labels.read().labels
    assert not list(Path("data/labels").glob(".*"))
    assert add(path).taken == 1
    assert rebuilt()["base/u/00"].split == "labelled"
