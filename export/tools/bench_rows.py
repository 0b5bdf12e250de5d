"""From raw seconds to the rows of `marginalia bench`, as records and as a table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.box import SIMPLE_HEAD
from rich.table import Table

from export.tools.bench_protocol import BundleTask, Failed, Ready, TorchTask
from export.tools.sizes import Size

LEGEND = (
    "MB: peak of the process; R2: img/s from JPEG to PNG over the bare runtime's; x fp32: over ONNX Runtime's fp32."
)


@dataclass(frozen=True)
class Case:
    """One configuration: how its row is called, and which module does which task."""

    runtime: str
    device: str
    precision: str
    module: str
    task: BundleTask | TorchTask


@dataclass
class Measured:
    """A case's raw seconds, by rounds of calls; `hello` is Failed where it did not start or ended early."""

    case: Case
    hello: Ready | Failed
    run: list[tuple[float, ...]] = field(default_factory=list)
    stream: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def medians(self) -> list[float]:
        """Of each round's bare calls; none of a case that failed."""
        return [] if isinstance(self.hello, Failed) else [statistics.median(calls) for calls in self.run]

    @property
    def device(self) -> str:
        """The device of the case, else the one that the child found."""
        return self.case.device or (self.hello.facts.provider if isinstance(self.hello, Ready) else "")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class FailedRow(_Record):
    """A configuration that does not run here. `size` is (width, height)."""

    runtime: str
    device: str
    precision: str
    size: tuple[int, int]
    batch: int
    failed: str


class Row(_Record):
    """One configuration. Latencies are over all calls. Images a second, and both ratios, are of each round's median, and
    of those the median: the two sides of a ratio then are of the same moment.

    r2: images/s from JPEG to PNG, overlapped, over images/s of the bare runtime.
    speedup: seconds of ONNX Runtime's fp32 over this one's.
    """

    runtime: str
    device: str
    precision: str
    size: tuple[int, int]
    batch: int
    provider: str
    threads: int
    tensor: tuple[int, ...]
    p50_ms: float
    p99_ms: float
    calls: int
    images_per_s: float
    peak_mb: float
    r2: float | None
    stream_images_per_s: float | None
    speedup: float | None
    rounds_s: tuple[tuple[float, ...], ...]
    stream_rounds_s: tuple[float, ...]


class Machine(_Record):
    """Processor, cores, load before the work, versions of what is installed, and the working folder's commit, if any."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    load: float
    card: str | None
    versions: dict[str, str]
    commit: str | None


class BenchResult(_Record):
    """All rows, the bundle's id, and where and in how many rounds they were measured."""

    bundle: str
    rounds: int
    rows: tuple[Row | FailedRow, ...]
    machine: Machine


def row(measured: Measured, base: Measured | None) -> Row | FailedRow:
    """One line of the table; `base` is ONNX Runtime's fp32, or None."""
    case, hello = measured.case, measured.hello
    if isinstance(hello, Failed):
        return FailedRow(
            runtime=case.runtime,
            device=measured.device,
            precision=case.precision,
            size=case.task.size,
            batch=case.task.batch,
            failed=hello.failed,
        )

    calls = [second for one in measured.run for second in one]
    run_per_image = [median / case.task.batch for median in measured.medians]
    stream_per_image: list[float] = []
    if isinstance(case.task, BundleTask):
        stream_per_image = [one[0] / case.task.images for one in measured.stream]
    return Row(
        runtime=case.runtime,
        device=measured.device,
        precision=hello.facts.precision,
        size=case.task.size,
        batch=case.task.batch,
        provider=hello.facts.provider,
        threads=hello.facts.threads,
        tensor=hello.facts.tensor,
        p50_ms=1e3 * float(np.percentile(calls, 50)),
        p99_ms=1e3 * float(np.percentile(calls, 99)),
        calls=len(calls),
        images_per_s=case.task.batch / statistics.median(measured.medians),
        peak_mb=hello.peak_bytes / 2**20,
        r2=_median_ratio(run_per_image, stream_per_image),
        stream_images_per_s=1 / statistics.median(stream_per_image) if stream_per_image else None,
        speedup=_median_ratio(base.medians, measured.medians) if base is not None else None,
        rounds_s=tuple(measured.run),
        stream_rounds_s=tuple(one[0] for one in measured.stream),
    )


def _median_ratio(seconds: Sequence[float], own: Sequence[float]) -> float | None:
    """Median of one side's seconds over the other's, round by round; None where one of them was not measured."""
    if not seconds or not own:
        return None
    return statistics.median(theirs / mine for theirs, mine in zip(seconds, own, strict=True))


def baseline(group: Sequence[Measured], measured: Measured) -> Measured | None:
    """ONNX Runtime in fp32 on the same device as `measured`, else on the CPU."""
    plain = [one for one in group if one.case.runtime == "onnxruntime" and one.case.precision == "fp32"]
    for device in (measured.device, "cpu"):
        for one in plain:
            if one.case.device == device:
                return one
    return None


def shown(result: BenchResult) -> list[Table | str]:
    """The table, what failed and why, and what the columns mean."""
    machine = result.machine
    title = f"bundle {result.bundle}, {result.rounds} rounds"
    caption = f"{machine.cpu}, {machine.cores} cores, load {machine.load:.1f}"
    table = Table(title=title, caption=caption, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("batch x image", overflow="fold")
    for name in ("p50 ms", "p99 ms", "img/s", "MB", "R2", "x fp32"):
        table.add_column(name, justify="right", no_wrap=True)

    before = ""
    for item in result.rows:
        group = f"{item.batch} x {Size(*item.size)}"
        if group != before:
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        before = group
        table.add_row(f"  {_name(item)}", *([] if isinstance(item, FailedRow) else _cells(item)))

    failures = [f"{_name(item)}: {item.failed}" for item in result.rows if isinstance(item, FailedRow)]
    return [table, *failures, LEGEND]


def _cells(item: Row) -> list[str]:
    speeds = [f"{value:.1f}" for value in (item.p50_ms, item.p99_ms, item.images_per_s)]
    ratios = ["-" if ratio is None else f"{ratio:.2f}" for ratio in (item.r2, item.speedup)]
    return [*speeds, f"{item.peak_mb:.0f}", *ratios]


def _name(item: Row | FailedRow) -> str:
    return " ".join(part for part in (item.runtime, item.device, item.precision) if part)
