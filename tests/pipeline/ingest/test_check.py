"""Archives become shards and rows: everything is found again, nothing depends on threads, processes or neighbours."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

from pipeline.imaging import decode, perceptual_hash
from pipeline.ingest import add_dump, check, dump_registry
from pipeline.storage import manifest, parallel, shards
from tests.support import tiny_settings, tiny_source
from tests.support.command_line import marginalia

SOURCE = {
    "source": "folder",
    "classes": [{"id": k, "name": n, "color": [k, 9, 9]} for k, n in enumerate(tiny_source.CLASSES)],
    "ignore": 255,
    "lists": dict.fromkeys(("labelled", "unlabelled", "val", "test")),
    "groups": None,
    "group_pattern": None,
}


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    with chdir(tmp_path):
        yield tmp_path


def archive(path: Path, seeds: range, *, masked: bool = True) -> Path:
    members = [(f"images/g{n % 2}/{n:03d}.png", tiny_source.encode(tiny_source.picture(n))) for n in seeds]
    if masked:
        members += [(f"masks/g{n % 2}/{n:03d}.png", tiny_source.encode(tiny_source.mask(n))) for n in seeds]
    shards.write_tar(path, members)
    return path


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    return {p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_every_image_and_mask_is_found_again(project: Path) -> None:
    path = archive(project / "base.tar", range(12))
    counts = check.ingest(path, "base", SOURCE, tiny_settings.ingest(shard_mb=1), tiny_settings.scale())
    assert counts == {"images": 12, "with mask": 12}
    rows = manifest.read(project / "data/ingested/base/rows.parquet")
    assert len(rows) == 12
    for row in rows:
        seed = int(row.name[-3:])
        image_HWC = tiny_source.picture(seed)
        assert manifest.read_image_bytes(row) == tiny_source.encode(image_HWC)  # stored as it came
        np.testing.assert_array_equal(manifest.open_image(row, 10_000), image_HWC)
        np.testing.assert_array_equal(manifest.open_mask(row, 10_000), tiny_source.mask(seed))
        assert (row.id, row.phash) == (manifest.image_id(image_HWC), f"{perceptual_hash.dhash(image_HWC):016x}")
        assert (row.dump, row.source, row.group, row.split) == ("base", "folder", f"g{seed % 2}", "")
        assert (row.width, row.height) == (64, 48)


def test_exif_and_grey_images_keep_their_bytes_and_get_the_oriented_size(project: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = tiny_source.encode(tiny_source.picture(1), "JPEG", exif=exif, quality=95)
    grey = tiny_source.encode(tiny_source.picture(2)[..., 0])
    shards.write_tar(project / "b.tar", [("images/t.jpg", turned), ("images/g.png", grey)])
    check.ingest(project / "b.tar", "base", SOURCE, tiny_settings.ingest(), tiny_settings.scale())
    t, g = manifest.read(project / "data/ingested/base/rows.parquet")
    assert (t.width, t.height, g.width, g.height) == (48, 64, 64, 48)
    assert [manifest.read_image_bytes(r) for r in (t, g)] == [turned, grey]
    np.testing.assert_array_equal(manifest.open_image(t, 10_000), decode.decode(turned, max_pixels=10_000))


def test_threads_and_processes_write_the_same(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "FEW", 100)
    path = archive(project / "b.tar", range(104), masked=False)  # enough for processes
    made = []
    for workers in (1, 2):
        check.ingest(path, "base", SOURCE, tiny_settings.ingest(), tiny_settings.scale(workers=workers))
        made.append({name: digest for name, (digest, _) in digests(project / "data/ingested/base").items()})
    assert made[0] == made[1]
    assert set(made[0]) == {"images-00000.tar", "rows.parquet", "quarantine.json"}


def test_another_dump_leaves_the_first_ones_files_untouched(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 4, "b": 3, "c": 3})
    tiny_source.write_project(root, source)
    assert tiny_source.run(root) == 0
    before = digests(root / "data/ingested/base")
    archive(root / "data/dumps/more.tar", range(50, 55), masked=False)
    known = dump_registry.read_dumps(root / "dumps.yaml")
    content = manifest.content_hash(root / "data/dumps/more.tar")
    entry = dump_registry.DumpEntry(archive="data/dumps/more.tar", sha256=content, images=5)
    dump_registry.write_dumps(dump_registry.DumpRegistry(dumps={**known.dumps, "more": entry}), root / "dumps.yaml")
    with chdir(root):
        assert marginalia("stage", "ingest", "more") == 0
    assert digests(root / "data/ingested/base") == before


def test_a_dead_decoder_process_is_an_error_that_names_where(tmp_path: Path) -> None:
    results = check._surviving(parallel.ordered(os._exit, [3] * 4, tiny_settings.scale()), tmp_path / "base.tar")  # type: ignore
    with pytest.raises(RuntimeError, match=r"base\.tar: a decoder process died shortly after image 'none'"):
        list(results)


def test_misplaced_files_are_named(project: Path) -> None:
    names = ["images/a.png", "images/a.webp", "masks/z.png", "readme.txt", "images/b.png"]
    seeds = dict(zip(names, range(5), strict=True))
    shards.write_tar(project / "b.tar", [(n, tiny_source.encode(tiny_source.picture(s))) for n, s in seeds.items()])
    check.ingest(project / "b.tar", "base", SOURCE, tiny_settings.ingest(), tiny_settings.scale())
    codes = {k: v["code"] for k, v in tiny_source.quarantine(project, "data/ingested/base/quarantine.json").items()}
    assert codes == {
        "images/a.webp": "duplicate-name", "masks/z.png": "mask-without-image", "readme.txt": "unexpected-place",
    }  # fmt: skip
    assert [r.name for r in manifest.read(project / "data/ingested/base/rows.parquet")] == ["a", "b"]


def test_unknown_dump_and_missing_archive_are_errors_not_traces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_source.write_source(tmp_path / "source", {"a": 1})
    tiny_source.write_project(tmp_path / "project", tmp_path / "source")
    assert tiny_source.run(tmp_path / "project", upto="pull") == 0
    with chdir(tmp_path / "project"):
        assert marginalia("stage", "ingest", "autumn") == 1
        assert "known: base" in capsys.readouterr().err
        Path("data/pulled/base.tar").unlink()
        assert marginalia("stage", "ingest", "base") == 1
        assert "base.tar" in capsys.readouterr().err
        assert not Path("data/ingested/base").exists()


def test_an_archive_that_is_not_the_registered_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "project"
    tiny_source.write_source(tmp_path / "source", {"a": 1})
    tiny_source.write_project(root, tmp_path / "source")
    assert tiny_source.run(root, upto="pull") == 0
    added = add_dump.add(
        archive(tmp_path / "more.tar", range(3), masked=False), root=root, params=tiny_settings.params()
    )
    assert added.sha256 == manifest.content_hash(root / added.archive)
    archive(root / added.archive, range(1, 4), masked=False)
    with chdir(root):
        assert marginalia("stage", "ingest", "more") == 1
        error = capsys.readouterr().err
        assert "data/dumps/more.tar: its files are not those registered as dump 'more'" in error
        assert added.sha256[:12] in error
        assert not Path("data/ingested/more").exists()
        added.archive.unlink()  # the way out that the message names
        assert marginalia("add-dump", str(archive(tmp_path / "more.tar", range(3), masked=False))) == 0
        assert marginalia("stage", "ingest", "more") == 0
