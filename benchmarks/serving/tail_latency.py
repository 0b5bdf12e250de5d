"""The slowest answers of a server whose model costs nothing, at 4 callers, beside those of a bare uvicorn.

python benchmarks/serving/tail_latency.py [--seconds 8] [--rounds 5] [--callers 4] [--out FILE]

Out of the box BentoML's p99 was 100 times its median (full garbage collections); this is where that would be seen again.
A round is each server in turn, as fast as the callers go. The bare one reads the body and answers as many bytes.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx

from benchmarks.support import load, load_server, table
from benchmarks.support.wire import Wire, request
from tests.support import live_server

BAR_MS = 25.0
BARE = """
import sys, uvicorn
from starlette.requests import Request
from starlette.responses import Response

async def app(scope, receive, send):
    if scope["type"] == "http":
        await Request(scope, receive).body()
        await Response(bytes(300), media_type="image/png")(scope, receive, send)

uvicorn.run(app, port=int(sys.argv[1]), lifespan="off", access_log=False, log_level="error")
"""


@contextlib.contextmanager
def bare(port: int) -> Iterator[None]:
    """A uvicorn with one route, ready."""
    process = subprocess.Popen([sys.executable, "-c", BARE, str(port)])
    try:
        live_server.until(lambda: httpx.post(f"http://127.0.0.1:{port}/", trust_env=False).status_code == 200)
        yield
    finally:
        process.terminate()
        process.wait(30)


async def measure(url: str, call: load.Call, callers: int, seconds: float) -> dict[str, Any]:
    wire = Wire(url)
    found = await load.saturate(wire, callers, seconds, lambda i: call)
    wire.close()
    return {
        "p50_ms": 1e3 * load.took(found, 0.5), "p99_ms": 1e3 * load.took(found, 0.99),
        "per_s": load.goodput(found, seconds), "failed": len(found) - load.tally(found)["answered"],
    }  # fmt: skip


def main() -> None:
    options = load_server.options(__doc__, seconds=8.0, rounds=5, callers=4)
    body = load_server.photograph(48, 64)
    call = load.Call("mask", request("POST", "/v1/segment", body, content_type="image/jpeg"))
    port = live_server.free_port()
    with load_server.serve(options.bundle) as run, bare(port):
        urls = {"ours": run.server.url, "bare": f"http://127.0.0.1:{port}"}
        asyncio.run(measure(urls["ours"], call, options.callers, 2.0))
        rounds = [
            {name: asyncio.run(measure(url, call, options.callers, options.seconds)) for name, url in urls.items()}
            for _ in range(options.rounds)
        ]
    rows = [
        {"name": name, **{key: [r[side][key] for r in rounds] for key in rounds[0][side]}}
        for name, side in (("endpoint", "ours"), ("bare uvicorn", "bare"))
    ]
    middle = lambda key, places: lambda r: f"{load.percentile(r[key], 0.5):.{places}f}"  # noqa: E731
    columns = {
        "server": lambda r: r["name"],
        "p50 ms": middle("p50_ms", 2),
        "p99 ms": middle("p99_ms", 1),
        "p99 ms, lowest to highest round": lambda r: f"{min(r['p99_ms']):.1f} to {max(r['p99_ms']):.1f}",
        "answers/s": middle("per_s", 0),
        "failed": lambda r: str(sum(r["failed"])),
    }
    title = (
        f"Tail over an idle model, {options.callers} callers, {options.rounds} rounds of {options.seconds:g} s each "
        f"(asked: p99 below {BAR_MS:g} ms)"
    )
    table.report(title, rows, columns, options.out)


if __name__ == "__main__":
    main()
