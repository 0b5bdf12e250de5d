"""Static int8 by ONNX Runtime's quantiser: Q/DQ pairs around the convolutions, ranges from training images.

Two forms, because their runtimes want different things: the CPU's kernels are twice as fast with unsigned activations;
TensorRT takes symmetric signed ones without quantised biases. Left in float: what comes before the first weighted
layer (input scaling), and the last one with all behind it (logits, up-sampling, arg max), where near-ties are decided.
For the CPU weights have 7 of their 8 bits: processors without 8-bit dot products add pairs of products in 16 bits, which
255 * 127 * 2 overflows (ONNX Runtime, "Quantize ONNX models"; on the demo's network 0.985 of the labels as fp32 instead
of 0.980).
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime
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
# How many of the first layers stay in float, tried in turn until the labels agree well enough. Those are the depthwise
# convolutions on few channels with ranges that differ widely; on the demo's network 4 bring 0.985 to 0.991.
FIRST = (0, 4, 8, 16, 24, 32)
# Labels differ on unseen images so many times as often as on those that set the ranges, at most: seen 1.33 to 1.49 over
# FIRST on CamVid (8 layers: 0.9928 of the labels as fp32 in calibration, 0.9893 in test), 0.5 to 1 on the demo.
UNSEEN = 1.5
WEIGHTED = {"Conv", "ConvTranspose", "MatMul", "Gemm"}
# Activations are listed so that ranges are taken behind them, where they are cut off, and not before.
TENSORRT_TYPES = ["Conv", "MatMul", "Gemm", "Clip", "Relu", "Add"]


class QuantizeError(RuntimeError):
    """No int8 form can be made; the message says why."""


class Made(NamedTuple):
    """An int8 graph, how many of its first layers stayed in float, and the share of labels as fp32 on the images."""

    model: bytes
    first: int
    agreement: float


class _Reader(CalibrationDataReader):
    def __init__(self, images: Iterable[NDArray[np.uint8]], name: str) -> None:
        self._feed: Iterator[dict[str, NDArray[np.uint8]]] = iter([{name: batch} for batch in images])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:  # type: ignore[override]
        return next(self._feed, None)


def float_nodes(graph: onnx.GraphProto, first: int = 0) -> list[str]:
    """Names of the nodes that stay in float: nothing weighted before them, the last weighted node and all behind it, and
    the `first` weighted nodes."""
    weighted = [i for i, node in enumerate(graph.node) if node.op_type in WEIGHTED]
    if not weighted:
        return [node.name for node in graph.node]
    last = graph.node[weighted[-1]]
    behind, names = set(last.output), [last.name, *(graph.node[i].name for i in weighted[:first])]
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


def careful(model: bytes, batches: Sequence[NDArray[np.uint8]], form: Form, agreement: float) -> Made:
    """`static` with as few of the first layers in float as it takes for labels to agree with fp32's in the share
    `agreement` on images that are not seen here, by `UNSEEN`; where no number in `FIRST` is enough, the first with that
    share on these images, or else the best of them.

    Raises:
        QuantizeError: as `static`.
    """
    wanted, best, ready = _labels(model, batches), None, prepared(model)
    enough = 1 - (1 - agreement) / UNSEEN
    with tempfile.TemporaryDirectory() as folder:
        for first in FIRST:
            try:
                data = static(model, batches, form, first=first, ranges=Path(folder) / "ranges.json", ready=ready)
            except QuantizeError:
                if best is None:
                    raise
                break  # a small network: so many layers are all it has; and what was made is still to be judged
            same = [(a == b).mean() for a, b in zip(wanted, _labels(data, batches), strict=True)]
            made = Made(data, first, float(np.mean(same)))
            if best is None or best.agreement < min(made.agreement, agreement):
                best = made
            if made.agreement >= enough:
                return made
    assert best is not None
    return best


def _labels(model: bytes, batches: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs()[0].name, [session.get_outputs()[0].name]
    return [session.run(outputs, {inputs: batch})[0] for batch in batches]


@contextmanager
def _quantiser() -> Iterator[None]:
    """ONNX Runtime's quantiser at work: quiet, and what it raises is a QuantizeError."""
    quiet = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it logs advice for the command line to the root logger
    try:
        yield
    except Exception as error:  # ONNX Runtime's own exceptions derive from nothing nearer
        raise QuantizeError(f"the quantiser refuses this graph: {error}") from error
    finally:
        logging.getLogger().setLevel(quiet)


def prepared(model: bytes) -> bytes:
    """An fp32 graph as the quantiser wants it: folded, its shapes inferred, and every node with a name.

    Raises:
        QuantizeError: the quantiser refuses the graph.
    """
    with tempfile.TemporaryDirectory() as folder, _quantiser():
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "prepared.onnx"
        source.write_bytes(model)
        # Symbolic shapes need sympy and name nothing that quantisation uses.
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
        proto = onnx.load(target)
        for i, node in enumerate(proto.graph.node):
            node.name = node.name or f"node_{i}"  # left out by name
        return proto.SerializeToString()


def static(
    model: bytes,
    batches: Iterable[NDArray[np.uint8]],
    form: Form,
    *,
    first: int = 0,
    ranges: Path | None = None,
    ready: bytes | None = None,
) -> bytes:
    """An fp32 graph -> the same network with int8 weights (per channel) and activations.

    Args:
        model: ONNX with one input, uint8 images NHWC.
        batches: training images as the graph takes them, N x H x W x 3; at least one.
        first: so many of the first weighted layers stay in float.
        ranges: file of the activations' ranges; read where it is there, else written. Of the same graph and images.
        ready: `prepared(model)`, where the caller has it already.
    Raises:
        QuantizeError: no images, nothing to quantise, or the quantiser refuses the graph.
    """
    images = list(batches)
    if not images:
        raise QuantizeError("no training image to calibrate with")
    ready = ready or prepared(model)
    graph = onnx.load_from_string(ready).graph
    stay = float_nodes(graph, first)
    if all(node.name in stay for node in graph.node if node.op_type in WEIGHTED):
        raise QuantizeError("the graph has nothing to quantise before its last convolution or matrix product")
    with tempfile.TemporaryDirectory() as folder, _quantiser():
        source, made = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(ready)
        quantize_static(
            str(source), str(made), _Reader(images, graph.input[0].name),
            quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax, nodes_to_exclude=stay,
            calibration_cache_path=ranges, **_settings(form),
        )  # fmt: skip
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
        return {"activation_type": QuantType.QUInt8, "reduce_range": True}
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    return {
        "activation_type": QuantType.QInt8, "op_types_to_quantize": TENSORRT_TYPES, "extra_options": symmetric,
    }  # fmt: skip
