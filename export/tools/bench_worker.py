"""One configuration of `marginalia bench` in a process of its own, so that its peak memory is its own.

    python -m export.tools.bench_worker '{"bundle": ..., "provider": ..., "precision": ..., "size": [w, h], ...}'

It prepares, says {"ready": ...} or {"failed": why}, then answers each line {"work": NAME, "calls": n} with the seconds
of n calls, until its input ends. One line of JSON each way. Whatever libraries print goes to stderr.
"""

import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.imaging import decode


def peak_bytes() -> int:
    """The most memory that this process has held.

    Linux counts a parent's memory into `getrusage` of the child it starts (exec hands the old image's peak on), so the
    kernel's own mark of this image is read where there is one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 height x width x 3, as smooth and as noisy as a photograph: flat noise would make every codec look slow."""
    noise = np.random.default_rng(seed)
    coarse = noise.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = noise.normal(0, 4, (height, width, 1))
    picture_HWC: NDArray[np.uint8] = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    return picture_HWC


def jpeg(image_HWC: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def converse(open_works: Callable[[dict[str, Any]], tuple[Mapping[str, Callable[[], object]], dict[str, Any]]]) -> None:
    """Be the child: open with the JSON of argv[1], then time what stdin asks for.

    `open_works` gives works by name, "run" among them, and facts for the row. Each work is called once, unmeasured,
    "run" first; the peak after that one is what running alone takes.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    try:
        works, facts = open_works(json.loads(sys.argv[1]))
        works["run"]()
        peak = peak_bytes()
        started = time.perf_counter()
        works["run"]()
        once = time.perf_counter() - started
        for name in works.keys() - {"run"}:
            works[name]()
    except Exception as error:  # whatever a runtime lacks on this machine, the table has a row that says so
        say({"failed": decode.short(error)})
        return
    say({"ready": facts, "once": once, "peak_bytes": peak})
    for line in sys.stdin:
        asked = json.loads(line)
        seconds = []
        for _ in range(asked["calls"]):
            started = time.perf_counter()
            works[asked["work"]]()
            seconds.append(time.perf_counter() - started)
        say({"seconds": seconds})


def prepare(task: dict[str, Any]) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Work "run": the opened model on a ready tensor. "stream", at batch 1: `images` JPEGs to PNGs as predict does it."""
    from export.bundle import bundle
    from export.runtime import runtime
    from export.tools import inputs, predict
    from export.tools.overlap import Steps, run_overlapped
    from pipeline.imaging import label_maps, resize

    opened = runtime.Runtime(
        bundle.open_bundle(Path(task["bundle"])),
        provider=task["provider"],
        precision=task["precision"],
        threads=task["threads"],
    )
    image_HWC = picture(*task["size"])
    plan = opened.bundle.fit(*image_HWC.shape[:2])
    ready_NHWC = np.ascontiguousarray(np.repeat(resize.apply(image_HWC, plan)[None], task["batch"], axis=0))
    works: dict[str, Callable[[], object]] = {"run": lambda: opened.run(ready_NHWC)}
    if task["batch"] == 1:
        data, palette, limit = jpeg(image_HWC), opened.bundle.manifest.palette, inputs.MAX_PIXELS

        def stream() -> None:
            steps: Steps[bytes, bytes, NDArray[np.uint8], NDArray[np.uint8], bytes] = Steps(
                load=lambda data: data,
                cost=lambda data: predict.BYTES_PER_PIXEL * image_HWC.shape[0] * image_HWC.shape[1],
                prepare=lambda data: resize.apply(decode.decode(data, max_pixels=limit), plan),
                run=lambda input_HWC: opened.run(input_HWC[None])[0][0],
                finish=lambda label_hw: label_maps.encode_png(resize.restore(label_hw, plan), palette),
            )
            for packed in run_overlapped([data] * task["images"], steps, workers=predict.WORKERS):
                packed.result()

        works["stream"] = stream
    facts = {"provider": opened.provider, "precision": opened.precision, "threads": opened.threads}
    return works, facts | {"tensor": list(ready_NHWC.shape)}


if __name__ == "__main__":
    converse(prepare)
