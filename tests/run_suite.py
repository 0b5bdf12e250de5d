"""The whole suite, each room in a pytest of its own, as many side by side as there are cores: `python tests/run_suite.py`.

Rooms do not share a process: torch with its compiler, two inference runtimes and a game engine loaded into one process
ended once in a segmentation fault, which then names no room. Two lanes also halve the wait on two cores.
Arguments go to every pytest. Each room's output comes in one piece, when it has ended; the last line adds them up.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent
ROOMS = ("end_to_end", "training", "export", "serving", "pipeline", "benchmarks")  # the longest first
NO_TESTS = 5  # pytest's exit code when -k or -m left nothing
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|error|xfailed|xpassed)")


def run(room: str, arguments: list[str], lanes: int) -> tuple[int, dict[str, int]]:
    """One room's tests: its exit code (negative: the signal that ended it) and counts by outcome."""
    threads = max(1, (os.cpu_count() or 1) // lanes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    command = [sys.executable, "-m", "pytest", str(TESTS / room), *arguments]
    began = time.monotonic()
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = done.stdout.decode(errors="replace").rstrip()
    print(f"--- {room}: {time.monotonic() - began:.0f} s, exit code {done.returncode}\n{text}", flush=True)
    last = text.splitlines()[-1] if text else ""
    counts: dict[str, int] = {}
    for number, outcome in _COUNT.findall(last):
        counts[outcome] = int(number)
    return (0 if done.returncode == NO_TESTS else done.returncode), counts


def main() -> int:
    arguments, lanes = sys.argv[1:], max(1, min(len(ROOMS), os.cpu_count() or 1))
    began = time.monotonic()
    with ThreadPoolExecutor(lanes) as pool:
        ended = dict(zip(ROOMS, pool.map(lambda room: run(room, arguments, lanes), ROOMS), strict=True))
    bad = [f"{room} (exit code {code})" for room, (code, _) in ended.items() if code]
    total = {
        name: sum(counts.get(name, 0) for _, counts in ended.values())
        for name in ("passed", "failed", "error", "skipped")
    }
    if bad:
        print(f"not passed: {', '.join(bad)}")
    print(f"{time.monotonic() - began:.0f} s in {lanes} lanes")
    # A room that crashed counts no failed test of its own.
    failed = max(total["failed"] + total["error"], len(bad))
    print(f"{total['passed']} passed, {failed} failed, {total['skipped']} skipped")
    return 1 if bad or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
