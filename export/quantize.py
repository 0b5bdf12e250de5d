"""Static int8 by ONNX Runtime's quantiser: Q/DQ pairs around the convolutions, ranges from training images.

Two forms, because their runtimes want different things: the CPU's kernels are twice as fast with unsigned activations;
TensorRT takes symmetric signed ones without quantised biases. Left in float: what comes before the first weighted
layer (input scaling), and the last one with all behind it (logits, up-sampling, arg max), where near-ties are decided.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

Form = Literal["cpu", "tensorrt"]
WEIGHTED = {"Conv", "ConvTranspose", "MatMul", "Gemm"}
# Activations are listed so that ranges are taken behind them, where they are cut off, and not before.
TENSORRT_TYPES = ["Conv", "MatMul", "Gemm", "Clip", "Relu", "Add"]


class QuantizeError(RuntimeError):
    """No int8 form can be made; the message says why."""


class _Reader(CalibrationDataReader):
    def __init__(self, images: Iterable[NDArray[np.uint8]], name: str) -> None:
        self._feed: Iterator[dict[str, NDArray[np.uint8]]] = iter([{name: batch} for batch in images])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:  # type: ignore[override]
        return next(self._feed, None)


def float_nodes(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes that stay in float: nothing weighted before them, or the last weighted node and all behind it."""
    weighted = [i for i, node in enumerate(graph.node) if node.op_type in WEIGHTED]
    if not weighted:
        return [node.name for node in graph.node]
    last = graph.node[weighted[-1]]
    behind, names = set(last.output), [last.name]
    touched: set[str] = set()  # tensors with a weighted node before them
    for i, node in enumerate(graph.node):
        if node.op_type in WEIGHTED or touched & set(node.input):
            touched |= set(node.output)
        else:
            names.append(node.name)
        if i > weighted[-1] and behind & set(node.input):
            behind |= set(node.output)
            names.append(node.name)
    return sorted(set(names))


def static(model: bytes, batches: Iterable[NDArray[np.uint8]], form: Form) -> bytes:
    """An fp32 graph -> the same network with int8 weights (per channel) and activations.

    Args:
        model: ONNX with one input, uint8 images NHWC.
        batches: training images as the graph takes them, N x H x W x 3; at least one.
    Raises:
        QuantizeError: no images, nothing to quantise, or the quantiser refuses the graph.
    """
    images = list(batches)
    if not images:
        raise QuantizeError("no training image to calibrate with")
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, made = (Path(folder) / name for name in ("fp32.onnx", "prepared.onnx", "int8.onnx"))
        source.write_bytes(model)
        quiet = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)  # it logs advice for the command line to the root logger
        try:
            # Symbolic shapes need sympy and name nothing that quantisation uses.
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            proto = onnx.load(prepared)
            for i, node in enumerate(proto.graph.node):
                node.name = node.name or f"node_{i}"  # left out by name
            onnx.save(proto, prepared)
            stay = float_nodes(proto.graph)
            if len(stay) == len(proto.graph.node):
                raise QuantizeError("the graph has nothing to quantise before its last convolution or matrix product")
            quantize_static(
                str(prepared), str(made), _Reader(images, proto.graph.input[0].name),
                quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax, nodes_to_exclude=stay, **_settings(form),
            )  # fmt: skip
        except QuantizeError:
            raise
        except Exception as error:  # ONNX Runtime's own exceptions derive from nothing nearer
            raise QuantizeError(f"the quantiser refuses this graph: {error}") from error
        finally:
            logging.getLogger().setLevel(quiet)
        result = onnx.load(made)
    used = {node.domain for node in result.graph.node}
    spoken = [entry for entry in result.opset_import if entry.domain in used]  # it declares every domain it knows
    del result.opset_import[:]
    result.opset_import.extend(spoken)
    del result.metadata_props[:]
    for entry in onnx.load_from_string(model).metadata_props:
        result.metadata_props.add(key=entry.key, value=entry.value)
    return result.SerializeToString(deterministic=True)


def _settings(form: Form) -> dict[str, Any]:
    if form == "cpu":
        return {"activation_type": QuantType.QUInt8}
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    return {
        "activation_type": QuantType.QInt8, "op_types_to_quantize": TENSORRT_TYPES, "extra_options": symmetric,
    }  # fmt: skip
