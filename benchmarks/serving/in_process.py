"""Images/s from JPEG to mask PNG in this process against those of the opened model on ready tensors.

python benchmarks/serving/in_process.py [--bundle bundle] [--out benchmarks/results/serving/in_process.json]

The work is that of `marginalia bench`: JPEGs decoded, scaled, run one by one, enlarged and packed as `predict` does it,
by turns with as many bare runs of the same input. Bars: 0.70 on a CPU, stretch 0.85; 0.50 and 0.70 on a GPU.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support import table
from benchmarks.support.timing import alternate
from export.bundle import bundle
from export.runtime import cpu, runtime
from export.tools import bench, bench_worker
from export.tools.bench_protocol import BundleTask
from export.tools.sizes import parse_size
from tests.support import tiny_onnx

SIZES = ("256x192", "480x360", "1920x1080")


def measure(opened: bundle.Bundle, sizes: list[str], images: int, rounds: int, threads: int) -> list[dict]:
    """A row for each way to run the bundle here and each image size; one model is open at a time."""
    rows = []
    for option in runtime.options(opened):
        for text in sizes:
            task = BundleTask(
                size=parse_size(text, "--sizes"), batch=1, threads=threads, bundle=opened.folder,
                provider=option.provider, precision=option.precision, images=images,
            )  # fmt: skip
            prepared = bench_worker.prepare(task)
            works, facts = prepared.works, prepared.facts.model_dump(mode="json")
            works["run"]()
            timed = alternate(
                {"stream": works["stream"], "run": lambda works=works: [works["run"]() for _ in range(images)]}, rounds
            )
            speed = images / timed["stream"].median
            facts |= {
                "images": images,
                "images_per_s": speed,
                "model": opened.manifest.name,
                "bundle": opened.manifest.id,
            }
            row = table.row(f"{option}, {text}", timed, **facts)
            low, high = row["ratio_quartiles"]
            rows.append(row | {"r2": 1 / row["ratio"], "r2_quartiles": [1 / high, 1 / low]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a bundle folder; without it a toy graph shows the overhead alone")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="WIDTHxHEIGHT of the images")
    parser.add_argument("--images", type=int, default=bench.STREAMED, help="of one turn")
    parser.add_argument("--threads", type=int, default=cpu.cores(), help="of the network")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.bundle or tiny_onnx.write(Path(temporary) / "bundle", long_side=512).folder
        opened = bundle.open_bundle(folder)
        rows = measure(opened, options.sizes, options.images, options.rounds, options.threads)
    columns = {
        "runtime, image": lambda r: r["name"],
        "in process ms": lambda r: f"{r['ours_ms'] / r['images']:.2f}",
        "bare ms": lambda r: f"{r['base_ms'] / r['images']:.2f}",
        "bare / in process": lambda r: "{:.2f} ({:.2f} to {:.2f})".format(r["r2"], *r["r2_quartiles"]),
        "images/s": lambda r: f"{r['images_per_s']:.1f}",
    }
    title = f"in process against the bare runtime (bar 0.70, stretch 0.85), bundle {opened.manifest.name}"
    table.report(title, rows, columns, options.out)


if __name__ == "__main__":
    main()
