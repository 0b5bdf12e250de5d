"""`marginalia bench`: every runtime and precision of a bundle that runs here, over sizes and batches, in one table.

Each configuration is a process of its own (`bench_process`, `bench_worker`), so that its peak memory is its own. Those of
one size and batch are alive together and take turns, round by round, the others idle meanwhile: a machine that gets
busier slows all of them alike, and they are what is compared with each other. The next size or batch starts when they
have ended, because all models of all sizes together might not fit into memory; numbers of different sizes are of
different minutes.
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from export.bundle import bundle
from export.bundle.manifest import Provider
from export.runtime import cpu, runtime
from export.tools.bench_process import measure
from export.tools.bench_protocol import BundleTask, TorchMode, TorchTask
from export.tools.bench_rows import BenchResult, Case, FailedRow, Machine, Row, baseline, row
from export.tools.sizes import Size, parse_batch, parse_size
from pipeline import console as progress
from pipeline import paths

STREAMED = 16  # images of one in-process turn
# Instructions that decide between fp32, bf16 and int8 (Linux's names).
FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimddp", "i8mm", "bf16",
)  # fmt: skip
PACKAGES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "torch")


class BenchError(ValueError):
    """The benchmark cannot be set up; the message says which option to change."""


@dataclass(frozen=True)
class BenchOptions:
    """What is compared. `sizes` are "WIDTHxHEIGHT" of images, brought to the network by the bundle's input policy; none
    means a square of its long side. `student` adds torch itself; `threads` None means all cores."""

    sizes: Sequence[str] = ()
    batches: Sequence[str] = ("1", "4")
    rounds: int = 9
    threads: int | None = None
    student: Path | None = None


DEFAULTS = BenchOptions()


def bench(folder: Path, options: BenchOptions = DEFAULTS) -> BenchResult:
    """Measure the bundle in `folder`.

    Raises:
        bundle.BundleError: the bundle must not be run.
        SizeError: a malformed size or batch.
        BenchError: fewer than one round, or a student that is not there.
    """
    opened = bundle.open_bundle(folder)
    side = opened.manifest.input.long_side
    sizes = [parse_size(text, "--sizes") for text in options.sizes] or [Size(side, side)]
    batches = [parse_batch(text) for text in options.batches]
    if options.rounds < 1:
        raise BenchError(f"--rounds: {options.rounds}; at least one")
    student = options.student
    if student is not None and not student.is_file():
        raise BenchError(f"--student: {student}: no such file; it is {paths.STUDENT_WEIGHTS} after training")

    threads = options.threads or cpu.cores()
    groups = [cases(opened, size, batch, threads, student) for size in sizes for batch in batches]
    machine = describe_machine()
    rows: list[Row | FailedRow] = []
    with progress.bar("bench", options.rounds * sum(map(len, groups))) as bar:
        for group in groups:
            measured = measure(group, options.rounds, bar)
            rows += [row(one, baseline(measured, one)) for one in measured]
    return BenchResult(bundle=opened.manifest.id, rounds=options.rounds, rows=tuple(rows), machine=machine)


def cases(opened: bundle.Bundle, size: Size, batch: int, threads: int, student: Path | None = None) -> list[Case]:
    """The configurations to compare at one size and batch."""
    found = []
    for option in runtime.options(opened):
        task = BundleTask(
            size=size,
            batch=batch,
            threads=threads,
            bundle=opened.folder,
            provider=cast(Provider, option.provider),
            precision=option.precision,
            images=STREAMED,
        )
        found.append(Case(option.runtime, option.device, option.precision, "export.tools.bench_worker", task))

    if student is None:
        return found
    policy = opened.manifest.input
    for mode in get_args(TorchMode):
        torch_task = TorchTask(
            size=size,
            batch=batch,
            threads=threads,
            student=student,
            mode=mode,
            long_side=policy.long_side,
            stride=policy.stride,
        )
        found.append(Case(f"torch {mode}", "", "fp32", "export.tools.bench_torch", torch_task))
    return found


def describe_machine() -> Machine:
    """This machine as it is before the work."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return Machine(
        cpu=cpu.name(),
        flags=tuple(flag for flag in FLAGS if flag in cpu.flags()),
        cores=cpu.cores(),
        load=os.getloadavg()[0],
        card=_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        versions=versions,
        commit=_output("git", "rev-parse", "HEAD"),
    )


def _output(*command: str) -> str | None:
    """What a command prints; None where it is absent, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
