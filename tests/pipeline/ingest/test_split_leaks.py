"""Classes nobody shows, leaks between the splits, data that changed under the manifest."""

from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.ingest import split
from pipeline.storage import manifest
from tests.support import tiny_source
from tests.support.command_line import marginalia


def test_missing_classes_are_warned_about_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    ids = tiny_source.write_source(source, {"a": 3, "b": 2, "c": 2})
    (source / "classes.txt").write_text("sky\nwall\nfloor\ncar\n")
    for key in ids[3:5]:  # val shows no sky; nobody shows a car
        seed = 2000 + int(key[-2:])
        no_sky = np.where(tiny_source.mask(seed) == 0, 1, tiny_source.mask(seed)).astype(np.uint8)
        tiny_source.put(source, f"masks/{key}.png", tiny_source.encode(no_sky))
    for part, names in {"labelled": ids[:3], "val": ids[3:5], "test": ids[5:]}.items():
        (source / f"{part}.txt").write_text("\n".join(names))
    lists = {p: f"{p}.txt" for p in ("labelled", "val", "test")}
    tiny_source.write_project(root, source, {"lists": lists, "missing_classes": "allow"})
    assert tiny_source.run(root) == 0
    assert tiny_source.summary(root)["missing"] == {"labelled": ["car"], "val": ["sky", "car"], "test": ["car"]}
    warned = capsys.readouterr().err
    assert "warning: class car: no pixel in labelled; it cannot be learnt" in warned
    assert "warning: class sky, car: no pixel in val; its score is undefined" in warned


def refused(root: Path, capsys: pytest.CaptureFixture[str], *texts: str) -> None:
    assert tiny_source.run(root) == 1
    error = capsys.readouterr().err
    assert all(text in error for text in texts), error
    assert not (root / "data/split/manifest.parquet").exists()


@pytest.mark.parametrize(
    "pair", [("labelled", "unlabelled"), ("labelled", "test"), ("unlabelled", "val"), ("val", "test")]
)
def test_an_image_in_two_lists(tmp_path: Path, pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    ids = tiny_source.write_source(source, dict.fromkeys("abcd", 2))
    lists = dict(zip(("labelled", "unlabelled", "val", "test"), (ids[:2], ids[2:4], ids[4:6], ids[6:]), strict=True))
    lists[pair[1]] = [*lists[pair[1]], lists[pair[0]][0]]
    for part, names in lists.items():
        (source / f"{part}.txt").write_text("\n".join(names))
    tiny_source.write_project(root, source, {"lists": {p: f"{p}.txt" for p in lists}})
    refused(root, capsys, repr(lists[pair[0]][0]), *pair, "remove it from one")


def test_a_group_across_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    ids = tiny_source.write_source(source, {"a": 4, "b": 2})
    for part, names in {"labelled": ids[:3], "test": ids[3:4]}.items():
        (source / f"{part}.txt").write_text("\n".join(names))
    tiny_source.write_project(root, source, {"lists": {p: f"{p}.txt" for p in ("labelled", "test")}})
    refused(root, capsys, "group 'a'", "labelled", "test", "a/03")


def test_labelled_and_unlabelled_of_one_group_are_fine(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    ids = tiny_source.write_source(source, {"a": 4, "b": 2, "c": 2})
    for part, names in {"labelled": ids[:2], "unlabelled": ids[2:4], "val": ids[4:6], "test": ids[6:]}.items():
        (source / f"{part}.txt").write_text("\n".join(names))
    parts = ("labelled", "unlabelled", "val", "test")
    tiny_source.write_project(root, source, {"lists": {p: f"{p}.txt" for p in parts}})
    assert tiny_source.run(root) == 0


ROW = manifest.Row("1", "a", "folder", "base", "g", 4, 4, "s", 0, 1, "m", 0, 1, "0" * 16, "labelled")
OTHER = replace(ROW, id="2", name="b", group="h", split="test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, replace(OTHER, id="1")], "same image"),
        ([ROW, replace(ROW, name="b", split="unlabelled")], "same image"),
        ([ROW, replace(OTHER, group="g")], "group 'g' is in labelled"),
        ([replace(ROW, split="val"), replace(OTHER, group="g")], "group 'g' is in val"),
        ([replace(ROW, split="unlabelled"), replace(OTHER, group="g", split="val")], "group 'g' is in unlabelled"),
        ([replace(ROW, mask_shard=None)], "has no mask"),
        ([ROW, replace(OTHER, mask_shard=None)], "base/b is in test but has no mask"),
    ],
)
def test_the_check_itself(rows: list[manifest.Row], message: str) -> None:
    with pytest.raises(split.LeakError, match=message):
        split.verify(rows)


def test_the_check_lets_honest_splits_pass() -> None:
    unused = replace(ROW, id="3", group="h", split="unused")
    split.verify([ROW, OTHER, unused, replace(ROW, id="4", split="unlabelled", mask_shard=None)])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 3, "b": 2, "c": 2})
    for n in range(2):  # equal sizes, so that one file can take the other's place
        tiny_source.put(source, f"images/bmp{n}.bmp", tiny_source.encode(tiny_source.picture(300 + n), "BMP"))
    tiny_source.write_project(root, source)
    assert tiny_source.run(root) == 0
    return root


