"""Student -> one ONNX graph with pre- and post-processing inside, its cheaper forms, and a draft bundle around them.

Inside the graph: uint8 NHWC image -> float32 -> NCHW -> network (input scaling is its own) -> softmax -> arg max and
its probability as uint8. Batch, height and width are free, the latter two multiples of the stride.
"""

import copy
import json
import time
import warnings
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim

from export import onnx_proto, quantize
from export.bundle import bundle
from export.bundle.manifest import INPUT, MODEL, OUTPUTS, Option
from export.tensorrt import builder
from pipeline import config, console, paths
from pipeline.stage import Result
from pipeline.storage import atomic, manifest
from training import inference
from training.models import segmenter

OPSET = 20
# What parity is to try of each file. OpenVINO computes in bf16 from the fp32 file.
OFFERED = (
    Option(runtime="onnxruntime", device="cpu", precision="fp32"),
    Option(runtime="onnxruntime", device="cpu", precision="int8", file="model.int8.onnx"),
    Option(runtime="openvino", device="cpu", precision="fp32"),
    Option(runtime="openvino", device="cpu", precision="bf16"),
    Option(runtime="openvino", device="cpu", precision="int8", file="model.int8.onnx"),
    Option(runtime="onnxruntime", device="cuda", precision="fp32"),
    Option(runtime="onnxruntime", device="cuda", precision="fp16", file="model.fp16.onnx"),
    Option(runtime="tensorrt", device="cuda", precision="fp32"),
    Option(runtime="tensorrt", device="cuda", precision="fp16", file="model.fp16.onnx"),
    Option(runtime="tensorrt", device="cuda", precision="int8", file="model.int8-tensorrt.onnx"),
)


class ExportError(RuntimeError):
    """The graph cannot be made, or is not what was asked for; the message says which promise broke."""


