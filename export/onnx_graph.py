"""Student -> one ONNX graph with pre- and post-processing inside.

uint8 NHWC image -> float32 -> NCHW -> network (input scaling is its own) -> softmax -> arg max and its probability as
uint8. Batch, height and width are free, the latter two multiples of the stride.
"""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from export import onnx_proto
from export.bundle.manifest import INPUT, OUTPUTS
from training import inference

OPSET = 20


class ExportError(RuntimeError):
    """The graph cannot be made, or is not what was asked for; the message says which promise broke."""


class Deployed(nn.Module):
    """image_BHWC uint8 -> label_BHW uint8, confidence_BHW uint8 (0..255 = 0..1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        # Cast before transpose: TensorRT's parser refuses a transpose of uint8. Contiguous: with channels last in memory
        # the trace of a global average pooling ends in index arithmetic about strides (as_strided), which ONNX lacks.
        precision = next(self.model.parameters()).dtype
        image_BCHW = image_BHWC.to(torch.float32).permute(0, 3, 1, 2).contiguous()
        return inference.answer(self.model(image_BCHW.to(precision)))


@dataclass(frozen=True)
class Graph:
    """A traced graph as bytes, what it is made of, and the seconds that tracing took."""

    data: bytes
    opset: int
    ir_version: int
    nodes: int
    seconds: float


def trace(model: nn.Module, stride: int, metadata: Mapping[str, str]) -> Graph:
    """Export a network in eval mode, on the CPU; equal weights and metadata give equal bytes.

    Args:
        model: image_BCHW float32 in 0..255 -> logits_BKHW, K <= 255, with H and W multiples of `stride`.
        metadata: written to the model's metadata_props, in key order.

    Raises:
        ExportError: another opset than asked for came out, or inputs and outputs are not the promised ones.
    """
    started = time.perf_counter()
    proto = _export(model, stride)
    _strip(proto)
    onnx_proto.set_metadata(proto, dict(sorted(metadata.items())))
    check(proto, stride)

    data = proto.SerializeToString(deterministic=True)
    seconds = time.perf_counter() - started
    return Graph(data, onnx_proto.opset(proto), proto.ir_version, len(proto.graph.node), seconds)


def _export(model: nn.Module, stride: int) -> onnx.ModelProto:
    # Sizes 0 and 1 would be taken for constants, so the example is a batch of 2 of an oblong image.
    example_BHWC = torch.zeros(2, 4 * stride, 6 * stride, 3, dtype=torch.uint8)
    free = {0: Dim("batch"), 1: stride * Dim("rows"), 2: stride * Dim("columns")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export uses what torch deprecates
        program = torch.onnx.export(
            Deployed(model.cpu()).eval(),
            (example_BHWC,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(free,),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _strip(proto: onnx.ModelProto) -> None:
    """Drop what the exporter notes for debugging: stack traces with paths of this machine, names of Python objects."""
    for function in proto.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
    _strip_graph(proto.graph)
    proto.graph.name = "marginalia"
    proto.doc_string = ""


def _strip_graph(graph: onnx.GraphProto) -> None:
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
                    _strip_graph(inner)


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
