"""From the start of the process to the first answers.

python benchmarks/serving/cold_start.py [--bundle bundle] [--rounds 5] [--out FILE]

Beside it, in turn, a Python that only imports BentoML and ONNX Runtime: what no server made of them can be faster than.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx

from benchmarks.support import load_server, table
from benchmarks.support.timing import Timed, alternate
from tests.support import tiny_onnx
from tests.support.live_server import START, free_port

BAR_S, STRETCH_S, PATIENCE_S = 10.0, 5.0, 180.0


def start(folder: Path, home: str) -> dict[str, float]:
    """Seconds from the start of the process until it is live, ready, and has answered its first request."""
    port, data = free_port(), load_server.photograph(360, 480)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MARGINALIA_")}
    environment = plain | {"MARGINALIA_BUNDLE": str(folder.absolute()), "BENTOML_HOME": home}
    began, seen = time.perf_counter(), {}
    with (Path(home) / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", START, str(port)], env=environment, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as http:
            for name, path in (("live", "/livez"), ("ready", "/readyz")):
                while not reached(http, path):
                    if server.poll() is not None or time.perf_counter() - began > PATIENCE_S:
                        raise SystemExit((Path(home) / "log").read_text())
                    time.sleep(0.01)
                seen[name] = time.perf_counter() - began
            for name in ("first answer", "second answer"):
                sent = time.perf_counter()
                http.post("/v1/segment", content=data, headers={"Content-Type": "image/jpeg"}).raise_for_status()
                seen[name] = time.perf_counter() - sent
    finally:
        server.terminate()
        server.wait(30)
    return seen


def reached(http: httpx.Client, path: str) -> bool:
    try:
        return http.get(path).status_code == 200
    except httpx.TransportError:
        return False


def main() -> None:
    options = load_server.options(__doc__, rounds=5)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.bundle or tiny_onnx.write(Path(temporary) / "bundle", long_side=512).folder
        seen: list[dict[str, float]] = []
        program = "from export.runtime import telemetry; telemetry.turn_off(); import bentoml, onnxruntime"
        imports = [sys.executable, "-c", program]
        works = {
            "server": lambda: seen.append(start(folder, temporary)),
            "imports": lambda: subprocess.run(imports, check=True),
        }
        timed = alternate(works, options.rounds)
    measured = seen[1:]  # the first round warms the disk's cache
    facts = {name: statistics.median(item[name] for item in measured) for name in measured[0]}
    ready = Timed(tuple(item["ready"] for item in measured))
    slowest = max(ready.seconds)
    row = table.row("cold start / imports alone", {"server": ready, "imports": timed["imports"]}, phases_s=facts)
    row |= {"ready_s": sorted(ready.seconds)}
    row["verdict"] = "stretch met" if slowest <= STRETCH_S else "bar met" if slowest <= BAR_S else "ABOVE THE BAR"
    columns = {
        "from the start": lambda r: r["name"],
        "ready s": lambda r: f"{r['phases_s']['ready']:.2f} ({r['ready_s'][0]:.2f} to {r['ready_s'][-1]:.2f})",
        "live s": lambda r: f"{r['phases_s']['live']:.2f}",
        "imports s": lambda r: f"{r['base_ms'] / 1e3:.2f}",
        "first, second answer ms": lambda r: "{:.0f}, {:.0f}".format(
            *(1e3 * r["phases_s"][name] for name in ("first answer", "second answer"))
        ),
        "slowest round": lambda r: r["verdict"],
    }
    title = f"Cold start to ready and warm, {options.rounds} rounds (bar {BAR_S:g} s, stretch {STRETCH_S:g} s)"
    table.report(title, [row], columns, options.out)


if __name__ == "__main__":
    main()
