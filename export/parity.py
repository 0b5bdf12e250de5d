"""Stage `parity`: every form of the network, in every runtime of this machine, against torch; what passes is the bundle.

The draft holds fp32 and the cheaper forms. fp32 in ONNX Runtime must agree with torch or the stage fails. Each other
option enters the bundle if it keeps its own bars and is faster than fp32 here; the report says why not. It is judged
on test images, which have trained nothing and calibrated nothing.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from export.bundle import bundle
from export.bundle.manifest import MODEL, Option
from export.parity_metrics import Measured, measure, report
from export.runtime import cpu
from export.runtime.runtime import Runtime
from export.runtime.sessions import ProviderError
from pipeline import config, console, paths
from pipeline.stage import Exit, Result
from pipeline.storage import atomic, manifest
from training import inference
from training.models import segmenter

BASE = Option(runtime="onnxruntime", device="cpu", precision="fp32")
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


def verdict(option: Option, said: dict[str, Any], speedup: float, least: float) -> str | None:
    """Why an option stays out of the bundle; None when it goes in."""
    if said["failures"]:
        return str(said["failures"][0])
    if speedup < least:
        return f"{speedup:.2f} times the speed of fp32 in ONNX Runtime, below parity.speedup {least:g}"
    return None


def judge_all(
    measured: Mapping[Option, Measured], times: Mapping[Option, float], names: Sequence[str], bars: config.Parity
) -> list[dict[str, Any]]:
    """One record per measured option, fp32 in ONNX Runtime first: its report, milliseconds, speed-up and verdict."""
    records = []
    for option, found in measured.items():
        key = {"fp32": "parity", "int8": "parity.int8"}.get(option.precision, "parity.half")
        said = report(found, names, bars.limits(option.precision), key)
        plain = [o for o in times if o.device == option.device and o.precision == "fp32"]
        base = min(plain, key=lambda o: (o.runtime != "onnxruntime", times[o]), default=BASE)
        speedup = times[base] / times[option]
        reason = None if option == BASE else verdict(option, said, speedup, 0 if option == base else bars.speedup)
        facts = {k: getattr(option, k) for k in ("runtime", "device", "precision", "file")} | {"name": str(option)}
        milliseconds = round(1000 * times[option], 2)
        records.append(said | facts | {"ms": milliseconds, "speedup": round(speedup, 3), "left_out": reason})
    return records


def finish(draft: bundle.Bundle, records: Sequence[dict[str, Any]], folder: Path) -> bundle.Bundle:
    """Write the bundle: the draft with the admitted options alone, and only the models that these use."""
    keys = ("runtime", "device", "precision", "file", "speedup", "miou_drop")
    options = [
        Option(agreement=round(r["grid"]["agreement"], 6), **{k: r[k] for k in keys})
        for r in records
        if r["left_out"] is None and r["passed"]
    ]
    used: set[str] = {MODEL, *(option.file for option in options)}
    models = {name: draft.read_model(name) for name in draft.models if name in used}
    description = draft.manifest.description(options=options, rejected=[r["name"] for r in records if r["failures"]])
    card = (draft.folder / bundle.CARD).read_text(encoding="utf-8")
    return bundle.create(folder, models, description, card)


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _shown(said: dict[str, Any]) -> list[Table | str]:
    verdict = "passed" if said["passed"] else "FAILED"
    table = Table(
        "agreement on", "working grid", "original", title=f"parity {verdict}: onnxruntime cpu fp32 against torch"
    )
    table.caption = (
        f"{said['images']} test images; mIoU torch {_points(said['miou_torch'])}, "
        f"runtime {_points(said['miou_runtime'])}; "
        f"{said['differing_pixels']} pixels differ, {said['near_ties_among_them']} of them near-ties"
    )
    for name, share in said["grid"]["per_class"].items():
        cells = ["-" if v is None else f"{v:.6f}" for v in (share, said["original"]["per_class"][name])]
        table.add_row(name, *cells)
    table.add_row("all pixels", *(f"{said[place]['agreement']:.6f}" for place in ("grid", "original")), style="bold")
    forms = Table("option", "ms", "speed-up", "agreement", "lowest class", "borders", "mIoU drop", "bundle")
    forms.title = f"forms of the network: one image of {said['timed_on']} pixels, {said['threads']} threads"
    for row in said["options"]:
        shares = [v for v in row["grid"]["per_class"].values() if v is not None]
        forms.add_row(
            row["name"], f"{row['ms']:.1f}", f"{row['speedup']:.2f}", f"{row['grid']['agreement']:.4f}",
            f"{min(shares):.3f}", f"{row['border_agreement']:.4f}",
            "-" if row["miou_drop"] is None else f"{row['miou_drop']:+.2f}",
            "yes" if row["left_out"] is None and row["passed"] else "no",
        )  # fmt: skip
    if unseen := [name for name, v in said["class_drop"].items() if v is None]:
        forms.caption = f"no test image shows {', '.join(unseen)}: nothing here speaks of these classes"
    left_out = {row["name"]: row["left_out"] for row in said["options"] if row["left_out"]}
    reasons = (left_out | said["not_judged"]).items()
    return [table, forms, *(f"  left out: {name}: {reason}" for name, reason in reasons)]


def run(params: config.Params) -> Result:
    """The stage: draft, student and test images -> reports/parity.json (written pass or fail) and bundle/ (on pass)."""
    draft = bundle.open_bundle(paths.DRAFT)
    model, meta = segmenter.load(paths.STUDENT_WEIGHTS)
    names = [c["name"] for c in meta["classes"]]
    policy = config.Input.model_validate(meta["params"]["input"])
    rows = pick([r for r in manifest.read(paths.SPLIT_MANIFEST) if r.split == "test"], params.parity.images)
    if not rows:
        raise ParityError("the test split has no image: raise split.test, or name test images in the source's lists")
    opened, refused = open_all(draft)
    by_name, failed = measure(
        model,
        {str(option): runtime for option, runtime in opened.items()},
        inference.plan_batches(rows, policy, params.evaluate.batch),
        policy=policy,
        classes=len(names),
        ignore=meta["ignore"],
        max_pixels=params.ingest.max_pixels,
        border_px=params.evaluate.boundary_px,
    )
    for option in [o for o in opened if str(o) in failed]:
        refused[option] = failed[str(option)]
        del opened[option]
    samples = [inference.read(row, policy, params.ingest.max_pixels, mask=False) for row in rows[:TIMED]]
    with console.status("timing the forms of the network"):
        times = seconds(opened, [sample.input_HWC for sample in samples])
    records = judge_all({o: by_name[str(o)] for o in opened}, times, names, params.parity)
    sizes = sorted({f"{s.input_HWC.shape[0]}x{s.input_HWC.shape[1]}" for s in samples})
    first = records[0]
    said = {k: v for k, v in first.items() if k not in ("left_out", "runtime", "device", "precision", "file", "name")}
    said |= {
        "weights": atomic.sha256(paths.STUDENT_WEIGHTS), "provider": "onnxruntime cpu fp32", "bundle": None, "options": records,
        "not_judged": {str(o): reason for o, reason in refused.items()}, "timed_on": ", ".join(sizes),
        "threads": opened[BASE].threads, "machine": cpu.name(),
    }  # fmt: skip
    if said["passed"]:
        said["bundle"] = finish(draft, records, paths.BUNDLE).manifest.id
    atomic.write_json(paths.PARITY, said)
    problems = tuple(f"parity: {failure}" for failure in said["failures"])
    return Result(_shown(said), (), problems, Exit.DONE if said["passed"] else Exit.REFUSED, said)
