"""What the server does at most against the same work in process, and what of it is left at 4x overload.

python benchmarks/serving/overload.py [--bundle bundle] [--seconds 10] [--rounds 5] [--times 4] [--out FILE]

A round is, on one server: as many requests as it can take (closed model), then an open model at `times` that rate, then
the same work in this process. Goodput counts answers that came within the time and 5 s after they were due.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support import load, load_server, table
from benchmarks.support.wire import Wire, request
from serving.settings import Settings

WITHIN_S = 5.0


def one_round(url: str, data: bytes, callers: int, seconds: float, times: float, seed: int) -> dict[str, Any]:
    """Saturation, overload and recovery over HTTP."""
    call = load.Call("mask", request("POST", "/v1/segment", data, content_type="image/jpeg"))

    async def run() -> dict[str, Any]:
        wire = Wire(url)
        full = await load.saturate(wire, callers, seconds, lambda i: call)
        speed = load.goodput(full, seconds)
        due = load.arrivals(times * speed, seconds, seed)
        over = await load.fire(wire, due, lambda i: call)
        ended = time.perf_counter()
        while (await wire.ask(call.sent)).status != 200 and time.perf_counter() - ended < 60:
            await asyncio.sleep(0.01)
        recovered = time.perf_counter() - ended
        wire.close()
        return {
            "full": speed,
            "over": load.goodput(over, seconds, WITHIN_S),
            "offered": len(due) / seconds,
            "tally": load.tally(over),
            "failed": load.tally(full)["failed"],
            "answer_p99_s": load.took(over, 0.99),
            "reject_p50_s": load.took(over, 0.5, "rejected"),
            "reject_p99_s": load.took(over, 0.99, "rejected"),
            "late_p99_s": load.percentile((o.late_s for o in over), 0.99),
            "recovered_s": recovered,
        }

    return asyncio.run(run())


def main() -> None:
    options = load_server.options(__doc__, seconds=10.0, rounds=5, times=4.0)
    data, settings = load_server.photograph(360, 480), Settings()
    callers = settings.concurrency + 4  # enough to keep every phase busy, too few to be turned away
    with load_server.serve(options.bundle) as run:
        here = load_server.in_process(run.first, data)
        done = []
        for seed in range(options.rounds):
            found = one_round(run.server.url, data, callers, options.seconds, options.times, seed)
            found["here"] = load_server.most(here, settings.concurrency, options.seconds)
            done.append(found)
        model = run.first.manifest.name
    worst = {name: max(found[name] for found in done) for name in done[0] if name.endswith("_s")}
    total = {name: sum(found["tally"][name] for found in done) for name in done[0]["tally"]}
    failed = total["failed"] + sum(found["failed"] for found in done)
    rows = [
        {"name": "saturation / in process (bar 0.85, stretch 0.95)", "model": model,
         **load.spread([found["full"] / found["here"] for found in done]),
         "images_per_s": [found["full"] for found in done], "base_per_s": [found["here"] for found in done],
         "says": f"{callers} callers against {settings.concurrency} threads"},
        {"name": f"goodput at {options.times:g}x / at saturation (bar 0.90, stretch 0.95)", "model": model,
         **load.spread([found["over"] / found["full"] for found in done]),
         "images_per_s": [found["over"] for found in done], "base_per_s": [found["full"] for found in done],
         "offered_per_s": [found["offered"] for found in done], "tally": total, "failed": failed, "worst": worst,
         "says": f"{total['rejected']} of {total['sent']} turned away, {failed} failed, {total['unsent']} not sent; worst "
                 f"round: 503 in {1e3 * worst['reject_p50_s']:.0f} ms (p99 {1e3 * worst['reject_p99_s']:.0f}), answers "
                 f"p99 {1e3 * worst['answer_p99_s']:.0f} ms, generator late {1e3 * worst['late_p99_s']:.0f} ms, again "
                 f"free after {worst['recovered_s']:.2f} s"},
    ]  # fmt: skip
    columns = {
        "ratio of": lambda r: r["name"],
        "ratio": lambda r: "{:.2f} ({:.2f} to {:.2f})".format(r["ratio"], *r["ratio_quartiles"]),
        "images/s": lambda r: f"{load.percentile(r['images_per_s'], 0.5):.1f}",
        "base images/s": lambda r: f"{load.percentile(r['base_per_s'], 0.5):.1f}",
        "besides": lambda r: r["says"],
    }
    title = f"Saturation and overload, 480x360 ({options.rounds} rounds of {options.seconds:g} s each)"
    table.report(title, rows, columns, options.out)


if __name__ == "__main__":
    main()
