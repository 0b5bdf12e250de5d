"""An engine of another card, driver or version, or a damaged one, is built anew; the old file is kept aside.

The cache does not know what an engine is, so here it is some bytes, and building it is a line in a file that says who
built it. Processes are real.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.tensorrt import cache as engine_cache
from export.tensorrt.builder import Built
from export.tensorrt.cache import Cache, Key
from export.tensorrt.installation import EngineError
from export.tensorrt.profile import Profile

ROOT = Path(__file__).parents[3]
PROFILE = Profile.of(long_side=64, stride=16)
KEY = Key("tensorrt", "11.4.0", "NVIDIA H100", "9.0", "580.65", "a" * 64, "fp32", PROFILE)
CHANGES = {
    "module": "tensorrt_rtx", "version": "11.4.1", "card": "NVIDIA L4", "compute_capability": "8.9", "driver": "580.95",
    "onnx_sha256": "b" * 64, "precision": "tf32", "profile": Profile.of(long_side=64, stride=16, max_batch=2),
    "recipe": KEY.recipe + 1,
}  # fmt: skip
OTHERS = [dataclasses.replace(KEY, **{field: value}) for field, value in CHANGES.items()]
PAYLOAD = bytes(range(256)) * 64


class Builder:
    """Builds `PAYLOAD`; loading refuses what is in `refused`."""

    def __init__(self, payload: bytes = PAYLOAD) -> None:
        self.payload, self.built, self.timings = payload, 0, list[bytes]()
        self.refused: set[bytes] = set()

    def make(self, timings: bytes) -> Built:
        self.built += 1
        self.timings.append(timings)
        return Built(self.payload, b"timings %d" % self.built)

    def load(self, payload: bytes) -> bytes | None:
        return None if payload in self.refused else payload

    def obtain(self, folder: Path, key: Key = KEY, **options: bool) -> tuple[bytes, bool]:
        return Cache(folder).obtain(key, self.make, self.load, **options)


def aside(folder: Path) -> list[str]:
    return sorted(p.suffix[1:] for p in folder.iterdir() if p.suffix in (".damaged", ".stale"))


def test_every_field_is_part_of_the_key(tmp_path: Path) -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Key)}
    assert len({KEY.digest, *(other.digest for other in OTHERS)}) == len(OTHERS) + 1
    assert KEY.digest == dataclasses.replace(KEY).digest
    builder = Builder()
    for count, key in enumerate((KEY, *OTHERS), 1):
        assert builder.obtain(tmp_path, key) == (PAYLOAD, False)
        assert builder.obtain(tmp_path, key) == (PAYLOAD, True)
        assert builder.built == count
    assert not aside(tmp_path)


def test_rebuild_replaces(tmp_path: Path) -> None:
    builder = Builder()
    builder.obtain(tmp_path)
    builder.payload = b"newer"
    assert builder.obtain(tmp_path, rebuild=True) == (b"newer", False)
    assert builder.obtain(tmp_path) == (b"newer", True)


def damages(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    middle = len(data) // 2
    return {
        "empty": b"",
        "cut inside the header": data[:40],
        "cut before the payload": data[: data.index(b"\n") + 1],
        "last byte missing": data[:-1],
        "half": data[:middle],
        "a bit of the payload": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
        "a bit of the header": bytes([data[0] ^ 1]) + data[1:],
        "a byte too much": data + b"\0",
        "not JSON's types": b"[1]\n" + PAYLOAD,
        "no fields": b"{}\n" + PAYLOAD,
        "nested": b"[" * 60_000,
        "not text": b"\xff" * 1000,
    }


def test_damage_is_set_aside_and_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    builder = Builder()
    builder.obtain(tmp_path)
    path = Cache(tmp_path).path(KEY)
    good = path.read_bytes()
    for count, (what, data) in enumerate(damages(path).items(), 2):
        path.write_bytes(data)
        caplog.clear()
        assert builder.obtain(tmp_path) == (PAYLOAD, False), what
        assert builder.built == count, what
        assert path.read_bytes() == good, what
        assert "damaged" in caplog.text, what
        assert builder.obtain(tmp_path) == (PAYLOAD, True), what
        newest = max(tmp_path.glob("*.damaged"), key=lambda p: p.stat().st_mtime_ns)
        assert newest.read_bytes() == data, what
    assert aside(tmp_path) == ["damaged"] * engine_cache.KEPT_ASIDE  # bounded


def test_an_engine_of_another_card_or_version_under_this_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Copied or renamed by hand: whole, but not what its name says."""
    builder, cache = Builder(), Cache(tmp_path)
    for other, field in zip(OTHERS, CHANGES, strict=True):
        Builder(b"another").obtain(tmp_path, other)
        cache.path(other).replace(cache.path(KEY))
        caplog.clear()
        assert builder.obtain(tmp_path) == (PAYLOAD, False)
        assert f"stale (made for another {field})" in caplog.text
    assert aside(tmp_path) == ["stale"] * engine_cache.KEPT_ASIDE


