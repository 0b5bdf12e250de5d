"""`marginalia bench`: every runtime and precision of a bundle that runs here, over sizes and batches, in one table.

Each configuration is a process of its own (`export.tools.bench_worker`), so that its peak memory is its own. Those of one size
and batch are alive together and take turns, round by round, the others idle meanwhile: a machine that gets busier slows
all of them alike, and they are what is compared with each other. The next size or batch starts when they have ended,
because all models of all sizes together might not fit into memory; numbers of different sizes are of different minutes.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from export.bundle import bundle
from export.runtime import cpu, runtime
from export.tools.sizes import Size, parse_batch, parse_size
from pipeline import console as progress
from pipeline import paths

TURN = 0.3  # seconds that a turn of fast calls is filled to, so that a p99 has more than one call a round behind it
MOST_CALLS = 50
STREAMED = 16  # images of one in-process turn
TORCH = ("eager", "channels_last", "compile")
# Instructions that decide between fp32, bf16 and int8 (Linux's names).
HOME = str(Path(__file__).parents[2])  # where the children find this package
FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimddp", "i8mm", "bf16",
)  # fmt: skip
PACKAGES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "torch")


class BenchError(ValueError):
    """The benchmark cannot be set up; the message says which option to change."""


@dataclass(frozen=True)
class Case:
    """One configuration: what to start, and how its row is called. Sizes are (width, height) in pixels."""

    runtime: str
    device: str
    precision: str
    size: tuple[int, int]
    batch: int
    module: str
    task: dict[str, Any]


def cases(
    opened: bundle.Bundle, size: tuple[int, int], batch: int, threads: int, student: Path | None = None
) -> list[Case]:
    """The configurations to compare at one size and batch."""
    common = {"size": size, "batch": batch, "threads": threads}
    found = []
    for option in runtime.options(opened):
        task = common | {"bundle": str(opened.folder), "provider": option.provider, "precision": option.precision}
        task["images"] = STREAMED
        found.append(
            Case(option.runtime, option.device, option.precision, size, batch, "export.tools.bench_worker", task)
        )
    if student is not None:
        policy = opened.manifest.input
        for mode in TORCH:
            task = common | {"student": str(student), "mode": mode}
            task |= {"long_side": policy.long_side, "stride": policy.stride}
            found.append(Case(f"torch {mode}", "", "fp32", size, batch, "export.tools.bench_torch", task))
    return found


class Child:
    """A started configuration."""

    def __init__(self, case: Case, process: "subprocess.Popen[str]", complaints: Any) -> None:
        self.case, self._process, self._complaints = case, process, complaints
        self.rounds: dict[str, list[list[float]]] = {"run": [], "stream": []}
        self.hello: dict[str, Any] = {}

    def listen(self) -> dict[str, Any]:
        """The next answer; a child that died gives {"failed": its last words}."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return dict(json.loads(line))
        self._complaints.seek(0)
        said = self._complaints.read().decode("utf-8", "replace").strip().splitlines()
        return {"failed": f"ended with code {self._process.wait()}: {said[-1] if said else 'no word'}"}

    def turn(self, work: str, calls: int) -> None:
        if "failed" in self.hello:
            return
        assert self._process.stdin is not None
        try:
            print(json.dumps({"work": work, "calls": calls}), file=self._process.stdin, flush=True)
            answer = self.listen()
        except BrokenPipeError:
            answer = self.listen()
        if "failed" in answer:
            self.hello = answer
        else:
            self.rounds[work].append(answer["seconds"])


