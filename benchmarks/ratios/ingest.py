"""What `dvc repro` runs over the data for a dump of 1 % new images (ingest of the dump, index of all) against the
first ingest (ingest and index of all images).

    python benchmarks/ratios/ingest.py [--images 2000] [--history 100000] [--folder PHOTOGRAPHS] [--out FILE]

Real: `--images` different JPEGs of 480 x 360 are ingested as the pipeline does it (decoded, hashed, written to shards, by
threads as for any dump below `check.FEW`), in several sizes, and the cost of one image is the slope. Simulated: the rows
of the history. Their hashes are those of photographs (or of noise) with ten bits turned at random; ids are made up; no
image lies behind them. The index over history + 1 % is run for real on those rows, by the stage's own function. DVC's own
start, 0.6 s or so, and its hashing of what changed are not in it, on either side.

All seconds are of processor time, of this process and its workers, so that other work on the machine does not count.
Ingest is shared by `WORKERS` of them and index is not, so ingest counts for its part alone: the ratio is one of waiting.
"""

import argparse
import io
import resource
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from joblib.externals.loky import get_reusable_executor
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support.timing import machine
from pipeline import config, paths, stage
from pipeline.imaging import perceptual_hash
from pipeline.ingest import check, deduplicate, dump_registry
from pipeline.storage import atomic, manifest, shards
from tests.support import tiny_settings

SOURCE: dict[str, Any] = {
    "source": "folder", "classes": [{"id": 0, "name": "thing", "color": [9, 9, 9]}], "ignore": 255, "lists": {},
    "groups": None, "group_pattern": None,
}  # fmt: skip
BAR, STRETCH = 0.05, 0.02
ROUNDS = 3
WORKERS = 2


def jpegs(count: int, folder: Path | None) -> list[bytes]:
    """`count` different files of 480 x 360: photographs of the folder with a mark of their own, or noise without one."""
    rng = np.random.default_rng(0)
    paths = sorted(folder.glob("*.jpg"))[:300] if folder else []
    pictures = [np.asarray(Image.open(path).convert("RGB").resize((480, 360))) for path in paths]
    pictures = pictures or [rng.integers(0, 256, (360, 480, 3)).astype(np.uint8) for _ in range(50)]
    made = []
    for n in range(count):
        picture = pictures[n % len(pictures)].copy()
        picture[:24, :24] = rng.integers(0, 256, 3)
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return made


def spent() -> float:
    """Processor seconds of this process and of those of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def seconds_to_ingest(pictures: Sequence[bytes], name: str) -> float:
    """As many as wait for it: the processor's seconds over `WORKERS`."""
    archive = Path("data/dumps") / f"{name}.tar"
    shards.write_tar(archive, ((f"images/{name}-{n:06d}.jpg", data) for n, data in enumerate(pictures)))
    began = spent()
    check.ingest(archive, name, SOURCE, config.Ingest(), config.Scale(workers=WORKERS))
    get_reusable_executor().shutdown(wait=True)
    return (spent() - began) / WORKERS


def fabricate(count: int, dump: str, hashes: np.ndarray, rng: np.random.Generator) -> None:
    """data/ingested/DUMP of `count` rows without images."""
    value_N = rng.choice(hashes, count)
    for _ in range(10):
        value_N = value_N ^ (np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64))
    place = f"data/ingested/{dump}/images-00000.tar"
    rows = [
        manifest.Row(
            f"{rng.integers(1 << 62):064x}", f"g{n // 50}/{dump}-{n:07d}", "folder", dump, f"g{n // 50}", 480, 360,
            place, 60_000 * n, 60_000, None, None, None, f"{int(value_N[n]):016x}",
        )
        for n in range(count)
    ]  # fmt: skip
    manifest.write(paths.INGESTED / dump / "rows.parquet", rows)
    atomic.write_json(paths.INGESTED / dump / "quarantine.json", [])


