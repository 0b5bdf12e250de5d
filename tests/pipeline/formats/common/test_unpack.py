"""A source that comes as an archive is read like its folder, and writes nothing outside its temporary folder."""

import io
import os
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import zstandard

from pipeline.formats.common import unpack
from pipeline.formats.common.source import SourceError
from pipeline.storage import archives
from tests.support import tiny_labels, tiny_settings, tiny_source


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pack(members: dict[str, bytes], kind: str, path: Path) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if kind == "gz" else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(zstandard.compress(out.getvalue()) if kind == "zst" else out.getvalue())
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "gz", "zst"])
def test_an_archive_gives_the_same_base_archive_as_its_folder(tmp_path: Path, kind: str) -> None:
    source = tiny_labels.GOLDEN / "voc"
    packed = pack({f"VOCdevkit/VOC2012/{n}": data for n, data in files(source).items()}, kind, tmp_path / "delivery")
    made = []
    for number, path in enumerate((source, packed)):
        project = tmp_path / f"project{number}"
        tiny_source.write_project(project, path, {"source": "voc"})
        assert tiny_source.run(project, upto="pull") == 0
        made.append((project / "data/pulled/base.tar").read_bytes())
        assert sorted(p.name for p in (project / "data").iterdir()) == [
            "offered",
            "pulled",
        ]  # nothing temporary is left
    assert made[0] == made[1]


def test_a_single_folder_is_gone_into_unless_a_reader_looks_for_it(tmp_path: Path) -> None:
    caps = tiny_settings.ingest()
    for inside, expected in {"x/y/images/a.png": ["images"], "images/a/b.png": ["images"]}.items():
        packed = pack({inside: b"x", "__MACOSX/._a": b"x"}, "zip", tmp_path / "p.zip")
        with unpack.opened(packed, caps, tmp_path / "data") as root:
            assert [p.name for p in root.iterdir() if not p.name.startswith("__")] == expected
        assert not root.exists()


@pytest.mark.parametrize("name", ["../evil.png", "/tmp/evil.png", "a/../../evil.png", "C:\\evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_that_leads_out_refuses_the_archive(tmp_path: Path, name: str, kind: str) -> None:
    packed = pack({"images/a.png": b"x", name: b"evil"}, kind, tmp_path / "p")
    with (
        pytest.raises(archives.DumpRefused, match="evil"),
        unpack.opened(packed, tiny_settings.ingest(), tmp_path / "data"),
    ):
        pass
    assert list((tmp_path / "data").iterdir()) == []
    assert not (tmp_path / "evil.png").exists()


@pytest.mark.parametrize("names", [("a/b", "a/b"), ("a", "a/b"), ("a/b", "a")])
def test_two_members_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    (tmp_path / "p.tar").write_bytes(out.getvalue())
    with pytest.raises(SourceError, match="two members have the name"), unpack.opened(
        tmp_path / "p.tar", tiny_settings.ingest(), tmp_path / "data"
    ):  # fmt: skip
        pass
    assert list((tmp_path / "data").iterdir()) == []


def test_a_member_over_the_cap_is_named(tmp_path: Path) -> None:
    packed = pack({"images/a.png": bytes(1_200_000)}, "tar", tmp_path / "p")
    with pytest.raises(SourceError, match=r"images/a\.png.*max_file_mb: 1"), unpack.opened(
        packed, tiny_settings.ingest(max_file_mb=1), tmp_path / "data"
    ):  # fmt: skip
        pass


def test_what_a_killed_run_left_goes_once_it_is_a_day_old(tmp_path: Path) -> None:
    """An unpacked archive has the size of the data set; a younger one may belong to a run that is still at work."""
    for name, age in (("old", 90_000), ("young", 80_000)):
        tiny_source.put(tmp_path, f"data/.unpacked.{name}/images/a.png", b"x")
        os.utime(tmp_path / f"data/.unpacked.{name}", (time.time() - age,) * 2)
    packed = pack({"images/a.png": b"x"}, "zip", tmp_path / "a.zip")
    with unpack.opened(packed, tiny_settings.ingest(), tmp_path / "data"):
        pass
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".unpacked.young"]
