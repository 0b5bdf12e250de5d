"""What this machine's processor is and can do, from /proc/cpuinfo; nothing elsewhere."""

import math
import os
from pathlib import Path

from export.runtime import container

CPUINFO = Path("/proc/cpuinfo")


def _processors() -> list[dict[str, str]]:
    try:
        text = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return []
    blocks = [block.splitlines() for block in text.split("\n\n") if block.strip()]
    split = [[line.partition(":") for line in lines] for lines in blocks]
    return [{key.strip(): value.strip() for key, _, value in lines} for lines in split]


def cores() -> int:
    """Cores this process may use, hyper-threads counted once where /proc/cpuinfo tells; at most its container's CPU
    quota, rounded up: more threads would use the quota up early in each period and stand still for the rest."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    told = [p for p in _processors() if "core id" in p and int(p.get("processor", -1)) in usable]
    physical = {(p.get("physical id", "0"), p["core id"]) for p in told}
    quota = container.cpu_quota()
    allowed = len(usable) if quota is None else math.ceil(quota)
    return max(1, min(len(usable), len(physical) or len(usable), allowed))


def flags() -> set[str]:
    """Instruction sets by the kernel's names; empty where the system does not tell."""
    first = next(iter(_processors()), {})
    return set((first.get("flags") or first.get("Features") or "").split())


def name() -> str:
    first = next(iter(_processors()), {})
    return first.get("model name", "unknown processor")
