"""Member names that lead out, and members that are no files, refuse the whole dump; nothing is written."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.ingest import add_dump
from pipeline.storage import archives
from tests.support import tiny_settings, tiny_source

GOOD = tiny_source.encode(tiny_source.picture(1))


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if p.name != ".lock" and p != folder / "project/data" and p != folder / "project/data/dumps"
    }


def refused(tmp_path: Path, delivery: Path, *named: str) -> None:
    """Adding fails, names the delivery and the member, and leaves the whole folder above the project as it was."""
    root = tmp_path / "project"
    tiny_source.write_project(root, tmp_path)
    before = tree(tmp_path)
    with pytest.raises(archives.DumpRefused) as error:
        add_dump.add(delivery, name="d", root=root, params=tiny_settings.params())
    assert all(text in str(error.value) for text in (delivery.name, *named)), str(error.value)
    assert tree(tmp_path) == before


HOSTILE = {
    "../../x.png": "leads out", "a/../../x.png": "leads out", "..\\..\\x.png": "leads out", "a/..": "leads out",
    "/etc/x.png": "absolute", "//host/x.png": "absolute", "\\\\host\\x.png": "absolute",
    "C:\\x.png": "absolute", "c:x.png": "absolute",
    "a\nb.png": "control", "a\x1b[2J.png": "control", "n" * 300 + ".png": "shorten", "d/" * 600 + "x.png": "shorten",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", ["tar", "zip"])
def test_hostile_names(tmp_path: Path, name: str, form: str) -> None:
    delivery = tmp_path / f"bad.{form}"
    if form == "zip":
        with zipfile.ZipFile(delivery, "w") as archive:
            archive.writestr("good.png", GOOD)
            archive.writestr(name, GOOD)
    else:
        with tarfile.open(delivery, "w") as tar:
            for member in ("good.png", name):
                info = tarfile.TarInfo(member)
                info.size = len(GOOD)
                tar.addfile(info, io.BytesIO(GOOD))
    refused(tmp_path, delivery, HOSTILE[name], ascii(name[:20])[1:-1])


def test_nul_in_a_pax_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.png")
        info.size, info.pax_headers = len(GOOD), {"path": "a\0/../../x.png"}
        tar.addfile(info, io.BytesIO(GOOD))
    refused(tmp_path, tmp_path / "bad.tar", "leads out")


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "CONTTYPE"])
@pytest.mark.parametrize("pack", ["w", "w:gz"])
def test_tar_members_that_are_no_files(tmp_path: Path, kind: str, pack: str) -> None:
    delivery = tmp_path / "bad.tar"
    with tarfile.open(delivery, pack) as tar:  # type: ignore[call-overload]
        info = tarfile.TarInfo("good.png")
        info.size = len(GOOD)
        tar.addfile(info, io.BytesIO(GOOD))
        info = tarfile.TarInfo("odd.png")
        info.type, info.linkname = getattr(tarfile, kind), "/etc/passwd" if kind == "SYMTYPE" else "good.png"
        tar.addfile(info)
    if kind == "CONTTYPE":  # an old name for a regular file
        root = tmp_path / "project"
        tiny_source.write_project(root, tmp_path)
        assert add_dump.add(delivery, root=root, params=tiny_settings.params()).images == 2
    else:
        refused(tmp_path, delivery, "'odd.png'", "link" if kind in ("SYMTYPE", "LNKTYPE") else "device")


def test_sparse_members_are_no_files(tmp_path: Path) -> None:
    info = tarfile.TarInfo("hole.png")
    info.size, info.pax_headers = 0, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "hole.png"}
    info.pax_headers |= {"GNU.sparse.realsize": str(1 << 40)}
    data = b"1\n1099511627775\n1\n".ljust(512, b"\0") + b"x".ljust(512, b"\0")
    info.size = len(data)
    delivery = tmp_path / "bad.tar"
    delivery.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + data + bytes(1024))
    refused(tmp_path, delivery, "'hole.png'", "sparse")


def test_links_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("good.png", GOOD)
        link = zipfile.ZipInfo("odd.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    refused(tmp_path, tmp_path / "bad.zip", "'odd.png'", "link")


def symlink(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def folder_link(path: Path) -> None:
    path.symlink_to("/etc", target_is_directory=True)


@pytest.mark.parametrize("make", [symlink, folder_link, os.mkfifo])
def test_links_and_pipes_in_a_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    delivery = tmp_path / "delivery"
    tiny_source.put(delivery, "good.png", GOOD)
    make(delivery / "odd.png")
    root = tmp_path / "project"
    tiny_source.write_project(root, tmp_path)
    registry = (root / "dumps.yaml").read_bytes()
    with pytest.raises(archives.DumpRefused, match=r"delivery: 'odd\.png' is a link or a device"):
        add_dump.add(delivery, root=root, params=tiny_settings.params())
    assert (root / "dumps.yaml").read_bytes() == registry
    assert not list((root / "data/dumps").glob("*.tar"))


def test_folders_that_dotnet_writes_with_a_backslash_are_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("images\\", b"")
        archive.writestr("images\\0.png", b"x")
    limits = archives.ArchiveLimits(1 << 20, 1 << 20, 10, 100)
    assert [member.name for member in archives.read(tmp_path / "a.zip", limits)] == ["images/0.png"]
