"""Is a variant near enough to torch, and fast enough? Every limit that is not kept, with the class and the numbers.

Arg max agreement of class c is judged on the pixels that torch calls c. Any class outside its limit fails although the
mean may pass, and near-ties are not forgiven.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from export.bundle.manifest import Option
from export.parity_metrics import NEAR_TIE, Agreement, Measured
from pipeline.champions import metrics as scores
from pipeline.champions.parity_report import VariantParity, VariantReport
from pipeline.config import Parity, ParityLimits

BASE = Option(runtime="onnxruntime", device="cpu", precision="fp32")


def judge(measured: Measured, names: Sequence[str], limits: ParityLimits, key: str = "parity") -> list[str]:
    """Every limit that is not kept, each with the class and the numbers; empty when parity holds.

    `key` is where the limits stand in params.yaml.
    """
    failures = []
    for place, agreement in (("working grid", measured.grid), ("original resolution", measured.original)):
        failures += _judge_agreement(agreement, place, names, limits, key)

    if measured.served < limits.agreement:
        failures.append(
            f"serving's own path agrees with the graph on {measured.served:.6f} of an image's pixels, below "
            f"{key}.agreement {limits.agreement:g}: its input policy is not evaluation's"
        )

    drop = scores.miou(measured.torch_KK) - scores.miou(measured.runtime_KK)
    if not drop <= limits.miou_drop:  # not a number where no class is known
        failures.append(f"mIoU falls by {drop:.3f} points, more than {key}.miou_drop {limits.miou_drop:g}")

    for name, points in _class_drops(measured, names).items():
        if points > limits.class_drop:
            failures.append(
                f"class {name!r} loses {points:.2f} points of IoU, more than {key}.class_drop {limits.class_drop:g}"
            )
    return failures


def _judge_agreement(
    agreement: Agreement, place: str, names: Sequence[str], limits: ParityLimits, key: str
) -> list[str]:
    failures = []
    if agreement.overall < limits.agreement:
        failures.append(f"{place}: agreement {agreement.overall:.6f} is below {key}.agreement {limits.agreement:g}")
    for name, share in agreement.per_class(names).items():
        if share is not None and share < limits.class_agreement:
            failures.append(
                f"{place}: class {name!r} agrees on {share:.6f} of its pixels, below {key}.class_agreement "
                f"{limits.class_agreement:g} (overall {agreement.overall:.6f})"
            )
    return failures


def _class_drops(measured: Measured, names: Sequence[str]) -> dict[str, float]:
    """IoU points that each class loses; not a number for a class that no test image shows."""
    lost = 100 * (scores.iou(measured.torch_KK) - scores.iou(measured.runtime_KK))
    return {name: float(points) for name, points in zip(names, lost, strict=True)}


def report(measured: Measured, names: Sequence[str], limits: ParityLimits, key: str = "parity") -> VariantParity:
    """The verdict and all numbers of one variant."""
    failures = judge(measured, names, limits, key)
    torch_miou, runtime_miou = scores.miou(measured.torch_KK), scores.miou(measured.runtime_KK)
    known = not (np.isnan(torch_miou) or np.isnan(runtime_miou))
    drops = _class_drops(measured, names)
    return VariantParity(
        passed=not failures,
        failures=tuple(failures),
        limits=ParityLimits.model_validate({name: getattr(limits, name) for name in ParityLimits.model_fields}),
        images=measured.images,
        original=measured.original.report(names),
        grid=measured.grid.report(names),
        miou_torch=torch_miou if known else None,
        miou_runtime=runtime_miou if known else None,
        miou_drop=torch_miou - runtime_miou if known else None,
        differing_pixels=measured.differing,
        near_ties_among_them=measured.near_ties,
        near_tie_margin=NEAR_TIE,
        class_drop={name: None if np.isnan(points) else points for name, points in drops.items()},
        border_agreement=None if measured.border is None else measured.border.overall,
        serving_path_agreement=measured.served,
        largest_confidence_gap=measured.confidence_levels,
    )


def judge_all(
    measured: Mapping[Option, Measured], seconds: Mapping[Option, float], names: Sequence[str], limits: Parity
) -> list[VariantReport]:
    """One record per measured option, in their order: its report, milliseconds, speed-up and why it is left out."""
    records = []
    for option, found in measured.items():
        key = {"fp32": "parity", "int8": "parity.int8"}.get(option.precision, "parity.half")
        parity = report(found, names, limits.limits(option.precision), key)

        base = _fp32_on_the_same_device(option, seconds)
        speedup = seconds[base] / seconds[option]
        least = 0 if option == base else limits.speedup
        records.append(
            VariantReport(
                **dict(parity),
                runtime=option.runtime,
                device=option.device,
                precision=option.precision,
                file=option.file,
                name=str(option),
                ms=round(1000 * seconds[option], 2),
                speedup=round(speedup, 3),
                left_out=None if option == BASE else _reason(parity, speedup, least),
            )
        )
    return records


def _fp32_on_the_same_device(option: Option, seconds: Mapping[Option, float]) -> Option:
    """What an option's speed is compared with: ONNX Runtime's fp32 there, else the fastest fp32 there, else `BASE`."""
    plain = [o for o in seconds if o.device == option.device and o.precision == "fp32"]
    return min(plain, key=lambda o: (o.runtime != "onnxruntime", seconds[o]), default=BASE)


def _reason(parity: VariantParity, speedup: float, least: float) -> str | None:
    """Why an option stays out of the bundle; None when it goes in."""
    if parity.failures:
        return parity.failures[0]
    if speedup < least:
        return f"{speedup:.2f} times the speed of fp32 in ONNX Runtime, below parity.speedup {least:g}"
    return None
