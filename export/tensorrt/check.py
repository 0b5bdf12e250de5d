"""`marginalia engines`: every engine of a bundle built on this machine's card, compared with ONNX Runtime, and timed."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from export.bundle import bundle
from export.runtime import telemetry
from export.tensorrt import builder, cudart, installation
from export.tensorrt.cache import Cache, default_folder
from export.tensorrt.installation import EngineError
from export.tensorrt.profile import Profile
from export.tensorrt.session import EngineSession
from pipeline import paths
from pipeline.stage import Exit, Result
from pipeline.storage import atomic

# The precisions of a bundle's files. model.int8.onnx is not among them: its unsigned form is for CPUs.
FILES = {"fp32": "model.onnx", "tf32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8-tensorrt.onnx"}
# Share of labels equal to ONNX Runtime's on noise, where near-ties abound. Lower means a gross fault, such as a wrong
# layout; how good a precision is on real images is for parity to say.
FLOORS = {"fp32": 0.999, "tf32": 0.98, "fp16": 0.98, "int8": 0.9}


class Measured(BaseModel):
    """An engine against ONNX Runtime on the CPU: shares of equal labels, plainly and by CUDA graph; milliseconds of both."""

    model_config = ConfigDict(frozen=True)

    shape_NHWC: tuple[int, ...]
    agreement: float
    agreement_of_graph: float
    p50_plain_ms: float
    p50_graph_ms: float | None


@dataclasses.dataclass(frozen=True)
class EngineRow:
    """What came of one precision: the session's facts where one was opened, its measurements where it ran."""

    file: str
    precision: str
    failure: str | None = None
    session: Mapping[str, object] | None = None
    measured: Measured | None = None

    def record(self) -> dict[str, object]:
        """As reports/engines.json has it; what is not known is left out."""
        row: dict[str, object] = {"file": self.file, "precision": self.precision, "failure": self.failure}
        return row | dict(self.session or {}) | (self.measured.model_dump(mode="json") if self.measured else {})


def _p50(session: EngineSession, images_NHWC: NDArray[np.uint8], runs: int) -> float:
    """Median milliseconds of a call, copies to the card and back included; the first three are not counted."""
    times = []
    for _ in range(runs + 3):
        started = time.perf_counter()
        session.run(images_NHWC)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[3:])


def measure(model: bytes, session: EngineSession, *, runs: int = 50) -> Measured:
    """Agreement with ONNX Runtime's CPU and p50 in both ways, on noise of the profile's usual shape."""
    telemetry.turn_off()
    import onnxruntime

    shape = (*session.profile.opt_NHW, 3)
    images_NHWC = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    reference = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected_NHW = reference.run(["label"], {"image": images_NHWC})[0]
    session.graphs = False
    plain, label_NHW = _p50(session, images_NHWC, runs), session.run(images_NHWC)[0]
    session.graphs = True
    graph, again_NHW = _p50(session, images_NHWC, runs), session.run(images_NHWC)[0]
    return Measured(
        shape_NHWC=shape,
        agreement=float((label_NHW == expected_NHW).mean()),
        agreement_of_graph=float((again_NHW == expected_NHW).mean()),
        p50_plain_ms=plain,
        p50_graph_ms=graph if session.captured else None,
    )


def build_all(
    opened: bundle.Bundle, precisions: Sequence[str], profile: Profile, cache: Path, *, rebuild: bool
) -> list[EngineRow]:
    """Build, check and time each precision; a failure is its row's `failure` and does not stop the others."""
    module, rows = installation.load(), []
    for precision in precisions:
        path = opened.folder / FILES[precision]
        model = opened.read_model(path.name)
        row = EngineRow(path.name, precision)
        try:
            session = EngineSession(
                model,
                precision=precision,
                profile=profile,
                cache=cache,
                module=module,
                name=str(path),
                rebuild=rebuild,
            )
            with contextlib.closing(session):
                facts = {"key": session.key.about, "cached": session.cached, "seconds": session.seconds}
                row = replace(row, session=facts | {"engine": str(Cache(cache).path(session.key))})
                row = replace(row, measured=measure(model, session))
            row = replace(row, failure=_disagreement(row, path))
        except (EngineError, cudart.CudaError) as error:
            row = replace(row, failure=str(error))
        rows.append(row)
    return rows


def _disagreement(row: EngineRow, path: Path) -> str | None:
    """What is wrong with an engine that ran; None when it agrees as its precision should."""
    assert row.measured is not None
    worst = min(row.measured.agreement, row.measured.agreement_of_graph)
    if worst >= FLOORS[row.precision]:
        return None
    return f"{path}: agrees with ONNX Runtime on {worst:.4f} of the pixels of noise only"


def _table(rows: Sequence[EngineRow], title: str) -> Table:
    table = Table("file", "precision", "took s", "from cache", "agreement", "plain ms", "graph ms", title=title)
    for row in rows:
        facts = row.record()
        cached = "-" if "cached" not in facts else "yes" if facts["cached"] else "no"
        numbers = (("agreement", 5), ("p50_plain_ms", 3), ("p50_graph_ms", 3))
        cells = [_cell(facts.get(name), digits) for name, digits in numbers]
        table.add_row(row.file, row.precision, _cell(facts.get("seconds"), 1), cached, *cells)
    return table


def _cell(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else "-"


def run(
    folder: Path,
    precisions: Sequence[str] = (),
    *,
    max_batch: int | None = None,
    cache: Path | None = None,
    rebuild: bool = False,
) -> Result:
    """Build, check and time; writes reports/engines.json. Fails where an engine could not be built or disagrees.

    Args:
        precisions: default: all that the bundle has.
        max_batch: default: as the runtime has it.

    Raises:
        bundle.BundleError: the bundle does not verify.
        EngineError: it lacks a precision, or this machine has no card or no TensorRT. cudart.CudaError: its driver fails.
    """
    opened = bundle.open_bundle(folder)
    present = [p for p in builder.PRECISIONS if FILES[p] in opened.sha256]
    if absent := sorted(set(precisions) - set(present)):
        raise EngineError(f"{opened.folder / FILES[absent[0]]}: not in this bundle; it has {', '.join(present)}")
    policy = opened.manifest.input
    profile = Profile.of(long_side=policy.long_side, stride=policy.stride, max_batch=max_batch)
    found = installation.look()
    if not found.usable:
        looked = [f"  {place}: {answer}" for place, answer in found.looked_for.items()]
        raise EngineError("\n".join([found.says, *looked]))

    card = installation.card()
    rows = build_all(opened, precisions or present, profile, cache or default_folder(), rebuild=rebuild)
    said = {
        "bundle": opened.manifest.id, "card": dataclasses.asdict(card), "modules": found.modules,
        "cuda_runtime": cudart.version(), "engines": [row.record() for row in rows],
    }  # fmt: skip
    atomic.write_json(paths.ENGINES_REPORT, said)
    table = _table(rows, f"{card.name}, driver {card.driver}, batch {profile.opt_NHW[0]}")
    failures = tuple(row.failure for row in rows if row.failure)
    return Result((table,), (), failures, Exit.FAILED if failures else Exit.DONE, said)
