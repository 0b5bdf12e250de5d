"""Peak memory of the serving process for an image of 100 megapixels against one of 4 (at most 2, wanted 1.3).

python benchmarks/serving/image_memory.py [--bundle bundle] [--full] [--rounds 3] [--out FILE]

Each number is the high-water mark (VmHWM) of a worker process of its own, from its start to after `--rounds` answers, so it
holds whatever the process needed at any moment: libraries, model, body, pixels, answer. Without --bundle a toy graph makes
the ratio as hard as it gets: the less a model needs, the more an image counts.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support import table
from tests.support import tiny_onnx
from tests.support.live_server import START, Server, free_port, until

SMALL, LARGE = (2000, 2000), (10_000, 10_000)
BAR, WANTED = 2.0, 1.3
FORMATS = {
    "JPEG": {"quality": 90},
    "PNG": {"compress_level": 1},
    "TIFF": {"compression": "tiff_lzw"},
}


def photograph(height: int, width: int) -> Image.Image:
    """Smooth colours under noise, made in bands: 100 megapixels as floats would be gigabytes."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    for top in range(0, height, 250):
        band = pixels[top : top + 250]
        noise = rng.integers(-8, 9, band.shape, dtype=np.int16)
        band[:] = np.clip(band + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


@contextmanager
def serving(bundle: Path, folder: Path) -> Iterator[Server]:
    port = free_port()
    environment = os.environ | {"MARGINALIA_BUNDLE": str(bundle.absolute()), "BENTOML_HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", START, str(port)], env=environment, stdout=log, stderr=log)
    server = Server(f"http://127.0.0.1:{port}", port, folder, process)
    try:
        until(lambda: httpx.get(server.url + "/readyz", trust_env=False).status_code == 200, 180)
        yield server
    finally:
        server.stop()


def peak(bundle: Path, file: Path, query: str, rounds: int) -> dict[str, float]:
    """MiB at the start and at the peak of a fresh server that answers for `file`, and the seconds of an answer."""
    with tempfile.TemporaryDirectory() as temporary, serving(bundle, Path(temporary)) as server:
        idle, body = server.peak_mb(), file.read_bytes()
        with server.client() as http:
            http.timeout = httpx.Timeout(600)
            begun = time.perf_counter()
            for _ in range(rounds):
                answer = http.post(
                    "/v1/segment" + query, content=body, headers={"Content-Type": "application/octet-stream"}
                )
                assert answer.status_code == 200, answer.text
            spent = (time.perf_counter() - begun) / rounds
        return {"idle_mb": idle, "peak_mb": server.peak_mb(), "seconds": spent, "body_mb": len(body) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a bundle folder; without it a toy graph, the hardest case")
    parser.add_argument("--full", action="store_true", help="also at native resolution, where the format allows it")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = options.bundle or tiny_onnx.write(folder / "bundle", long_side=512).folder
        for size in (SMALL, LARGE):
            picture = photograph(*size)
            for kind in options.formats:
                picture.save(folder / f"{kind}{size[0]}", kind, **FORMATS[kind])
            del picture
        cases = [(kind, "") for kind in options.formats]
        cases += [(kind, "?resolution=full") for kind in options.formats if kind != "JPEG"] if options.full else []
        for kind, query in cases:
            base = peak(bundle, folder / f"{kind}{SMALL[0]}", query, options.rounds)
            ours = peak(bundle, folder / f"{kind}{LARGE[0]}", query, 1 if query else options.rounds)
            name = f"{kind}, {'full' if query else 'fit'}"
            found.append({"name": name, "small": base, "large": ours, "ratio": ours["peak_mb"] / base["peak_mb"]})
            print(found[-1], flush=True)
    columns = {
        "image": lambda r: r["name"],
        "idle MiB": lambda r: f"{r['small']['idle_mb']:.0f}",
        "4 MP MiB": lambda r: f"{r['small']['peak_mb']:.0f}",
        "100 MP MiB": lambda r: f"{r['large']['peak_mb']:.0f}",
        "ratio": lambda r: f"{r['ratio']:.2f}",
        "verdict": lambda r: "wanted" if r["ratio"] <= WANTED else "bar met" if r["ratio"] <= BAR else "ABOVE THE BAR",
        "100 MP body MiB": lambda r: f"{r['large']['body_mb']:.0f}",
        "100 MP s": lambda r: f"{r['large']['seconds']:.1f}",
    }
    model = options.bundle.name if options.bundle else "toy graph, long side 512"
    table.report(f"peak memory, 100 MP / 4 MP (bar {BAR}, wanted {WANTED}); {model}", found, columns, options.out)


if __name__ == "__main__":
    main()
