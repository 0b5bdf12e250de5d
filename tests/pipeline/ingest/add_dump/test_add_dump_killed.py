"""A kill at any durable step of add-dump, or a disk that fills at any, leaves the registry as it was or complete."""

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.ingest import add_dump, dump_registry
from pipeline.storage import atomic, manifest, shards
from tests.support import tiny_settings, tiny_source

PARAMS = tiny_settings.params()


@pytest.fixture
def delivery(tmp_path: Path) -> Path:
    shards.write_tar(tmp_path / "d.tar", [(f"{n}.png", tiny_source.encode(tiny_source.picture(n))) for n in range(3)])
    return tmp_path / "d.tar"


def after(step: int, then: Callable[[], None], delivery: Path, root: Path) -> int:
    """Run add() in a child that calls `then` before its step-th sync or rename; returns the child's status.

    Syncs and renames are what makes anything durable: between two of them the disk's state is one of their two sides.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = step
    real_sync, real_replace = os.fsync, Path.replace

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            then()

    def fsync(handle: int) -> None:
        count()
        real_sync(handle)

    def replace(self: Path, target: Path) -> Path:
        count()
        return real_replace(self, target)

    code = 3
    try:
        os.fsync, Path.replace = fsync, replace  # type: ignore[assignment,method-assign]
        add_dump.add(delivery, root=root, params=PARAMS)
        code = 0 if left > 0 else 4  # 0: there were fewer steps than that
    except OSError as error:
        code = 5 if error.errno == errno.ENOSPC else 6
    finally:
        os._exit(code)


def whole(root: Path, before: bytes) -> bool:
    """True when the dump is registered, and then complete; False when the registry is untouched."""
    if (root / "dumps.yaml").read_bytes() == before:
        return False
    entry = dump_registry.read_dumps(root / "dumps.yaml").dumps["d"]
    assert manifest.content_hash(root / entry.archive) == entry.sha256
    return True


def test_killed_at_every_step(tmp_path: Path, delivery: Path) -> None:
    outcomes = []
    for step in range(1, 30):
        root = tmp_path / f"project{step}"
        tiny_source.write_project(root, tmp_path)
        before = (root / "dumps.yaml").read_bytes()
        status = after(step, lambda: os.kill(os.getpid(), signal.SIGKILL), delivery, root)
        outcomes.append(whole(root, before))
        again = add_dump.add(delivery, root=root, params=PARAMS)  # the lock went with the process
        assert (again.name if again.same_as is None else again.same_as) == "d"
        assert whole(root, before)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert outcomes == sorted(outcomes)  # untouched up to a point, complete from there on
    assert outcomes.count(False) >= 5
    assert outcomes.count(True) >= 2  # the registry's rename is not the last step: its folder's sync is


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system of its own may be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place: Path) -> None:
    """Leave not a byte."""
    with (place / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    assert os.statvfs(place).f_bavail == 0


def test_the_disk_fills_at_every_step(
    small_disk: Path, delivery: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(add_dump, "RESERVE", 0)
    codes = []
    for step in range(1, 30):
        root = small_disk / f"project{step}"
        tiny_source.write_project(root, tmp_path)
        (root / "data/dumps").mkdir(parents=True)
        before = (root / "dumps.yaml").read_bytes()
        codes.append(os.waitstatus_to_exitcode(after(step, lambda: fill(small_disk), delivery, root)))
        done = whole(root, before)
        assert done or codes[-1] == 5  # who is told of success has the dump
        (small_disk / "ballast").unlink(missing_ok=True)
        assert not list((root / "data/dumps").glob(".adding-*"))
        add_dump.add(delivery, root=root, params=PARAMS)
        assert whole(root, before)
        if codes[-1] == 0:
            break
    assert 5 in codes  # some step did meet the full disk
    assert set(codes) <= {0, 4, 5}


def test_a_dump_larger_than_the_disk_is_refused_before_it_fills(small_disk: Path, tmp_path: Path) -> None:
    root = small_disk / "project"
    tiny_source.write_project(root, tmp_path)
    before = (root / "dumps.yaml").read_bytes()
    shards.write_tar(tmp_path / "big.tar", [("a.png", tiny_source.encode(tiny_source.picture(1)) + bytes(3 << 20))])
    with pytest.raises(ValueError, match="what the disk has room for"):
        add_dump.add(tmp_path / "big.tar", root=root, params=PARAMS)
    assert (root / "dumps.yaml").read_bytes() == before
    atomic.write_text(root / "note", "there is room left")
