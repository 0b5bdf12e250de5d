"""Stage `parity`: every variant of the network, in every runtime of this machine, against torch; what passes is the bundle.

The draft holds fp32 and the cheaper variants. fp32 in ONNX Runtime must agree with torch or the stage fails. Each other
option enters the bundle if it keeps its own limits and is faster than fp32 here; the report says why not. It is judged
on test images, which have trained nothing and calibrated nothing.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from export import parity_table
from export.bundle import bundle
from export.bundle.manifest import MODEL, Option
from export.parity_metrics import Measured, TestImages, measure
from export.parity_verdict import BASE, judge_all
from export.runtime import cpu
from export.runtime.runtime import Runtime
from export.runtime.sessions import ProviderError
from pipeline import config, console, paths
from pipeline.champions.parity_report import ParityReport, VariantParity, VariantReport
from pipeline.stage import Exit, Result
from pipeline.storage import atomic, manifest
from training import inference
from training.models import segmenter

ROUNDS, TIMED = 7, 4


class ParityError(RuntimeError):
    """Parity cannot be measured; the message says what to do."""


def pick(rows: Sequence[manifest.Row], count: int) -> list[manifest.Row]:
    """At most `count` rows spread evenly over the list, by id, so that the choice does not follow the order of
    files.
    """
    ordered = sorted(rows, key=lambda row: row.id)
    if len(ordered) <= count:
        return ordered
    return [ordered[i * len(ordered) // count] for i in range(count)]


def open_all(draft: bundle.Bundle) -> tuple[dict[Option, Runtime], dict[Option, str]]:
    """The draft's options that run here, and why the others do not. fp32 in ONNX Runtime always does or raises."""
    opened, refused = {BASE: Runtime(draft, provider="cpu", precision="fp32")}, {}
    for option in draft.manifest.options:
        if option == BASE:
            continue
        try:
            opened[option] = Runtime(draft, provider=option.provider, precision=option.precision)  # type: ignore[arg-type]
        except (ProviderError, bundle.BundleError) as error:
            refused[option] = str(error)
    return opened, refused


def seconds(runtimes: Mapping[Option, Runtime], images: Sequence[NDArray[np.uint8]]) -> dict[Option, float]:
    """Median seconds for one image, as the graph takes it: runtimes take turns, each with an unmeasured run before."""
    times: dict[Option, list[float]] = {option: [] for option in runtimes}
    for _ in range(ROUNDS):
        for option, runtime in runtimes.items():
            for image_HWC in images:
                runtime.run(image_HWC[None])
                began = time.perf_counter()
                runtime.run(image_HWC[None])
                times[option].append(time.perf_counter() - began)
    return {option: statistics.median(values) for option, values in times.items()}


def measure_all(
    model: nn.Module, opened: Mapping[Option, Runtime], images: TestImages
) -> tuple[dict[Option, Measured], dict[Option, str]]:
    """`measure` by option: what was counted, and why some failed on the way."""
    measured, failed = measure(model, {str(option): runtime for option, runtime in opened.items()}, images)
    by_name = {str(option): option for option in opened}
    return (
        {by_name[name]: found for name, found in measured.items()},
        {by_name[name]: reason for name, reason in failed.items()},
    )


def finish(draft: bundle.Bundle, records: Sequence[VariantReport], folder: Path) -> bundle.Bundle:
    """Write the bundle: the draft with the admitted options alone, and only the models that these use."""
    facts = {"runtime", "device", "precision", "file", "speedup", "miou_drop"}
    options = [
        Option.model_validate(row.model_dump(include=facts) | {"agreement": round(row.grid.agreement, 6)})
        for row in records
        if row.admitted
    ]
    used: set[str] = {MODEL, *(option.file for option in options)}
    models = {name: draft.read_model(name) for name in draft.models if name in used}
    description = draft.manifest.description(options=options, rejected=[row.name for row in records if row.failures])
    card = (draft.folder / bundle.CARD).read_text(encoding="utf-8")
    return bundle.create(folder, models, description, card)


def run(params: config.Params) -> Result:
    """The stage: draft, student and test images -> reports/parity.json (written pass or fail) and bundle/ (on pass)."""
    draft = bundle.open_bundle(paths.DRAFT)
    model, meta = segmenter.load(paths.STUDENT_WEIGHTS)
    names = [c["name"] for c in meta["classes"]]
    policy = config.Input.model_validate(meta["params"]["input"])
    rows = pick([r for r in manifest.read(paths.SPLIT_MANIFEST) if r.split == "test"], params.parity.images)
    if not rows:
        raise ParityError("the test split has no image: raise split.test, or name test images in the source's lists")

    opened, not_judged = open_all(draft)
    images = TestImages(
        batches=inference.plan_batches(rows, policy, params.evaluate.batch),
        policy=policy,
        max_pixels=params.ingest.max_pixels,
        classes=len(names),
        ignore=meta["ignore"],
        border_px=params.evaluate.boundary_px,
    )
    measured, failed = measure_all(model, opened, images)
    not_judged |= failed

    samples = [inference.read(row, policy, params.ingest.max_pixels, mask=False) for row in rows[:TIMED]]
    with console.status("timing the variants of the network"):
        times = seconds({option: opened[option] for option in measured}, [sample.input_HWC for sample in samples])
    records = judge_all(measured, times, names, params.parity)

    sizes = sorted({f"{s.input_HWC.shape[0]}x{s.input_HWC.shape[1]}" for s in samples})
    base = records[0]
    report = ParityReport(
        **{name: getattr(base, name) for name in VariantParity.model_fields},
        ms=base.ms,
        speedup=base.speedup,
        weights=atomic.sha256(paths.STUDENT_WEIGHTS),
        provider=base.name,
        bundle=finish(draft, records, paths.BUNDLE).manifest.id if base.passed else None,
        options=tuple(records),
        not_judged={str(option): reason for option, reason in not_judged.items()},
        timed_on=", ".join(sizes),
        threads=opened[BASE].threads,
        machine=cpu.name(),
    )
    record = report.model_dump(mode="json")
    atomic.write_json(paths.PARITY, record)
    problems = tuple(f"parity: {failure}" for failure in report.failures)
    return Result(parity_table.tables(report), (), problems, Exit.DONE if report.passed else Exit.REFUSED, record)
