"""A file is the old version or the new one, whatever happens in between."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.storage import atomic


def test_write_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    atomic.write_text(target, "one")
    atomic.write_bytes(target, b"two\n")
    assert target.read_bytes() == b"two\n"
    assert os.listdir(target.parent) == ["a.txt"]  # noqa: PTH208
    assert target.stat().st_mode & 0o777 == 0o644


def test_failure_inside_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def fail_half_way() -> None:
        with atomic.replacing(target) as file:
            file.write(b"new and a lot more")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    versions = {bytes([65 + n]) * 200_000 for n in range(4)}
    atomic.write_bytes(target, min(versions))
    stop, odd = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            if (seen := target.read_bytes()) not in versions:
                odd.append(len(seen))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(20):
        for version in versions:
            atomic.write_bytes(target, version)
    stop.set()
    reader.join()
    assert not odd


def test_kill_during_a_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    code = (
        "import sys, time; from pathlib import Path; from pipeline.storage import atomic as files\n"
        "with files.replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'x' * 100000); file.flush(); print('half', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert target.read_bytes() == b"old"


def test_json_is_sorted_and_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    atomic.write_json(target, {"b": 1, "a": ["ü"]})
    assert target.read_text(encoding="utf-8") == '{\n  "a": [\n    "ü"\n  ],\n  "b": 1\n}\n'
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            atomic.write_json(target, {"a": bad})
    assert atomic.read_json(target) == {"a": ["ü"], "b": 1}


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "scores.json"
    target.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"scores\.json"):
        atomic.read_json(target)


def test_sha256_of_bytes_and_files_is_the_standard_one(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000  # more than one piece
    target = tmp_path / "a"
    target.write_bytes(data)
    assert atomic.sha256(data) == atomic.sha256(target) == hashlib.sha256(data).hexdigest()
    assert atomic.sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic.replacing_folder(target) as folder:
        (folder / "one").write_text("1")

    def fail_half_way() -> None:
        with atomic.replacing_folder(target) as folder:
            (folder / "two").write_text("2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert [p.name for p in target.iterdir()] == ["one"]
    (tmp_path / ".bundle.left.part").mkdir()  # what a killed run leaves
    with atomic.replacing_folder(target) as folder:
        (folder / "three").write_text("3")
    assert [p.name for p in target.iterdir()] == ["three"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_is_put_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    with atomic.replacing_folder(target) as folder:
        (folder / "one").write_text("1")
    rename = Path.replace

    def disk_fails(self: Path, place: Path) -> Path:
        if place == target and ".old." not in self.name:
            raise OSError("no")
        return rename(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", disk_fails)
        with pytest.raises(OSError, match="no"), atomic.replacing_folder(target) as folder:
            (folder / "two").write_text("2")
    assert [p.name for p in target.iterdir()] == ["one"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_left_aside_by_a_killed_run_is_put_back_first(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    (tmp_path / ".bundle.x.old.part").mkdir()
    (tmp_path / ".bundle.x.old.part/one").write_text("1")

    def fail() -> None:
        with atomic.replacing_folder(target):
            assert [p.name for p in target.iterdir()] == ["one"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in target.iterdir()] == ["one"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
