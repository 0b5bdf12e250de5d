"""The stage on a small real project with a real network: corrupted masks come first, with a row and a picture each."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import config
from pipeline.imaging import label_maps
from pipeline.storage import atomic, manifest, shards
from tests.support import tiny_project
from tests.support.command_line import marginalia

PARTS = (
    ("labelled", "base", "a", 14),
    ("val", "base", "c", 2),
    ("test", "base", "d", 12),
    ("unlabelled", "base", "u", 2),
)


def corrupt(root: Path) -> dict[str, set[str]]:
    """Three labelled masks with sky and wall swapped, two test images with each other's mask; their names by split."""
    path = root / "data/split/manifest.parquet"
    rows = manifest.read(path)
    truth = {row.id: manifest.open_mask(row, 10**6) for row in rows}
    labelled = [row for row in rows if row.split == "labelled"]
    for row in labelled[2:8:2]:
        mask = truth[row.id]
        truth[row.id] = np.where(mask == 0, 1, np.where(mask == 1, 0, mask)).astype(np.uint8)
    same = [row for row in rows if row.split == "test" and (row.height, row.width) == (64, 96)]
    one, other = max(
        ((a, b) for a in same for b in same), key=lambda pair: (truth[pair[0].id] != truth[pair[1].id]).mean()
    )
    truth[one.id], truth[other.id] = truth[other.id], truth[one.id]
    archive = root / "data/ingested/other.tar"
    shards.write_tar(
        archive,
        [(f"{i:03d}.png", label_maps.encode_png(mask)) for i, mask in enumerate(truth.values()) if mask is not None],
    )
    places = iter(shards.members(archive))
    changed = []
    for row in rows:
        if row.mask_shard is not None:
            place = next(places)
            row = manifest.Row(**{f: getattr(row, f) for f in manifest.SCHEMA.names} | {
                "mask_shard": "data/ingested/other.tar", "mask_offset": place.offset, "mask_length": place.length})  # fmt: skip
        changed.append(row)
    manifest.write(path, changed)
    return {"labelled": {row.name for row in labelled[2:8:2]}, "test": {one.name, other.name}}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, set[str]], list[dict[str, str]]]:
    root = tmp_path_factory.mktemp("suspects")
    tiny_project.write_data(root, PARTS)
    tiny_project.write_student(root, tiny_project.trained())
    tiny_project.write_params(root, pool={"permutations": 199, "suspects": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        wrong = corrupt(root)
        Path("reports/suspects").mkdir(parents=True)
        Path("reports/suspects/val-099.jpg").write_bytes(b"of an earlier run")
        assert marginalia("stage", "suspects") == 0
    return root, wrong, list(csv.DictReader(io.StringIO((root / "reports/suspect_labels.csv").read_text())))


def test_corrupted_masks_come_first_in_their_split(
    found: tuple[Path, dict[str, set[str]], list[dict[str, str]]],
) -> None:
    _, wrong, table = found
    for split, names in wrong.items():
        ours = [row for row in table if row["split"] == split]
        assert {row["name"] for row in ours[: len(names)]} == names
        assert [int(row["place"]) for row in ours] == list(range(1, len(ours) + 1))
        values = [float(row["score"]) for row in ours]
        assert values == sorted(values, reverse=True)
    for row in table:
        if row["name"] in wrong["labelled"]:
            assert {row["given"], row["suggested"]} == {"sky", "wall"}
            assert 0 <= int(row["left"]) < int(row["right"])
            assert 0 <= int(row["top"]) < int(row["bottom"])


def test_each_of_the_first_has_its_picture(found: tuple[Path, dict[str, set[str]], list[dict[str, str]]]) -> None:
    root, _, table = found
    named = {row["picture"] for row in table} - {""}
    assert named == {p.relative_to(root).as_posix() for p in (root / "reports/suspects").iterdir()}
    assert {name.rpartition("/")[2] for name in named} >= {"labelled-001.jpg", "labelled-003.jpg", "test-001.jpg"}
    with Image.open(root / "reports/suspects/labelled-001.jpg") as picture:
        assert picture.width > 4 * 90
    assert {row["split"] for row in table} <= {"labelled", "val", "test"}  # nothing of the unlabelled


def test_a_student_of_another_split_is_refused(
    found: tuple[Path, dict[str, set[str]], list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(found[0])
    summary = atomic.read_json(Path("data/split/summary.json"))
    atomic.write_json(Path("data/split/summary.json"), summary | {"split_hash": "6" * 64})
    assert marginalia("stage", "suspects") == 1
    assert "another split: train again" in capsys.readouterr().err
    atomic.write_json(Path("data/split/summary.json"), summary)
    assert config.load().pool.suspects == 3
