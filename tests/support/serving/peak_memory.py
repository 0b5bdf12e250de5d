"""How many bytes a call takes at its peak: each in a process of its own, forked from one that has imported everything."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[3]


def high_water() -> int:
    """Largest resident memory of this process so far, in bytes; a forked one begins with what it holds."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) << 10


def growth(call: Callable[[bytes], object], path: Path) -> int:
    """Bytes by which the peak grows while `call` works on a file's bytes, which are there before, in a fork of this process.

    Raises:
        RuntimeError: the call failed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            data = path.read_bytes()
            before = high_water()
            call(data)
            os.write(writer, str(high_water() - before).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    told = os.read(reader, 32)
    os.close(reader)
    if status:
        raise RuntimeError(f"the call ended with status {status}")
    return int(told)


def growths(script: str, arguments: list[str]) -> dict[str, int]:
    """What `script` prints as one JSON object: it calls `growth` for each argument, in a process without threads."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | threads,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: int(size) for name, size in json.loads(done.stdout).items()}
