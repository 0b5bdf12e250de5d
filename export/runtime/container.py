"""What the container that this process runs in may use, and has overdrawn: its control groups, v1 and v2.

Limits nest: a group has at most what each of those above it has, so the smallest on the way up counts. A container without
a quota may use what the machine has.
"""

import os
from collections.abc import Iterator
from pathlib import Path

MOUNTS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Version 1 writes "no limit" as the largest multiple of a page below 2^63; no machine has an exbibyte.
UNLIMITED = 1 << 60


def cpu_quota(mounts: Path = MOUNTS, membership: Path = MEMBERSHIP) -> float | None:
    """Processors' worth of time that the process may use, such as 1.5; None where nothing limits it."""
    quotas: list[float] = []
    for folder in _groups("cpu", mounts, membership):
        told = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        match [int(word) for word in told if word.lstrip("-").isdigit()]:
            case [quota, period] if quota > 0 and period > 0:
                quotas.append(quota / period)
    return min(quotas, default=None)


def memory_limit(mounts: Path = MOUNTS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that the process's groups may hold before the kernel ends one of them; None where nothing limits them."""
    limits: list[int] = []
    for folder in _groups("memory", mounts, membership):
        for word in _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes"):
            if word.isdigit() and int(word) < UNLIMITED:
                limits.append(int(word))
    return min(limits, default=None)


def machine_memory() -> int:
    """Bytes of the machine's memory, whoever holds them."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def oom_kills(mounts: Path = MOUNTS, membership: Path = MEMBERSHIP) -> int:
    """Processes of this process's innermost group that the kernel has ended for want of memory; 0 where none is counted."""
    for folder in _groups("memory", mounts, membership):
        for file in ("memory.events", "memory.oom_control"):
            words = _words(folder / file)
            counts = dict(zip(words[::2], words[1::2], strict=False))
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return 0


def _groups(controller: str, mounts: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups under the controller, the innermost first.

    A container often sees its own group as the root of the mount, while /proc names it by its path outside: a folder that
    is not there is passed over, the root is always looked at.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree and no controllers; in version 1 each has a tree of its own.
        root = mounts / controllers if controllers and (mounts / controllers).is_dir() else mounts
        if controllers and root == mounts:
            root = mounts / controller
        here = root / path.lstrip("/")
        while here != root and root in here.parents:
            if here.is_dir():
                yield here
            here = here.parent
        yield root


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
