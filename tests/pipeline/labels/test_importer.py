"""Labels that come back twice, for unknown images, of a wrong size, of unknown classes; and the whole way round."""

import json
import shutil
import zipfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.imaging import label_maps
from pipeline.ingest import split
from pipeline.labels import registry as labels
from pipeline.storage import manifest, predictions, shards
from tests.support import tiny_source
from tests.support.command_line import marginalia
from tests.support.label_project import CLASSES, NEW, add, codes, rebuilt, snapshot, zipped


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
    assert len(labels.places(labels.read_labels(), tiny_source.CLASSES)) == 4


def test_a_run_that_dies_before_the_registry_is_written_leaves_it_as_it_was(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped(Path("a.zip"), ("base/u/00", NEW))

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(labels, "write_labels", die)
        with pytest.raises(KeyboardInterrupt):
            add(path)
    assert not labels.read_labels().labels
    assert not list(Path("data/labels").glob(".*"))
    assert add(path).taken == 1
    assert rebuilt()["base/u/00"].split == "labelled"
