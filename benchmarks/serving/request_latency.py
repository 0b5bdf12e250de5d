"""One request end to end against the same work in this process.

python benchmarks/serving/request_latency.py [--bundle bundle] [--out benchmarks/results/serving/request_latency.json]

Starts the real server on a bundle, then alternates single requests over HTTP with decode, run and encode here, at one
caller (latency) and at several (images a second, endpoint / in process >= 0.85).
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support import table
from benchmarks.support.load_server import photograph
from benchmarks.support.timing import alternate
from export.bundle import bundle
from export.runtime import runtime
from serving.http import negotiate, responses, segment
from serving.settings import Settings
from tests.support import tiny_onnx
from tests.support.live_server import START, free_port, until

CALLERS = 4


def rate(one: Callable[[], object], requests: int, callers: int) -> float:
    """Seconds for `requests` calls of `one` by `callers` threads."""
    start = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda _: one(), range(requests)))
    return time.perf_counter() - start


def measure_all(server: str, opened: runtime.Runtime, settings: Settings, rounds: int) -> list[dict]:
    """Rows for each image size: latency of a single caller, then time of a burst by several callers."""
    kind, rows = negotiate.KINDS[0], []
    with httpx.Client(base_url=server, trust_env=False, timeout=60) as http:
        for height, width in ((360, 480), (1080, 1920)):
            data = photograph(height, width)

            def over_http(data: bytes = data) -> httpx.Response:
                response = http.post("/v1/segment", content=data, headers={"Content-Type": "image/jpeg"})
                return response.raise_for_status()

            def in_process(data: bytes = data) -> responses.SegmentResult:
                return segment.segment(data, kind, opened, settings, time.perf_counter())

            assert over_http().content == in_process().body
            timed = alternate({"http": over_http, "here": in_process}, rounds * 4)
            phases = [re.findall(r"(\w+);dur=([\d.]+)", over_http().headers["server-timing"]) for _ in range(9)]
            spent = {name: statistics.median(float(dict(p)[name]) for p in phases) for name, _ in phases[0]}
            rows.append(table.row(f"{width}x{height}, 1 caller", timed, phases_ms=spent))
            sides = {
                "http": lambda one=over_http: rate(one, 6 * CALLERS, CALLERS),
                "here": lambda one=in_process: rate(one, 6 * CALLERS, settings.concurrency),
            }
            timed = alternate(sides, rounds)
            speed = 6 * CALLERS / timed["http"].median
            rows.append(table.row(f"{width}x{height}, {CALLERS} callers", timed, images_per_s=speed))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a bundle folder; without it a toy graph shows the overhead alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.bundle or tiny_onnx.write(Path(temporary) / "bundle", long_side=512).folder
        opened = runtime.Runtime(bundle.open_bundle(folder), provider="auto")
        opened.warm_up()
        port = free_port()
        environment = os.environ | {"MARGINALIA_BUNDLE": str(Path(folder).absolute()), "BENTOML_HOME": temporary}
        start = time.perf_counter()
        with (Path(temporary) / "log").open("wb") as log:
            command = [sys.executable, "-c", START, str(port)]
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: httpx.get(url + "/readyz", trust_env=False).status_code == 200, 120)
            ready = time.perf_counter() - start
            rows = measure_all(url, opened, Settings(), options.rounds)
        finally:
            server.terminate()
            server.wait(30)
    for row in rows:
        row |= {"model": opened.bundle.manifest.name, "provider": opened.provider, "cold_start_s": ready}
    columns = {
        "request": lambda r: r["name"],
        "HTTP ms": lambda r: f"{r['ours_ms']:.1f}",
        "in process ms": lambda r: f"{r['base_ms']:.1f}",
        "in process / HTTP": lambda r: "{:.2f} ({:.2f} to {:.2f})".format(
            1 / r["ratio"], *(1 / q for q in reversed(r["ratio_quartiles"]))
        ),
        "images/s": lambda r: f"{r['images_per_s']:.1f}" if "images_per_s" in r else "",
        "phases ms": lambda r: " ".join(f"{k} {v:.1f}" for k, v in r.get("phases_ms", {}).items()),
    }
    title = f"One request ({opened.provider}); cold start to ready {ready:.1f} s (bars: 0.85 of in process, 10 s)"
    table.report(title, rows, columns, options.out)


if __name__ == "__main__":
    main()
