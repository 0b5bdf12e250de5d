"""Minutes of mixed load with faults and swaps: what was sent, answered, turned away and failed, and the memory.

python benchmarks/serving/soak.py --minutes 30 [--bundle bundle] [--rate REQUESTS_A_SECOND] [--out FILE]

An open model, by default at 0.4 of what the server can do at most. Meanwhile the champion pointer is moved to good and to
bad bundles, and to no bundle at all. A mask or an overlay has to be, bit for bit, the one that was given before the load
began, whichever of two equal bundles gave it.
"""

import asyncio
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.serving import soak_mix
from benchmarks.serving.swap import PAUSE_S
from benchmarks.support import load, load_server, table
from benchmarks.support.wire import Wire, request
from export.bundle import bundle
from pipeline.storage import atomic
from serving.settings import Settings
from tests.support import tiny_onnx
from tests.support.live_server import TOKEN

GOLDEN = ("mask", "overlay", "confidence")  # the answers that do not name the bundle
MEDIA = {"mask": "image/png", "json": "application/json", "geojson": "application/geo+json", "overlay": "image/jpeg",
         "confidence": "image/png"}  # fmt: skip
MAX_BODY_MB, MAX_LARGE_BODY_MB, MAX_PIXELS = 2, 8, 4_000_000
PATIENCE_S = 60.0
_AUTHORISED = {"authorization": f"Bearer {TOKEN}"}


async def offered(wire: Wire) -> tuple[dict[str, str], bool]:
    """What this server has: its views with their media types, and whether there is an address for many images."""
    paths = json.loads((await wire.ask(request("GET", "/v1/openapi.json", **_AUTHORISED))).body)["paths"]
    parameters = {item["name"]: item["schema"] for item in paths["/v1/segment"]["post"]["parameters"]}
    views = parameters["view"].get("enum", ["mask"])
    reply = await wire.ask(request("POST", "/v1/segment/batch", b"", content_type="text/plain", **_AUTHORISED))
    return {view: MEDIA[view] for view in views if view in MEDIA}, reply.status != 404


async def with_golden(wire: Wire, calls: list[soak_mix.Weighted]) -> list[soak_mix.Weighted]:
    """Each image call with the body that it is answered with now."""
    done = []
    for item in calls:
        call = item.call
        if call.kind.split()[0] in GOLDEN:
            call = dataclasses.replace(call, golden=(await wire.ask(call.sent)).body)
        done.append(soak_mix.Weighted(call, item.weight))
    return done


def bad_champions(run: load_server.Served) -> list[Callable[[], None]]:
    """Ways to name a champion that must not be taken in."""
    damaged = run.champions / "damaged" / "bundle"
    load_server.twin(run.first, damaged)
    model = damaged / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    strange = tiny_onnx.write(run.champions / "strange" / "bundle", model_bytes=tiny_onnx.model(shift=40)).folder
    pointer = run.champions / "champion.json"
    return [
        lambda: run.point(damaged),
        lambda: run.point(strange),
        lambda: run.point(run.champions / "absent" / "bundle"),
        lambda: atomic.write_text(pointer, "{"),
        lambda: atomic.write_text(pointer, '{"bundle": 5}'),
    ]


