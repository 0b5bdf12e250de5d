"""The suite, each room in a pytest of its own, as many at once as there are cores: `python tests/run_suite.py [ARGUMENTS]`.

Arguments go to every pytest: `-m "not slow"` is what `make check` runs. Each room's output comes in one piece when it has
ended; the last line adds them up.

Rooms do not share a process: in one process the suite can end in a segmentation fault (exit code 139) in native code, of
which faulthandler shows nothing. It was seen in training/engine/test_substrate.py, in a plain training on the CPU, after
test_compile.py, pipeline/demo and export had run in the same process. Parts of these in one process, in two orders, passed,
with one OpenMP runtime loaded (libgomp; OpenVINO brings TBB). Which pair of libraries it is, is not known.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
LONGEST_FIRST = ("end_to_end", "training", "export", "serving", "pipeline")
NO_TESTS = 5  # pytest's exit code when -k or -m left nothing
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")


@dataclass(frozen=True)
class Result:
    """A room's exit code (negative: the signal that ended it) and how many of its tests had which outcome."""

    room: str
    code: int
    counts: dict[str, int]


def rooms() -> list[str]:
    """Folders below tests/ that hold tests, the longest first, and the files beside them as one room, `.`."""
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/test_*.py")}
    others = sorted(folders - set(LONGEST_FIRST))
    beside = ["."] if list(TESTS.glob("test_*.py")) else []
    return [*(room for room in LONGEST_FIRST if room in folders), *others, *beside]


def run_room(room: str, arguments: list[str], threads: int) -> Result:
    # Bytecode is kept: without it every process that imports torch compiles thousands of files again.
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    paths = sorted(TESTS.glob("test_*.py")) if room == "." else [TESTS / room]
    command = [sys.executable, "-m", "pytest", *map(str, paths), *arguments]
    began = time.monotonic()
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    text = done.stdout.decode(errors="replace").rstrip()
    print(f"--- {room}: {time.monotonic() - began:.0f} s, exit code {done.returncode}\n{text}", flush=True)
    last_line = text.splitlines()[-1] if text else ""
    counts = {outcome: int(number) for number, outcome in _COUNT.findall(last_line)}
    return Result(room, 0 if done.returncode == NO_TESTS else done.returncode, counts)


def main(arguments: list[str]) -> int:
    cores = os.cpu_count() or 1
    names = rooms()
    at_once = max(1, min(len(names), cores))
    threads = max(1, cores // at_once)

    began = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(lambda room: run_room(room, arguments, threads), names))

    bad = [f"{result.room} (exit code {result.code})" for result in results if result.code]
    if bad:
        print(f"not passed: {', '.join(bad)}")
    total = {
        key: sum(result.counts.get(key, 0) for result in results) for key in ("passed", "failed", "error", "skipped")
    }
    failed = max(total["failed"] + total["error"], len(bad))  # a room that crashed counts no failed test of its own
    print(f"{time.monotonic() - began:.0f} s, {at_once} rooms at a time")
    print(f"{total['passed']} passed, {failed} failed, {total['skipped']} skipped")
    return 1 if bad or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