def test_a_valid_picture_in_anothers_place(project: Path) -> None:
    rows = tiny_source.rows(project)
    one, two = rows["base/bmp0"], rows["base/bmp1"]
    np.testing.assert_array_equal(manifest.open_image(one, 10_000, project), tiny_source.picture(300))
    path = project / one.shard
    data = bytearray(path.read_bytes())
    data[one.offset : one.offset + one.length] = data[two.offset : two.offset + two.length]
    path.write_bytes(data)
    with pytest.raises(manifest.ManifestError, match=r"images-00000\.tar \(base/bmp0 .*do not match.*dvc repro"):
        manifest.open_image(one, 10_000, project)
    manifest.open_image(two, 10_000, project)


def test_one_flipped_bit_and_a_shortened_shard(project: Path) -> None:
    row = tiny_source.rows(project)["base/bmp1"]
    path = project / row.shard
    data = bytearray(path.read_bytes())
    data[row.offset + row.length - 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(manifest.ManifestError, match=r"base/bmp1.*do not match"):
        manifest.open_image(row, 10_000, project)
    path.write_bytes(data[: row.offset + 10])
    with pytest.raises(manifest.ManifestError, match=r"images-00000\.tar.*bytes expected"):
        manifest.open_image(row, 10_000, project)


def test_a_valid_mask_in_anothers_place(project: Path) -> None:
    rows = tiny_source.rows(project)
    one, two = rows["base/a/00"], rows["base/a/01"]
    truth = {row.name: manifest.open_mask(row, 10_000, project) for row in (one, two)}
    assert (truth[one.name] != truth[two.name]).any()
    path = project / str(one.mask_shard)
    data = path.read_bytes()
    mask = data[two.mask_offset : two.mask_offset + two.mask_length]
    assert len(mask) == one.mask_length  # bytes of equal size: nothing but the ids tell
    path.write_bytes(data[: one.mask_offset] + mask + data[one.mask_offset + one.mask_length :])
    with pytest.raises(manifest.ManifestError, match=r"masks-00000\.tar \(base/a/00\).*do not match.*dvc repro"):
        manifest.open_mask(one, 10_000, project)
    np.testing.assert_array_equal(manifest.open_mask(two, 10_000, project), truth[two.name])
    unchecked = replace(one, mask_digest=None)
    np.testing.assert_array_equal(manifest.open_mask(unchecked, 10_000, project), truth[two.name])


def test_a_changed_mask_is_noticed_before_training(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = next(row for row in tiny_source.rows(project).values() if row.split == "test")
    path = project / str(row.mask_shard)
    data = bytearray(path.read_bytes())
    start = int(row.mask_offset or 0)
    at = data.index(b"IDAT", start) + 8
    data[at] ^= 0x20
    path.write_bytes(data)
    with chdir(project):
        assert marginalia("stage", "split") == 1
    assert f"masks-00000.tar (base/{row.name})" in capsys.readouterr().err