def seconds_to_index(dumps: Sequence[str]) -> float:
    entries = {name: dump_registry.DumpEntry(archive=f"data/dumps/{name}.tar") for name in dumps}
    dump_registry.write_dumps(dump_registry.DumpRegistry(dumps=entries))
    began = spent()
    with redirect_stdout(io.StringIO()):
        assert stage.run("index", deduplicate.run) == 0
    return spent() - began


def lowest(work: Any) -> float:
    """The least of `ROUNDS`: what others do on this machine only adds, by cold caches."""
    return min(work() for _ in range(ROUNDS))


def line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(seconds an item, fixed seconds) by least squares."""
    slope, fixed = np.polyfit(sizes, seconds, 1)
    return float(slope), float(fixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--history", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="photographs (*.jpg) to take pixels and hashes from")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out.resolve() if arguments.out else None
    folder = arguments.folder.resolve() if arguments.folder else None
    rng = np.random.default_rng(0)
    pictures = jpegs(arguments.images, folder)
    hashes = np.array(
        [
            perceptual_hash.dhash(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))) or 1
            for data in pictures[:300]
        ],
        np.uint64,
    )
    here = machine()
    with tempfile.TemporaryDirectory() as place, chdir(place):
        atomic.write_json(paths.SOURCE, SOURCE)
        tiny_settings.write(Path("params.yaml"), data={"source": "folder"})
        sizes = [arguments.images // 4, arguments.images // 2, arguments.images]
        seconds_to_ingest(pictures[:64], "warm")  # modules, the file cache
        real = [lowest(lambda n=n: seconds_to_ingest(pictures[:n], f"real{n}")) for n in sizes]
        an_image, start = line(sizes, real)
        histories = [arguments.history // 10, arguments.history // 2, arguments.history]
        new = arguments.history // 100
        for n in histories:
            fabricate(n, f"history{n}", hashes, rng)
        fabricate(new, "week", hashes, rng)
        alone = [lowest(lambda n=n: seconds_to_index([f"history{n}"])) for n in histories]
        with_new = [lowest(lambda n=n: seconds_to_index([f"history{n}", "week"])) for n in histories]
    first = start + an_image * arguments.history + alone[-1]
    later = start + an_image * new + with_new[-1]
    console = Console(width=120)
    table = Table("images ingested (real)", "seconds", "seconds an image", title="linear in the new")
    for n, took in zip(sizes, real, strict=True):
        table.add_row(str(n), f"{took:.2f}", f"{took / n:.5f}")
    table.caption = f"slope {1e3 * an_image:.2f} ms an image, {start:.2f} s to start"
    console.print(table)
    table = Table(
        "old images (simulated)", f"index of old + {new} new", f"with ingest of the {new}", "index an old image",
        title="flat in the old",
    )  # fmt: skip
    for n, took in zip(histories, with_new, strict=True):
        table.add_row(str(n), f"{took:.2f} s", f"{start + an_image * new + took:.2f} s", f"{1e6 * took / n:.1f} us")
    an_old = line(histories, with_new)[0]
    table.caption = f"an old image costs {an_old / an_image:.4f} of a new one"
    console.print(table)
    ratio = later / first
    verdict = "stretch met" if ratio <= STRETCH else "bar met" if ratio <= BAR else "ABOVE THE BAR"
    table = Table("first ingest", "dump of 1 % new", "ratio", "of it the 1 % itself", "bar, stretch", title="ingest")
    share = an_image * new / first
    table.add_row(f"{first:.1f} s", f"{later:.2f} s", f"{ratio:.4f}", f"{share:.4f}", f"{BAR}, {STRETCH}: {verdict}")
    console.print(table)
    if out:
        atomic.write_json(out, {
            "row": "ingest", "ratio": ratio, "bar": BAR, "stretch": STRETCH, "first_s": first, "later_s": later,
            "seconds_an_image": an_image, "start_s": start, "real": dict(zip(map(str, sizes), real, strict=True)),
            "index": dict(zip(map(str, histories), with_new, strict=True)), "index_alone_s": alone[-1],
            "old_over_new": an_old / an_image, "simulated": "the rows of the history; ingest extrapolated by its slope",
            "photographs": folder is not None, "machine": here,
        })  # fmt: skip


if __name__ == "__main__":
    main()
