"""The slowest answers while models are swapped against those of a steady server, and how many requests fail.

python benchmarks/serving/swap.py [--bundle bundle] [--seconds 15] [--rounds 5] [--share 0.5] [--out FILE]

An open model at `share` of what the server can do at most. A round is a steady time and a time of swaps without a pause:
the pointer is moved to the other of two bundles as soon as the one before answers. So every request of that time meets a
candidate that is being loaded, or a switch; a server swaps once a day, and this is its worst minute over and over.
"""

import asyncio
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support import load, load_server, table
from benchmarks.support.wire import Wire, request
from serving.settings import Settings

PAUSE_S = 0.02  # between two looks at which bundle answers


async def swaps(run: load_server.Served, ended: asyncio.Event) -> int:
    """Move the pointer back and forth until `ended`; how often another bundle answered."""
    wire, count = Wire(run.server.url), 0
    for wanted in itertools.cycle((run.second, run.first)):
        if ended.is_set():
            break
        run.point(wanted)
        while await current(wire) != wanted.manifest.id and not ended.is_set():
            await asyncio.sleep(PAUSE_S)
        count += not ended.is_set()
    wire.close()
    return count


async def current(wire: Wire) -> str:
    """Id of the bundle that answers now."""
    return str(json.loads((await wire.ask(request("GET", "/v1/model"))).body)["bundle"])


async def settle(run: load_server.Served) -> None:
    """Back to the first bundle, whichever swap was under way."""
    wire = Wire(run.server.url)
    run.point(run.first)
    async with asyncio.timeout(120):
        while await current(wire) != run.first.manifest.id:
            await asyncio.sleep(PAUSE_S)
    wire.close()


async def measure(run: load_server.Served, seconds: float, rounds: int, share: float) -> dict[str, object]:
    call = load.Call(
        "mask", request("POST", "/v1/segment", load_server.photograph(360, 480), content_type="image/jpeg")
    )
    wire = Wire(run.server.url)
    full = await load.saturate(wire, Settings().concurrency + 4, min(seconds, 10.0), lambda i: call)
    rate = share * load.goodput(full, min(seconds, 10.0))
    steady, during, moved = [], [], 0
    for seed in range(rounds):
        due = load.arrivals(rate, seconds, seed)
        steady.append(await load.fire(wire, due, lambda i: call))
        ended = asyncio.Event()
        mover = asyncio.create_task(swaps(run, ended))
        during.append(await load.fire(wire, due, lambda i: call))
        ended.set()
        moved += await mover
        await settle(run)
    wire.close()
    everything = [o for part in during for o in part]
    tally = load.tally(everything)
    known = {run.first.manifest.id, run.second.manifest.id}
    return {
        "name": f"p99 during swaps / steady, at {share:g} of saturation (bar 2, stretch 1.2)",
        **load.spread([load.took(a, 0.99) / load.took(b, 0.99) for a, b in zip(during, steady, strict=True)]),
        "rate_per_s": rate,
        "swaps": moved,
        "tally": tally,
        "steady_tally": load.tally([o for part in steady for o in part]),
        "failed": tally["failed"] + tally["rejected"],
        "bundles_seen": sorted({o.bundle for o in everything if o.verdict == "answered"} & known),
        "steady_p99_ms": [1e3 * load.took(part, 0.99) for part in steady],
        "swap_p99_ms": [1e3 * load.took(part, 0.99) for part in during],
        "steady_p50_ms": [1e3 * load.took(part, 0.5) for part in steady],
        "swap_p50_ms": [1e3 * load.took(part, 0.5) for part in during],
    }


def main() -> None:
    options = load_server.options(__doc__, seconds=15.0, rounds=5, share=0.5)
    with load_server.serve(options.bundle, poll_s="0.05") as run:
        row = asyncio.run(measure(run, options.seconds, options.rounds, options.share))
        row |= {"model": run.first.manifest.name, "refused": len(run.server.events("bundle-refused"))}
    columns = {
        "ratio of": lambda r: r["name"],
        "ratio": lambda r: "{:.2f} ({:.2f} to {:.2f})".format(r["ratio"], *r["ratio_quartiles"]),
        "p99 ms": lambda r: " / ".join(f"{load.percentile(r[n], 0.5):.0f}" for n in ("swap_p99_ms", "steady_p99_ms")),
        "median ms": lambda r: " / ".join(
            f"{load.percentile(r[n], 0.5):.0f}" for n in ("swap_p50_ms", "steady_p50_ms")
        ),
        "swaps": lambda r: str(r["swaps"]),
        "sent": lambda r: str(r["tally"]["sent"]),
        "failed or 503": lambda r: str(r["failed"]),
        "candidates refused": lambda r: str(r["refused"]),
    }
    title = f"Hot swaps ({options.rounds} rounds of {options.seconds:g} s each, {row['rate_per_s']:.1f} requests/s)"
    table.report(title, [row], columns, options.out)


if __name__ == "__main__":
    main()
