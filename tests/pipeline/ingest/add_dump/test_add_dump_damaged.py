"""Damaged, repeated and overlapping deliveries leave nothing half done and bring in only what is new."""

import bz2
import gzip
import io
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from pipeline.ingest import add_dump, dump_registry
from pipeline.storage import archives, atomic
from tests.support import tiny_settings, tiny_source
from tests.support.tiny_source import tar

PICTURES = {f"{n:02d}.png": tiny_source.encode(tiny_source.picture(n)) for n in range(8)}


def zipped(pictures: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in pictures.items():
            archive.writestr(name, data)
    return out.getvalue()


FORMS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "a.tar": tar,
    "a.zip": zipped,
    "a.tar.gz": lambda p: gzip.compress(tar(p)),
    "a.tar.bz2": lambda p: bz2.compress(tar(p)),
    "a.tar.xz": lambda p: lzma.compress(tar(p)),
    "a.tar.zst": lambda p: zstandard.ZstdCompressor(write_checksum=True).compress(tar(p)),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_source.write_project(tmp_path / "project", tmp_path)
    return tmp_path / "project"


def refused(root: Path, delivery: Path) -> str:
    before = (root / "dumps.yaml").read_bytes()
    with pytest.raises(archives.DumpRefused) as error:
        add_dump.add(delivery, root=root, params=tiny_settings.params())
    assert delivery.name in str(error.value)
    assert (root / "dumps.yaml").read_bytes() == before
    assert [p.name for p in (root / "data/dumps").iterdir() if p.name != ".lock"] == []
    return str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_truncated_anywhere(tmp_path: Path, root: Path, form: str) -> None:
    whole = FORMS[form](PICTURES)
    content = len(tar(PICTURES).rstrip(b"\0")) if form == "a.tar" else len(whole) - 12
    for share in (0.02, 0.3, 0.5, 0.77, 0.98, 1.0):
        (tmp_path / form).write_bytes(whole[: int(share * content)])
        refused(root, tmp_path / form)


def test_tar_cut_exactly_between_two_members(tmp_path: Path, root: Path) -> None:
    whole = tar(PICTURES)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        edge = archive.getmembers()[5].offset
    (tmp_path / "a.tar").write_bytes(whole[:edge])
    assert "the tar's end is missing" in refused(root, tmp_path / "a.tar")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "a.tar"])
def test_flipped_bits_fail_the_checksum(tmp_path: Path, root: Path, form: str) -> None:
    whole = FORMS[form](PICTURES)
    for share in (0.1, 0.4, 0.6):
        broken = bytearray(whole)
        broken[int(share * len(whole))] ^= 0x10
        (tmp_path / form).write_bytes(broken)
        refused(root, tmp_path / form)


def test_encrypted_zip_and_nonsense(tmp_path: Path, root: Path) -> None:
    whole = bytearray(zipped(PICTURES))
    whole[whole.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(whole)
    assert "encrypted" in refused(root, tmp_path / "a.zip")
    for data in (b"", b"hello", b"\0" * 100, os.urandom(4000)):
        (tmp_path / "b.zip").write_bytes(b"x" + data)
        assert "not a folder, zip or tar" in refused(root, tmp_path / "b.zip")


def test_killed_half_way_and_then_repeated(tmp_path: Path, root: Path) -> None:
    """kill -9 while the delivery is read: the registry is as before, and the same call then succeeds."""
    pipe = tmp_path / "slow.tar"
    (tmp_path / "whole.tar").write_bytes(tar(PICTURES))
    before = (root / "dumps.yaml").read_bytes()
    code = (
        "import sys, time; from pathlib import Path; from tests.support import tiny_settings\n"
        "from pipeline.ingest import add_dump as dumps\n"
        "def seen(share):\n    print(share, flush=True); time.sleep(0.2)\n"
        "dumps.add(Path(sys.argv[1]), name='d', root=Path(sys.argv[2]), params=tiny_settings.params(), seen=seen)"
    )
    pipe.write_bytes((tmp_path / "whole.tar").read_bytes())
    with subprocess.Popen([sys.executable, "-c", code, str(pipe), str(root)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert (root / "dumps.yaml").read_bytes() == before
    assert not (root / "data/dumps/d.tar").exists()
    stale = next((root / "data/dumps").glob(".adding-*"))
    os.utime(stale, (time.time() - 2 * 86_400,) * 2)
    assert add_dump.add(pipe, name="d", root=root, params=tiny_settings.params()).images == 8
    assert not stale.exists()  # left-overs go after a day


@pytest.mark.parametrize("form", FORMS)
def test_the_same_files_again_change_nothing(tmp_path: Path, root: Path, form: str) -> None:
    (tmp_path / "first.tar").write_bytes(tar(PICTURES))
    first = add_dump.add(tmp_path / "first.tar", root=root, params=tiny_settings.params())
    before = (root / "dumps.yaml").read_bytes(), atomic.sha256(root / "data/dumps/first.tar")
    shuffled = dict(sorted(PICTURES.items(), key=lambda item: atomic.sha256(item[1])))
    assert list(shuffled) != list(PICTURES)
    for n, pictures in enumerate((PICTURES, shuffled, {f"renamed/{k}": v for k, v in shuffled.items()})):
        (tmp_path / form).write_bytes(FORMS[form](pictures))
        again = add_dump.add(tmp_path / form, name=f"again{n}", root=root, params=tiny_settings.params())
        assert (again.same_as, again.sha256) == ("first", first.sha256)
    assert (root / "dumps.yaml").read_bytes() == before[0]
    assert atomic.sha256(root / "data/dumps/first.tar") == before[1]
    assert sorted(p.name for p in (root / "data/dumps").iterdir()) == [".lock", "first.tar"]
    fewer = dict(list(PICTURES.items())[1:])
    (tmp_path / form).write_bytes(FORMS[form](fewer))
    assert add_dump.add(tmp_path / form, name="fewer", root=root, params=tiny_settings.params()).same_as is None


def test_only_the_new_images_enter(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 10, "b": 5, "c": 5})
    tiny_source.write_project(root, source)
    assert tiny_source.run(root) == 0
    old = tiny_source.rows(root)
    seen = {f"{n:02d}.png": (source / f"images/a/{n:02d}.png").read_bytes() for n in range(10)}
    seen |= {f"b{n}.webp": tiny_source.encode(tiny_source.picture(2000 + n), "WEBP", lossless=True) for n in range(5)}
    seen |= {f"c{n}.jpg": tiny_source.encode(tiny_source.picture(3000 + n), "JPEG", quality=97) for n in range(4)}
    (tmp_path / "d.tar").write_bytes(tar(seen | {"new.png": tiny_source.encode(tiny_source.picture(9))}))
    added = add_dump.add(tmp_path / "d.tar", root=root, params=tiny_settings.params())
    assert added.images == 20
    assert tiny_source.run(root, dumps=("base", "d")) == 0
    now = tiny_source.rows(root)
    assert set(now) - set(old) == {"d/new"}
    assert {key: now[key] for key in old} == old
    assert now["d/new"].split == "unlabelled"
    codes = [item["code"] for item in tiny_source.quarantine(root).values()]
    assert sorted(codes) == ["duplicate"] * 15 + ["near-duplicate"] * 4
    assert list(dump_registry.read_dumps(root / "dumps.yaml").dumps) == ["base", "d"]
