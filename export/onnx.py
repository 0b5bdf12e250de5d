"""Stage `export`: the student as ONNX, its cheaper variants, and a draft bundle around them for parity to judge."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import onnx
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table

from export.bundle import bundle
from export.bundle.manifest import MODEL, Description, InputPolicy, explain
from export.onnx_graph import ExportError, Graph
from export.tensorrt import installation
from export.variants import Student, Variants, make_variants
from pipeline import config, console, paths
from pipeline.stage import Result
from pipeline.storage import atomic
from training.models import segmenter

# Of the scores, what a bundle repeats: numbers over all classes, and hashes of what they were measured on.
METRICS = ("miou", "miou_all", "miou_ci", "pixel_accuracy", "boundary_iou", "ece")
PROVENANCE = ("data_hash", "split_hash", "test_hash", "commit", "method")


class ExportReport(BaseModel):
    """reports/export.json: the draft's id, its files in bytes, how the variants were made, and what made them.

    `seconds` is what tracing took; `weights` the SHA-256 of the student's file.
    """

    model_config = ConfigDict(frozen=True, serialize_by_alias=True)

    draft: str
    weights: str
    bytes: dict[str, int]
    variants: dict[str, str] = Field(serialization_alias="forms")
    nodes: int
    opset: int
    ir_version: int
    seconds: float
    torch: str
    onnx: str
    tensorrt: installation.Installation


def graph_metadata(meta: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, str]:
    """The metadata that travels inside model.onnx: classes and palette, input policy, hashes, commit, method.

    The bundle's id is not among it, being a hash over these very bytes: `weights` names the network here, and
    `export.tools.standalone_onnx` adds the id to what it makes of the finished bundle.
    """
    policy = {"layout": "NHWC", "dtype": "uint8", "channels": "RGB", **meta["params"]["input"]}
    values = {
        "classes": [c["name"] for c in meta["classes"]],
        "palette": [list(c["color"]) for c in meta["classes"]],
        "ignore": meta["ignore"],
        "input": policy,
    }
    plain = {key: str(scores[key]) for key in (*PROVENANCE, "weights")}
    return {key: json.dumps(value, sort_keys=True) for key, value in values.items()} | plain


def describe_draft(
    meta: Mapping[str, Any], scores: Mapping[str, Any], policy: config.Input, graph: Graph, variants: Variants
) -> Description:
    """What the draft's manifest says. Raises ExportError when the weights' classes make no valid one."""
    metrics = {key: scores[key] for key in METRICS}
    metrics["per_class"] = {name: row["iou"] for name, row in scores["per_class"].items()}
    metrics["per_class_ci"] = {name: row["ci"] for name, row in scores["per_class"].items()}
    fields = {
        "name": "marginalia",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "classes": meta["classes"],
        "input": InputPolicy(long_side=policy.long_side, stride=policy.stride),
        "options": variants.offered(),
        "metrics": metrics,
        "opset": graph.opset,
        "ir_version": graph.ir_version,
    }
    try:
        return Description.model_validate(fields | {key: scores[key] for key in PROVENANCE})
    except ValidationError as error:
        raise ExportError(f"{paths.STUDENT_WEIGHTS}: {explain(error)}; train again") from error


def run(params: config.Params) -> Result:
    """The stage: student, scores and some training images -> models/exported/ and reports/export.json."""
    network, meta = segmenter.load(paths.STUDENT_WEIGHTS)
    scores = atomic.read_json(paths.SCORES)
    weights = atomic.sha256(paths.STUDENT_WEIGHTS)
    if scores["weights"] != weights:
        raise ExportError(
            f"{paths.STUDENT_WEIGHTS} is not what {paths.SCORES} was measured on; run the evaluate stage again"
        )

    policy = config.Input.model_validate(meta["params"]["input"])
    student = Student(network, policy, graph_metadata(meta, scores))
    gpu = installation.look()
    with console.status("tracing the network"):
        graph = student.trace()
    with console.status("making its cheaper variants"):
        variants = make_variants(student, graph, params, has_card=bool(gpu.cards))

    models = {MODEL: graph.data, **variants.models}
    description = describe_draft(meta, scores, policy, graph, variants)
    draft = bundle.create(paths.DRAFT, models, description, card=paths.MODEL_CARD.read_text(encoding="utf-8"))
    report = ExportReport(
        draft=draft.manifest.id,
        weights=weights,
        bytes={name: len(models[name]) for name in draft.models},
        variants=variants.notes,
        nodes=graph.nodes,
        opset=graph.opset,
        ir_version=graph.ir_version,
        seconds=round(graph.seconds, 2),
        torch=torch.__version__,
        onnx=onnx.__version__,
        tensorrt=gpu,
    )
    record = report.model_dump(mode="json")
    atomic.write_json(paths.EXPORT, record)
    return Result((_table(report),), record=record)


def _table(report: ExportReport) -> Table:
    table = Table(title="exported, to be judged by parity", show_header=False)
    table.add_row("graph", f"{report.nodes} nodes, opset {report.opset}, IR {report.ir_version}")
    for name, size in report.bytes.items():
        table.add_row(name, f"{size / 1e6:.1f} MB")
    for name, note in report.variants.items():
        table.add_row(name, note)
    table.add_row("tracing took", f"{report.seconds:.1f} s")
    table.add_row("TensorRT", report.tensorrt.says)
    return table
