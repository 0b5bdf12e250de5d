"""One configuration of `marginalia bench` in a process of its own, so that its peak memory is its own.

    python -m export.tools.bench_worker '{"bundle": ..., "provider": ..., "precision": ..., "size": [w, h], ...}'

It speaks `bench_protocol` until its input ends. Whatever libraries print goes to stderr.
"""

import io
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel

from export.tools.bench_protocol import BundleTask, Facts, Failed, Ready, Seconds, Turn
from pipeline.imaging import decode

Task = TypeVar("Task", bound=BaseModel)


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


@dataclass(frozen=True)
class Prepared:
    """An opened configuration: its works by name, "run" among them, and the facts for its row."""

    works: Mapping[str, Callable[[], object]]
    facts: Facts


def converse(task: type[Task], prepare: Callable[[Task], Prepared]) -> None:
    """Be the child: open with the task in argv[1], then time what stdin asks for.

    Each work is called once, unmeasured, "run" first; the peak after that one is what running alone takes.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: BaseModel) -> None:
        print(message.model_dump_json(), file=out, flush=True)

    try:
        prepared = prepare(task.model_validate_json(sys.argv[1]))
        send(_warm_up(prepared))
    except Exception as error:  # whatever a runtime lacks on this machine, the table has a row that says so
        send(Failed(failed=decode.short(error)))
        return

    for line in sys.stdin:
        turn = Turn.model_validate_json(line)
        work = prepared.works[turn.work]
        send(Seconds(seconds=tuple(_time(work) for _ in range(turn.calls))))


def _warm_up(prepared: Prepared) -> Ready:
    run = prepared.works["run"]
    run()
    peak = peak_bytes()
    once = _time(run)
    for name in prepared.works.keys() - {"run"}:
        prepared.works[name]()
    return Ready(facts=prepared.facts, once=once, peak_bytes=peak)


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def prepare(task: BundleTask) -> Prepared:
    """Work "run": the opened model on a ready tensor. "stream", at batch 1: `images` JPEGs to PNGs as predict does it."""
    from export.bundle import bundle
    from export.runtime import runtime
    from export.tools import inputs, predict
    from export.tools.overlap import Steps, run_overlapped
    from pipeline.imaging import label_maps, resize

    opened = runtime.Runtime(
        bundle.open_bundle(task.bundle), provider=task.provider, precision=task.precision, threads=task.threads
    )
    image_HWC = picture(*task.size)
    plan = opened.bundle.fit(*image_HWC.shape[:2])
    ready_NHWC = np.ascontiguousarray(np.repeat(resize.apply(image_HWC, plan)[None], task.batch, axis=0))
    facts = Facts(provider=opened.provider, precision=opened.precision, threads=opened.threads, tensor=ready_NHWC.shape)
    works: dict[str, Callable[[], object]] = {"run": lambda: opened.run(ready_NHWC)}
    if task.batch > 1:
        return Prepared(works, facts)

    palette = opened.bundle.manifest.palette
    jpegs = [jpeg(image_HWC)] * task.images
    steps: Steps[bytes, bytes, NDArray[np.uint8], NDArray[np.uint8], bytes] = Steps(
        load=lambda data: data,
        cost=lambda data: predict.BYTES_PER_PIXEL * image_HWC.shape[0] * image_HWC.shape[1],
        prepare=lambda data: resize.apply(decode.decode(data, max_pixels=inputs.MAX_PIXELS), plan),
        run=lambda input_HWC: opened.run(input_HWC[None])[0][0],
        finish=lambda label_hw: label_maps.encode_png(resize.restore(label_hw, plan), palette),
    )

    def stream() -> None:
        for packed in run_overlapped(jpegs, steps, workers=predict.WORKERS):
            packed.result()

    return Prepared(works | {"stream": stream}, facts)


if __name__ == "__main__":
    converse(BundleTask, prepare)
