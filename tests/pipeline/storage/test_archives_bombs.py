"""Decompression bombs stop at the byte and ratio caps, before the disk fills and with flat memory."""

import bz2
import copy
import gzip
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.ingest import add_dump
from pipeline.storage import archives
from tests.support import tiny_settings, tiny_source

GOOD = tiny_source.encode(tiny_source.picture(1))
# Runs add() where no file may grow beyond 64 MiB, and reports by how much memory grew.
CODE = """
import resource, sys
from pathlib import Path
from pipeline.storage import archives; from pipeline.ingest import add_dump as dumps
from tests.support import tiny_settings
params = tiny_settings.params(ingest={"dump_max_gb": float(sys.argv[3])})
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    dumps.add(Path(sys.argv[1]), root=Path(sys.argv[2]), params=params)
except archives.DumpRefused as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
"""


def refused(tmp_path: Path, delivery: Path, message: str, *, max_gb: float = 64, growth_mb: int = 64) -> None:
    root = tmp_path / "project"
    tiny_source.write_project(root, tmp_path)
    registry = (root / "dumps.yaml").read_bytes()
    command = [sys.executable, "-c", CODE, str(delivery), str(root), str(max_gb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    growth, _, text = done.stdout.partition(" ")
    assert message in text, done.stdout + done.stderr
    assert int(growth) <= growth_mb
    assert (root / "dumps.yaml").read_bytes() == registry
    assert [p.name for p in (root / "data/dumps").iterdir()] == []


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf()


def test_10_kb_that_unpack_to_10_gb(tmp_path: Path) -> None:
    part = 64 << 20
    zeros = bz2.compress(bytes(part))
    delivery = tmp_path / "bomb.tar.bz2"
    members = b"".join(bz2.compress(header(f"{n}.png", part)) + zeros for n in range(160))
    delivery.write_bytes(members + bz2.compress(bytes(1024)))
    assert delivery.stat().st_size < 60_000
    refused(tmp_path, delivery, "decompression bomb", growth_mb=200)


def test_one_member_that_is_left_out_for_its_size_still_counts(tmp_path: Path) -> None:
    part = 64 << 20
    delivery = tmp_path / "bomb.tar.bz2"
    delivery.write_bytes(bz2.compress(header("a.png", 160 * part)) + bz2.compress(bytes(part)) * 160)
    refused(tmp_path, delivery, "decompression bomb")


def test_overlapping_zip_entries(tmp_path: Path) -> None:
    """D. Fifield's construction: every directory entry points at the same compressed kernel."""
    delivery = tmp_path / "bomb.zip"
    with zipfile.ZipFile(delivery, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(1 << 20))
        for n in range(1, 3000):
            entry = copy.copy(archive.filelist[0])
            entry.filename = f"{n}.png"
            archive.filelist.append(entry)
    assert delivery.stat().st_size < 200_000
    refused(tmp_path, delivery, "decompression bomb")


def test_zip_that_lies_about_its_sizes(tmp_path: Path) -> None:
    delivery = tmp_path / "liar.zip"
    with zipfile.ZipFile(delivery, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(300 << 20))
        archive.filelist[0].file_size = 1000  # in the central directory, which is what is believed
    refused(tmp_path, delivery, "damaged or unreadable zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods_that_cannot_be_unpacked_in_pieces(tmp_path: Path, method: int) -> None:
    delivery = tmp_path / "other.zip"
    with zipfile.ZipFile(delivery, "w", method) as archive:
        archive.writestr("a.png", GOOD)
    refused(tmp_path, delivery, "use deflate")


def test_byte_cap_before_the_ratio_cap(tmp_path: Path) -> None:
    noise = b"".join(tiny_source.encode(tiny_source.picture(n, 300, 300)) for n in range(5))
    delivery = tmp_path / "much.tar.gz"
    body = b"".join(header(f"{n}.png", 1 << 20) + (noise * 20)[: 1 << 20] for n in range(40))
    delivery.write_bytes(gzip.compress(body + bytes(1024), 1))
    refused(tmp_path, delivery, "ingest.dump_max_gb", max_gb=0.01)
    with zipfile.ZipFile(tmp_path / "much.zip", "w") as archive:
        for n in range(12):
            archive.writestr(f"{n}.png", (noise * 20)[: 1 << 20])
    refused(tmp_path, tmp_path / "much.zip", "ingest.dump_max_gb", max_gb=0.01)


def test_too_many_files(tmp_path: Path) -> None:
    delivery = tmp_path / "many.tar"
    with tarfile.open(delivery, "w") as tar:
        for n in range(12):
            tar.addfile(tarfile.TarInfo(f"{n}.txt"))
    tiny_source.write_project(tmp_path / "project", tmp_path)
    params = tiny_settings.params(ingest={"dump_max_files": 10})
    with pytest.raises(archives.DumpRefused, match="more than 10 files"):
        add_dump.add(delivery, root=tmp_path / "project", params=params)


def test_a_header_as_large_as_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    delivery = tmp_path / "header.tar"
    with delivery.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(9 << 30)  # sparse: costs no disk
    refused(tmp_path, delivery, "extended header")


def test_archives_inside_are_not_opened(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(50 << 20))
    delivery = tmp_path / "outer.zip"
    with zipfile.ZipFile(delivery, "w") as archive:
        archive.writestr("good.png", GOOD)
        archive.writestr("inner.zip", inner.getvalue())
    tiny_source.write_project(tmp_path / "project", tmp_path)
    added = add_dump.add(delivery, root=tmp_path / "project", params=tiny_settings.params())
    assert added.images == 1
    assert added.skipped == [("inner.zip", "archive inside the archive, not opened")]