def test_tensorrt_does_not_take_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    builder = Builder(b"of an odd driver")
    builder.obtain(tmp_path)
    builder.refused, builder.payload = {b"of an odd driver"}, PAYLOAD
    assert builder.obtain(tmp_path) == (PAYLOAD, False)
    assert aside(tmp_path) == ["stale"]
    assert "TensorRT does not take it" in caplog.text
    builder.refused.add(PAYLOAD)
    with pytest.raises(EngineError, match=r"built just now cannot be loaded by tensorrt 11\.4\.0"):
        builder.obtain(tmp_path)


def test_timings_are_kept_per_machine_and_checked(tmp_path: Path) -> None:
    builder = Builder()
    for changed in (KEY, OTHERS[6], OTHERS[2]):  # the same machine for another precision, then another card
        builder.obtain(tmp_path, changed)
    assert builder.timings == [b"", b"timings 1", b""]
    for path in tmp_path.glob("*.timings"):
        path.write_bytes(path.read_bytes()[:-1])
    builder.obtain(tmp_path, KEY, rebuild=True)
    assert builder.timings[-1] == b""
    assert aside(tmp_path) == ["damaged"]


def test_a_full_or_read_only_disk_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    builder = Builder()
    for count in (1, 2):  # a folder that cannot be made
        assert builder.obtain(tmp_path / "file" / "cache") == (PAYLOAD, False)
        assert builder.built == count
    Cache(tmp_path).path(KEY).mkdir()  # something that can be neither read nor replaced
    assert builder.obtain(tmp_path) == (PAYLOAD, False)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine_cache.atomic, "replacing", full)
    assert builder.obtain(tmp_path / "full") == (PAYLOAD, False)
    assert "No space left on device" in caplog.text


def test_old_engines_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "KEPT", 3)
    builder = Builder()
    keys = [dataclasses.replace(KEY, driver=str(i)) for i in range(5)]
    for key in keys:
        builder.obtain(tmp_path, key)
        assert builder.obtain(tmp_path, keys[0])[1]  # in use all the time, so it stays
        time.sleep(0.01)
    left = set(tmp_path.glob("*.engine"))
    assert left == {Cache(tmp_path).path(key) for key in (keys[0], keys[3], keys[4])}


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert engine_cache.default_folder() == Path(".marginalia/engines")
    assert (tmp_path / ".marginalia/engines").is_dir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path(".marginalia").touch()  # nothing can be made below it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert engine_cache.default_folder() == tmp_path / "xdg/marginalia/engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert engine_cache.default_folder() == tmp_path / "home/.cache/marginalia/engines"


BUILD = """
import sys, time
from pathlib import Path
from tests.export.tensorrt.test_cache import KEY, PAYLOAD
from export.tensorrt.cache import Cache
from export.tensorrt.builder import Built

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

def make(timings):
    with (folder / "builders").open("a") as file:
        file.write(f"{sys.argv[3]}\\n")
    time.sleep(seconds)
    return Built(PAYLOAD, b"")

engine, cached = Cache(folder).obtain(KEY, make, lambda payload: payload)
print(engine == PAYLOAD, cached)
"""


def start(folder: Path, seconds: float, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(folder), str(seconds), name]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def builders(folder: Path) -> list[str]:
    path = folder / "builders"
    return path.read_text().split() if path.exists() else []


def await_builder(folder: Path) -> None:
    until = time.monotonic() + 60
    while not builders(folder) and time.monotonic() < until:
        time.sleep(0.02)
    assert builders(folder)


def test_the_second_process_waits_for_the_first(tmp_path: Path) -> None:
    first = start(tmp_path, 1.5, "first")
    await_builder(tmp_path)
    builder = Builder()
    assert builder.obtain(tmp_path) == (PAYLOAD, True)
    assert builder.built == 0
    assert first.communicate(timeout=60)[0].strip() == "True False"
    assert builders(tmp_path) == ["first"]


def test_a_killed_builder_blocks_nobody(tmp_path: Path) -> None:
    killed = start(tmp_path, 600, "killed")
    await_builder(tmp_path)
    (tmp_path / f".{Cache(tmp_path).path(KEY).name}.x.part").write_bytes(b"half")
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    builder = Builder()
    assert builder.obtain(tmp_path) == (PAYLOAD, False)
    assert builder.obtain(tmp_path) == (PAYLOAD, True)
    assert not list(tmp_path.glob(".*.part"))


def test_a_builder_that_hangs_is_waited_for_only_so_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hanging = start(tmp_path, 600, "hanging")
    try:
        await_builder(tmp_path)
        builder, started = Builder(), time.monotonic()
        assert Cache(tmp_path, wait=0.5).obtain(KEY, builder.make, builder.load) == (PAYLOAD, False)
        assert 0.5 <= time.monotonic() - started < 10
        assert "still held after 0.5 s" in caplog.text
        assert Cache(tmp_path, wait=0.1).obtain(KEY, builder.make, builder.load) == (PAYLOAD, True)
    finally:
        hanging.kill()
        hanging.communicate(timeout=60)
