"""Limits of control groups, on made-up trees of both versions and on this machine's own where it lets us make a group."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.runtime import container, cpu

V1_UNLIMITED = 9223372036854771712  # as the kernel writes it


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def test_version_2_takes_the_smallest_limit_on_the_way_up(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/pod/service\n")
    mounts = tmp_path / "fs"
    write(mounts, cpu__max="max 100000", memory__max="max")
    write(mounts / "pod", cpu__max="150000 100000", memory__max="1073741824")
    write(mounts / "pod/service", cpu__max="400000 100000", memory__max="2147483648")
    assert container.cpu_quota(mounts, membership) == 1.5
    assert container.memory_limit(mounts, membership) == 1 << 30


def test_version_1_has_a_tree_for_each_controller(tmp_path: Path, membership: Path) -> None:
    membership.write_text("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n")
    mounts = tmp_path / "fs"
    write(mounts / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(mounts / "cpu,cpuacct/docker/abc", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    write(mounts / "memory", memory__limit_in_bytes=str(V1_UNLIMITED))
    write(mounts / "memory/docker/abc", memory__limit_in_bytes="536870912")
    assert container.cpu_quota(mounts, membership) == 0.5
    assert container.memory_limit(mounts, membership) == 1 << 29


def test_version_1_controllers_that_are_mounted_apart_or_together(tmp_path: Path, membership: Path) -> None:
    membership.write_text("3:cpu,cpuacct:/\n")
    write(tmp_path / "fs/cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert container.cpu_quota(tmp_path / "fs", membership) == 3


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/kubepods/pod1/abc\n")  # a path of the machine outside
    write(tmp_path / "fs", cpu__max="200000 100000", memory__max="1000000")
    assert container.cpu_quota(tmp_path / "fs", membership) == 2
    assert container.memory_limit(tmp_path / "fs", membership) == 1_000_000


@pytest.mark.parametrize("text", ["0::/\n", "3:cpu,cpuacct:/\n4:memory:/\n", ""])
def test_no_limit_is_none(tmp_path: Path, membership: Path, text: str) -> None:
    membership.write_text(text)
    write(tmp_path / "fs", cpu__max="max 100000", memory__max="max")
    write(tmp_path / "fs/cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(tmp_path / "fs/memory", memory__limit_in_bytes=str(V1_UNLIMITED))
    assert container.cpu_quota(tmp_path / "fs", membership) is None
    assert container.memory_limit(tmp_path / "fs", membership) is None


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert container.cpu_quota(tmp_path, tmp_path / "absent") is None
    assert container.memory_limit(tmp_path, tmp_path / "absent") is None


@pytest.fixture
def half_a_core() -> Iterator[Path]:
    """A real group with half a processor's time."""
    folder = Path(f"/sys/fs/cgroup/cpu/marginalia-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "cpu.cfs_quota_us").write_text("50000")
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here: {error}")
    yield folder
    folder.rmdir()


def test_a_real_group_limits_the_threads(half_a_core: Path) -> None:
    program = (
        f"import os, pathlib; pathlib.Path({str(half_a_core / 'cgroup.procs')!r}).write_text(str(os.getpid()));"
        "from export.runtime import container, cpu; print(container.cpu_quota(), cpu.cores())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["0.5", "1"]


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (1.0, 1), (1.5, 2), (None, 8), (64.0, 8)])
def test_cores_are_the_quota_rounded_up(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    monkeypatch.setattr(container, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cpu, "_processors", lambda: [])
    assert cpu.cores() == cores


def test_oom_kills_of_the_innermost_group_in_both_versions(tmp_path: Path, membership: Path) -> None:
    mounts = tmp_path / "fs"
    membership.write_text("0::/pod/service\n")
    assert container.oom_kills(mounts, membership) == 0
    write(mounts / "pod", memory__events="low 0\nhigh 3\nmax 9\noom 2\noom_kill 7\noom_group_kill 1")
    write(mounts / "pod/service", memory__events="low 0\nhigh 3\nmax 9\noom 2\noom_kill 4\noom_group_kill 1")
    assert container.oom_kills(mounts, membership) == 4

    membership.write_text("4:memory:/docker/abc\n")
    write(mounts / "memory/docker/abc", memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 2")
    assert container.oom_kills(mounts, membership) == 2