class Deployed(nn.Module):
    """image_BHWC uint8 -> label_BHW uint8, confidence_BHW uint8 (0..255 = 0..1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        # Cast before transpose: TensorRT's parser refuses a transpose of uint8. Contiguous: with channels last in memory
        # the trace of a global average pooling ends in index arithmetic about strides (as_strided), which ONNX lacks.
        precision = next(self.model.parameters()).dtype
        return inference.answer(self.model(image.to(torch.float32).permute(0, 3, 1, 2).contiguous().to(precision)))


@dataclass(frozen=True)
class Graph:
    data: bytes
    opset: int
    ir_version: int
    nodes: int
    seconds: float


def _strip(graph: onnx.GraphProto) -> None:
    """Drop what the exporter notes for debugging: stack traces with paths of this machine, names of Python objects."""
    graph.doc_string = ""
    del graph.metadata_props[:]
    for part in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for item in part:
            item.doc_string = ""
            del item.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            attribute.doc_string = ""
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _strip(inner)


def trace(model: nn.Module, stride: int, metadata: dict[str, str]) -> Graph:
    """Export a network in eval mode, on the CPU; equal weights and metadata give equal bytes.

    Args:
        model: image_BCHW float32 in 0..255 -> logits_BKHW, K <= 255, with H and W multiples of `stride`.
        metadata: written to the model's metadata_props, in key order.

    Raises:
        ExportError: another opset than asked for came out, or inputs and outputs are not the promised ones.
    """
    started = time.perf_counter()
    # Sizes 0 and 1 would be taken for constants, so the example is a batch of 2 of an oblong image.
    example = torch.zeros(2, 4 * stride, 6 * stride, 3, dtype=torch.uint8)
    free = {0: Dim("batch"), 1: stride * Dim("rows"), 2: stride * Dim("columns")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export uses what torch deprecates
        program = torch.onnx.export(
            Deployed(model.cpu()).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(free,),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for function in proto.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
    _strip(proto.graph)
    proto.graph.name = "marginalia"
    proto.doc_string = ""
    onnx_proto.set_metadata(proto, dict(sorted(metadata.items())))
    check(proto, stride)
    data = proto.SerializeToString(deterministic=True)
    return Graph(data, onnx_proto.opset(proto), proto.ir_version, len(proto.graph.node), time.perf_counter() - started)


def check(proto: onnx.ModelProto, stride: int) -> None:
    """Hold the graph to its promises. Raises ExportError."""
    onnx.checker.check_model(proto, full_check=True)
    if onnx_proto.opset(proto) != OPSET:
        raise ExportError(
            f"asked for opset {OPSET}, the exporter wrote {onnx_proto.opset(proto)}: the torch and onnxscript pins moved apart"
        )
    signature = {
        value.name: (value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim))
        for value in (*proto.graph.input, *proto.graph.output)
    }
    uint8 = onnx.TensorProto.UINT8
    if signature != {INPUT: (uint8, 4), OUTPUTS[0]: (uint8, 3), OUTPUTS[1]: (uint8, 3)}:
        raise ExportError(f"inputs and outputs are {signature}, not uint8 {INPUT} and {OUTPUTS}")
    fixed = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[:3] if d.HasField("dim_value")]
    if fixed:
        raise ExportError(f"batch, height and width must be free (multiples of {stride}), but {fixed} became constants")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        raise ExportError("weights went to a second file; a bundle holds one")


def describe(meta: dict[str, Any], scores: dict[str, Any]) -> dict[str, str]:
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
    plain = {key: str(scores[key]) for key in ("data_hash", "split_hash", "test_hash", "commit", "weights", "method")}
    return {key: json.dumps(value, sort_keys=True) for key, value in values.items()} | plain


def calibration(params: config.Params, policy: config.Input) -> list[Any]:
    """Training images, spread evenly over labelled and unlabelled ones, as the graph takes them, one N x H x W x 3 each."""
    rows = sorted(
        (r for r in manifest.read(paths.SPLIT_MANIFEST) if r.split in ("labelled", "unlabelled")),
        key=lambda row: row.id,
    )
    count = min(len(rows), params.export.calibration_images)
    picked = [rows[i * len(rows) // count] for i in range(count)]
    return [inference.read(row, policy, params.ingest.max_pixels, mask=False).input_HWC[None] for row in picked]


def others(
    model: nn.Module, graph: Graph, metadata: dict[str, str], params: config.Params, policy: config.Input, card: bool
) -> tuple[dict[str, bytes], dict[str, str]]:
    """The cheaper forms by file name, and what is to be said of one: how int8 was made, or why a form could not be.

    Forms for a card only where parity can run them.
    """
    made: dict[str, bytes] = {}
    said: dict[str, str] = {}
    wanted: dict[str, Any] = {}

    def int8(name: str, form: quantize.Target) -> bytes:
        found = quantize.quantize_to_agreement(graph.data, images, form, params.parity.int8.agreement)
        said[name] = (
            f"{found.float_layers} first layers in float, {found.agreement:.4f} of the labels as fp32 in calibration"
        )
        return found.model

    if params.export.int8:
        images = calibration(params, policy)
        wanted["model.int8.onnx"] = lambda: int8("model.int8.onnx", "cpu")
        if card:
            wanted["model.int8-tensorrt.onnx"] = lambda: int8("model.int8-tensorrt.onnx", "tensorrt")
    if card:
        wanted["model.fp16.onnx"] = lambda: trace(copy.deepcopy(model).half(), policy.stride, metadata).data
    for name, make in wanted.items():
        try:
            made[name] = make()
        except Exception as error:  # exporter and quantiser raise what they like; fp32 needs neither
            said[name] = f"not made: {str(error) or repr(error)}"
    return made, said


def run(params: config.Params) -> Result:
    """The stage: student, scores and some training images -> models/exported/ and reports/export.json."""
    model, meta = segmenter.load(paths.STUDENT_WEIGHTS)
    scores = atomic.read_json(paths.SCORES)
    weights = atomic.sha256(paths.STUDENT_WEIGHTS)
    if scores["weights"] != weights:
        raise ExportError(
            f"{paths.STUDENT_WEIGHTS} is not what {paths.SCORES} was measured on; run the evaluate stage again"
        )
    policy = config.Input.model_validate(meta["params"]["input"])
    metadata, gpu = describe(meta, scores), builder.look()
    with console.status("tracing the network"):
        graph = trace(model, policy.stride, metadata)
    with console.status("making its cheaper forms"):
        forms, said = others(model, graph, metadata, params, policy, bool(gpu.cards))
    metrics = {key: scores[key] for key in ("miou", "miou_all", "miou_ci", "pixel_accuracy", "boundary_iou", "ece")}
    for key, of in (("per_class", "iou"), ("per_class_ci", "ci")):
        metrics[key] = {name: row[of] for name, row in scores["per_class"].items()}
    made = bundle.create(
        paths.DRAFT,
        graph.data,
        classes=meta["classes"],
        long_side=policy.long_side,
        stride=policy.stride,
        metrics=metrics,
        card=paths.MODEL_CARD.read_text(encoding="utf-8"),
        opset=graph.opset,
        ir_version=graph.ir_version,
        others=forms,
        options=[option for option in OFFERED if option.file in (MODEL, *forms)],
        **{key: scores[key] for key in ("data_hash", "split_hash", "test_hash", "commit", "method")},
    )
    report = {
        "draft": made.manifest.id, "weights": weights, "bytes": {name: len(made.read_model(name)) for name in made.models},
        "forms": said, "nodes": graph.nodes, "opset": graph.opset, "ir_version": graph.ir_version,
        "seconds": round(graph.seconds, 2), "torch": torch.__version__, "onnx": onnx.__version__,
        "tensorrt": gpu.as_dict(),
    }  # fmt: skip
    atomic.write_json(paths.EXPORT, report)
    table = Table(title="exported, to be judged by parity", show_header=False)
    table.add_row("graph", f"{graph.nodes} nodes, opset {graph.opset}, IR {graph.ir_version}")
    for name, size in report["bytes"].items():
        table.add_row(name, f"{size / 1e6:.1f} MB")
    for name, what in said.items():
        table.add_row(name, what)
    table.add_row("tracing took", f"{graph.seconds:.1f} s")
    table.add_row("TensorRT", report["tensorrt"]["says"])
    return Result((table,), record=report)
