"""`dvc repro` with nothing to do, against `dvc version` (DVC's own start). Run it in a project that is up to date."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROUNDS = 7


def seconds(*arguments: str) -> float:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=True)
    if arguments[0] == "repro" and "Running stage" in done.stdout:
        raise SystemExit("the project was not up to date: run `dvc repro` first, then measure again")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    out = parser.parse_args().out
    if not Path("dvc.lock").exists():
        print("skipped: no dvc.lock here; run `dvc repro` (or `make demo`) first")
        return
    seconds("repro"), seconds("version")  # warm the file cache
    rounds = [(seconds("repro"), seconds("version")) for _ in range(ROUNDS)]
    repro, version = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = [a / b for a, b in rounds]
    result = {
        "row": "repro_noop", "repro_s": repro, "version_s": version, "value": repro / version, "low": min(ratios),
        "high": max(ratios), "rounds": ROUNDS, "bar": 3.0, "stretch": 2.0,
    }  # fmt: skip
    table = Table("dvc repro, nothing to do", "dvc version", "ratio", "spread", "bar", title="repro_noop")
    table.add_row(
        f"{repro:.2f} s",
        f"{version:.2f} s",
        f"{repro / version:.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        "<= 3",
    )
    Console().print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