@contextmanager
def started(case: Case) -> Iterator[Child]:
    """The case's process, which ends with the block."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", case.module, json.dumps(case.task)],  # -P: not what lies in the folder here
            env=os.environ | {"PYTHONPATH": os.pathsep.join([HOME, *filter(None, [os.environ.get("PYTHONPATH")])])},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True, encoding="utf-8",
        )  # fmt: skip
        try:
            yield Child(case, process, complaints)
        finally:
            process.kill()
            process.communicate()


def measure(group: Sequence[Case], rounds: int, bar: progress.Bar) -> list[dict[str, Any]]:
    """Raw seconds of cases that take turns: for each {"case", "hello", "run": rounds of calls, "stream": likewise}."""
    with ExitStack() as stack:
        children = []
        for case in group:  # one after the other, or they would slow each other's start and first peak
            child = stack.enter_context(started(case))
            child.hello = child.listen()
            children.append(child)
        for _ in range(rounds):
            for child in children:
                once = child.hello.get("once", TURN)
                child.turn("run", max(1, min(MOST_CALLS, int(TURN / max(once, 1e-6)))))
                if child.case.module == "export.tools.bench_worker" and child.case.batch == 1:
                    child.turn("stream", 1)
                bar.advance()
        return [{"case": child.case, "hello": child.hello, **child.rounds} for child in children]


def row(raw: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """One line of the table from raw seconds; `base` are those of ORT fp32, or None.

    Latencies are over all calls. Images a second, and both ratios, are of each round's median, and of those the median:
    the two sides of a ratio then are of the same moment.

    - "r2": images/s from JPEG to PNG, overlapped, over images/s of the bare runtime.
    - "speedup": seconds of ORT fp32 over this one's.
    """
    case, hello = raw["case"], raw["hello"]
    found: dict[str, Any] = {
        "runtime": case.runtime, "device": case.device or hello.get("ready", {}).get("provider", ""),
        "precision": case.precision, "size": list(case.size), "batch": case.batch,
    }  # fmt: skip
    if "failed" in hello:
        return found | {"failed": hello["failed"]}
    calls = [second for one in raw["run"] for second in one]
    medians = [statistics.median(one) for one in raw["run"]]
    found |= hello["ready"] | {
        "p50_ms": 1e3 * float(np.percentile(calls, 50)), "p99_ms": 1e3 * float(np.percentile(calls, 99)),
        "calls": len(calls), "images_per_s": case.batch / statistics.median(medians),
        "peak_mb": hello["peak_bytes"] / 2**20, "r2": None, "stream_images_per_s": None, "speedup": None,
        "rounds_s": raw["run"], "stream_rounds_s": [one[0] for one in raw["stream"]],
    }  # fmt: skip
    if raw["stream"]:
        per_image = [one[0] / case.task["images"] for one in raw["stream"]]
        found["stream_images_per_s"] = 1 / statistics.median(per_image)
        found["r2"] = statistics.median(run / case.batch / whole for run, whole in zip(medians, per_image, strict=True))
    if base is not None and "failed" not in base["hello"]:
        theirs = [statistics.median(one) for one in base["run"]]
        found["speedup"] = statistics.median(b / own for b, own in zip(theirs, medians, strict=True))
    return found


def baseline(group: Sequence[dict[str, Any]], raw: dict[str, Any]) -> dict[str, Any] | None:
    """ONNX Runtime in fp32 on the same device as `raw`, else on the CPU."""
    plain = [one for one in group if one["case"].runtime == "onnxruntime" and one["case"].precision == "fp32"]
    for device in (raw["case"].device, raw["hello"].get("ready", {}).get("provider"), "cpu"):
        for one in plain:
            if one["case"].device == device:
                return one
    return None


def bench(
    folder: Path,
    sizes: Sequence[str] = (),
    batches: Sequence[str] = ("1", "4"),
    *,
    rounds: int = 9,
    threads: int | None = None,
    student: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure and return {"rows", "machine", "bundle", "rounds"}. `sizes` are "WIDTHxHEIGHT" of images, brought to the
    network by the bundle's input policy; none means a square of its long side.

    Raises:
        bundle.BundleError: the bundle must not be run.
        SizeError: a malformed size or batch.
        BenchError: fewer than one round, or a student that is not there.
    """
    opened = bundle.open_bundle(folder)
    side = opened.manifest.input.long_side
    shapes = [parse_size(text, "--sizes") for text in sizes] or [Size(side, side)]
    numbers = [parse_batch(text) for text in batches]
    if rounds < 1:
        raise BenchError(f"--rounds: {rounds}; at least one")
    if student is not None and not student.is_file():
        raise BenchError(f"--student: {student}: no such file; it is {paths.STUDENT_WEIGHTS} after training")
    threads = threads or cpu.cores()
    groups = [cases(opened, size, batch, threads, student) for size in shapes for batch in numbers]
    rows, facts = [], here()
    with progress.bar("bench", rounds * sum(map(len, groups)), console) as bar:
        for group in groups:
            measured = measure(group, rounds, bar)
            rows += [row(raw, baseline(measured, raw)) for raw in measured]
    return {"bundle": opened.manifest.id, "rounds": rounds, "rows": rows, "machine": facts}


def here() -> dict[str, Any]:
    """Processor, cores, load before the work, versions of what is installed, and this folder's commit, if any."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": cpu.name(),
        "flags": [flag for flag in FLAGS if flag in cpu.flags()],
        "cores": cpu.cores(),
        "load": os.getloadavg()[0],
        "card": _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "versions": versions,
        "commit": _said("git", "rev-parse", "HEAD"),
    }


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def shown(result: dict[str, Any]) -> list[Table | str]:
    """The table, what failed and why, and what the columns mean."""
    where = result["machine"]
    load = f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f}"
    title = f"bundle {result['bundle']}, {result['rounds']} rounds"
    table = Table(title=title, caption=load, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("batch x image", overflow="fold")
    for name in ("p50 ms", "p99 ms", "img/s", "MB", "R2", "x fp32"):
        table.add_column(name, justify="right", no_wrap=True)
    before = ""
    for item in result["rows"]:
        group = f"{item['batch']} x {item['size'][0]}x{item['size'][1]}"
        if group != before:
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        before = group
        cells = [f"  {_name(item)}"]
        if "failed" not in item:
            cells += [f"{item[key]:.1f}" for key in ("p50_ms", "p99_ms", "images_per_s")] + [f"{item['peak_mb']:.0f}"]
            cells += ["-" if item[key] is None else f"{item[key]:.2f}" for key in ("r2", "speedup")]
        table.add_row(*cells)
    failures = [f"{_name(item)}: {item['failed']}" for item in result["rows"] if "failed" in item]
    legend = (
        "MB: peak of the process; R2: img/s from JPEG to PNG over the bare runtime's; x fp32: over ONNX Runtime's fp32."
    )
    return [table, *failures, legend]


def _name(item: dict[str, Any]) -> str:
    return " ".join(part for part in (item["runtime"], item["device"], item["precision"]) if part)