async def refusals(wire: Wire) -> float:
    text = (await wire.ask(request("GET", "/metrics", **_AUTHORISED))).body.decode()
    found = re.search(r'^marginalia_swaps_total\{[^}]*result="refused"[^}]*\} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def current(wire: Wire) -> str:
    return str(json.loads((await wire.ask(request("GET", "/v1/model", **_AUTHORISED))).body)["bundle"])


async def changes(run: load_server.Served, pause_s: float) -> AsyncIterator[str]:
    """Good and bad champions in turn, by pointer and by request: what came of each.

    A bad one must be refused and leave the one before serving; a loaded one serves until it is rolled back.
    """
    wire, bad = Wire(run.server.url), itertools.cycle(bad_champions(run))

    async def post(path: str, **fields: str) -> int:
        body = json.dumps(fields).encode()
        return (await wire.ask(request("POST", path, body, content_type="application/json", **_AUTHORISED))).status

    async def becomes(wanted: bundle.Bundle, what: str) -> str:
        return what if await until(lambda: current(wire), lambda now: now == wanted.manifest.id) else "stuck"

    for wanted, other in itertools.cycle(((run.second, run.first), (run.first, run.second))):
        run.point(wanted)
        yield await becomes(wanted, "swapped")
        await asyncio.sleep(pause_s)
        before = await refusals(wire)
        next(bad)()
        told = await until(lambda: refusals(wire), lambda now, b=before: now > b)
        yield "refused" if told and await current(wire) == wanted.manifest.id else "wrong"
        await asyncio.sleep(pause_s)
        path = str(other.folder.relative_to(run.champions.parent))
        for address, fields, after in (("load", {"bundle": path}, other), ("rollback", {}, wanted)):
            done = await until(lambda a=address, f=fields: post(f"/v1/models/{a}", **f), lambda status: status == 200)
            yield await becomes(after, address) if done else "stuck"
            await asyncio.sleep(pause_s)


async def until(look: Callable[[], Any], right: Callable[[Any], bool]) -> bool:
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not right(await look()):
                await asyncio.sleep(PAUSE_S)
    except TimeoutError:
        return False
    return True


async def soak(run: load_server.Served, seconds: float, rate: float) -> dict[str, Any]:
    """The whole run; outcomes, what became of the changes, and memory over time."""
    wire = Wire(run.server.url)
    views, batch = await offered(wire)
    calls = soak_mix.mix(TOKEN, MAX_LARGE_BODY_MB << 20, MAX_PIXELS, views, batch, spooled=(MAX_BODY_MB << 20) + 1)
    calls = await with_golden(wire, calls)
    pick = soak_mix.picker(calls, 0)
    warm = min(30.0, max(2.0, seconds / 10))
    full = await load.saturate(wire, Settings().concurrency + 4, warm, pick)
    rate = rate or 0.4 * load.tally(full)["sent"] / warm
    workers, memory, told = run.server.workers(), [run.server.resident_mb()], []

    async def change() -> None:
        async for what in changes(run, pause_s=min(20.0, seconds / 20)):
            told.append(what)

    async def watch() -> None:
        while True:
            await asyncio.sleep(seconds / 20)
            memory.append(run.server.resident_mb())

    beside = [asyncio.create_task(change()), asyncio.create_task(watch())]
    outcomes = await load.fire(wire, load.arrivals(rate, seconds), pick)
    broken = [task.exception() for task in beside if task.done()]
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    await asyncio.sleep(1.0)  # what was begun for callers that hung up ends
    memory.append(run.server.resident_mb())
    wire.close()
    return {
        "outcomes": outcomes, "rate": rate, "batch": batch, "views": sorted(views), "memory_mb": memory,
        "changes": {what: told.count(what) for what in ("swapped", "refused", "load", "rollback", "stuck", "wrong")},
        "restarts": int(run.server.workers() != workers), "broken": [repr(error) for error in broken],
        "internal": len(run.server.events("internal-error")) + run.server.log().count("Traceback (most recent"),
    }  # fmt: skip


def summary(kind: str, outcomes: list[load.Outcome]) -> dict[str, Any]:
    """One row; milliseconds of what was answered or refused."""
    spent = [o.took_s for o in outcomes if o.verdict in ("answered", "refused")]
    wrong = sorted({o.status for o in outcomes if o.verdict == "failed"})
    times = {name: 1e3 * load.percentile(spent, share) for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99)) if spent}
    return {"name": kind, **load.tally(outcomes), **times, "failed_with": wrong}


def main() -> None:
    options = load_server.options(__doc__, minutes=30.0, rate=0.0)
    seconds = 60 * options.minutes
    bodies = {"max_body_mb": str(MAX_BODY_MB), "max_large_body_mb": str(MAX_LARGE_BODY_MB)}
    limits = bodies | {"max_pixels": str(MAX_PIXELS), "poll_s": "0.2", "token": TOKEN}
    with load_server.serve(options.bundle, **limits) as run:
        found = asyncio.run(soak(run, seconds, options.rate))
        model = run.first.manifest.name
    outcomes = found.pop("outcomes")
    kinds = sorted({o.kind for o in outcomes})
    rows = [summary(kind, [o for o in outcomes if o.kind == kind]) for kind in kinds]
    memory = found["memory_mb"]
    rows.append(summary("all", outcomes) | found | {"minutes": options.minutes, "model": model})
    columns = {
        "request": lambda r: r["name"],
        **{
            name: (lambda r, n=name: str(r[n])) for name in ("sent", "answered", "refused", "rejected", "cut", "unsent")
        },
        "failed": lambda r: f"{r['failed']} {r['failed_with'] or ''}",
        "p50, p99 ms": lambda r: f"{r['p50_ms']:.0f}, {r['p99_ms']:.0f}" if "p99_ms" in r else "",
    }
    said = ", ".join(f"{count} {what}" for what, count in found["changes"].items())
    title = (
        f"{options.minutes:g} minutes at {found['rate']:.1f} requests/s; memory {memory[0]:.0f} MiB at the start, "
        f"{memory[-1]:.0f} at the end (most {max(memory):.0f}); champions: {said}; restarts {found['restarts']}, internal "
        f"errors {found['internal']}{', BROKEN ' + str(found['broken']) if found['broken'] else ''}"
    )
    table.report(title, rows, columns, options.out)


if __name__ == "__main__":
    main()
