"""Static int8 by ONNX Runtime's quantiser: Q/DQ pairs around the convolutions, ranges from training images.

Two targets, because their runtimes want different things: the CPU's kernels are twice as fast with unsigned activations;
TensorRT takes symmetric signed ones without quantised biases. Left in float: what comes before the first weighted
layer (input scaling), and the last one with all behind it (logits, up-sampling, arg max), where near-ties are decided.
For the CPU weights have 7 of their 8 bits: processors without 8-bit dot products add pairs of products in 16 bits, which
255 * 127 * 2 overflows (ONNX Runtime, "Quantize ONNX models"; on the demo's network 0.985 of the labels as fp32 instead
of 0.980).
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from export import onnx_proto
from export.runtime import telemetry

Target = Literal["cpu", "tensorrt"]
# How many of the first layers stay in float, tried in turn until the labels agree well enough. Those are the depthwise
# convolutions on few channels with ranges that differ widely; on the demo's network 4 bring 0.985 to 0.991.
FLOAT_LAYERS = (0, 4, 8, 16, 24, 32)
# Labels differ on unseen images so many times as often as on those that set the ranges, at most: seen 1.33 to 1.49 over
# FLOAT_LAYERS on CamVid (8 layers: 0.9928 of the labels as fp32 in calibration, 0.9893 in test), 0.5 to 1 on the demo.
UNSEEN = 1.5
WEIGHTED = {"Conv", "ConvTranspose", "MatMul", "Gemm"}
# Activations are listed so that ranges are taken behind them, where they are cut off, and not before.
TENSORRT_TYPES = ["Conv", "MatMul", "Gemm", "Clip", "Relu", "Add"]


class QuantizeError(RuntimeError):
    """No int8 variant can be made; the message says why."""


class Quantized(NamedTuple):
    """An int8 graph, how many of its first layers stayed in float, and the share of labels as fp32 on the images."""

    model: bytes
    float_layers: int
    agreement: float


class _Reader:
    """The images one by one, as ONNX Runtime's `CalibrationDataReader` (whose interface this is) gives them."""

    def __init__(self, images: Sequence[NDArray[np.uint8]], name: str) -> None:
        self._feed = iter([{name: image_NHWC} for image_NHWC in images])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._feed, None)


def float_nodes(graph: onnx.GraphProto, float_layers: int = 0) -> list[str]:
    """Names of the nodes that stay in float: nothing weighted before them, the last weighted node and all behind it, and
    the first `float_layers` weighted nodes."""
    weighted = [i for i, node in enumerate(graph.node) if node.op_type in WEIGHTED]
    if not weighted:
        return [node.name for node in graph.node]

    last = graph.node[weighted[-1]]
    names = {last.name, *(graph.node[i].name for i in weighted[:float_layers])}
    behind = set(last.output)
    touched: set[str] = set()  # tensors with a weighted node before them
    for i, node in enumerate(graph.node):
        if node.op_type in WEIGHTED or touched & set(node.input):
            touched |= set(node.output)
        else:
            names.add(node.name)
        if i > weighted[-1] and behind & set(node.input):
            behind |= set(node.output)
            names.add(node.name)
    return sorted(names)


def prepare(model: bytes) -> bytes:
    """An fp32 graph as the quantiser wants it: folded, its shapes inferred, and every node with a name.

    Raises:
        QuantizeError: the quantiser refuses the graph.
    """
    telemetry.turn_off()
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, _quantiser():
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "prepared.onnx"
        source.write_bytes(model)
        # Symbolic shapes need sympy and name nothing that quantisation uses.
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)

        proto = onnx.load(target)
        for i, node in enumerate(proto.graph.node):
            node.name = node.name or f"node_{i}"  # nodes are left out by name
        return bytes(proto.SerializeToString())


class Quantizer:
    """int8 graphs of one fp32 graph, with other numbers of layers left in float; prepared and calibrated once.

    Use it in a `with` block: what it keeps between calls lies in a temporary folder.
    """

    def __init__(self, model: bytes, images: Sequence[NDArray[np.uint8]], target: Target) -> None:
        """Prepare the graph.

        Args:
            model: ONNX with one input, uint8 images NHWC.
            images: training images as the graph takes them, N x H x W x 3 each; at least one.

        Raises:
            QuantizeError: no images, or the quantiser refuses the graph.
        """
        if not images:
            raise QuantizeError("no training image to calibrate with")
        self._metadata = onnx_proto.metadata(_parsed(model))
        self._prepared = prepare(model)
        self._graph = onnx.load_from_string(self._prepared).graph
        self._images = images
        self._target = target
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> "Quantizer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def quantize(self, float_layers: int = 0) -> bytes:
        """The network with int8 weights (per channel) and activations; so many of the first weighted layers stay in float.

        Raises:
            QuantizeError: nothing is left to quantise, or the quantiser refuses the graph.
        """
        stay = float_nodes(self._graph, float_layers)
        if all(node.name in stay for node in self._graph.node if node.op_type in WEIGHTED):
            raise QuantizeError("the graph has nothing to quantise before its last convolution or matrix product")

        result = self._run(stay)

        # The quantiser declares every operator domain that it knows.
        used = {node.domain for node in result.graph.node}
        domains = [entry for entry in result.opset_import if entry.domain in used]
        del result.opset_import[:]
        result.opset_import.extend(domains)

        onnx_proto.set_metadata(result, self._metadata)
        return bytes(result.SerializeToString(deterministic=True))

    def _run(self, stay: list[str]) -> onnx.ModelProto:
        """The quantiser's own graph, with the nodes in `stay` in float."""
        telemetry.turn_off()
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        folder = Path(self._folder.name)
        source, target = folder / "prepared.onnx", folder / "int8.onnx"
        with _quantiser():
            source.write_bytes(self._prepared)
            quantize_static(
                str(source),
                str(target),
                _Reader(self._images, self._graph.input[0].name),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=stay,
                calibration_cache_path=folder / "ranges.json",  # read where it is there, else written
                **_target_settings(self._target),
            )
            return onnx.load(target)


def _target_settings(target: Target) -> dict[str, Any]:
    """What `quantize_static` is told for one target only."""
    from onnxruntime.quantization import QuantType

    if target == "cpu":
        return {"activation_type": QuantType.QUInt8, "reduce_range": True}
    return {
        "activation_type": QuantType.QInt8,
        "op_types_to_quantize": TENSORRT_TYPES,
        "extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    }


def quantize(model: bytes, images: Sequence[NDArray[np.uint8]], target: Target, float_layers: int = 0) -> bytes:
    """An fp32 graph -> the same network in int8, as `Quantizer` makes it. Raises QuantizeError."""
    with Quantizer(model, images, target) as quantizer:
        return quantizer.quantize(float_layers)


def quantize_to_agreement(
    model: bytes, images: Sequence[NDArray[np.uint8]], target: Target, agreement: float
) -> Quantized:
    """int8 with as few of the first layers in float as it takes for labels to agree with fp32's in the share `agreement`
    on images that are not seen here, by `UNSEEN`; where no number in `FLOAT_LAYERS` is enough, the first with that share
    on these images, or else the best of them.

    Raises:
        QuantizeError: as `Quantizer`.
    """
    enough = 1 - (1 - agreement) / UNSEEN
    best: Quantized | None = None
    with Quantizer(model, images, target) as quantizer:
        wanted = labels(model, images)
        for float_layers in FLOAT_LAYERS:
            try:
                data = quantizer.quantize(float_layers)
            except QuantizeError:
                if best is None:
                    raise
                break  # a small network: so many layers are all it has; and what was made is still to be judged

            same = [(a == b).mean() for a, b in zip(wanted, labels(data, images), strict=True)]
            made = Quantized(data, float_layers, float(np.mean(same)))
            if best is None or best.agreement < min(made.agreement, agreement):
                best = made
            if made.agreement >= enough:
                return made
    assert best is not None
    return best


def labels(model: bytes, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """The graph's first output for each of `images`, by ONNX Runtime on the CPU."""
    telemetry.turn_off()
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs()[0].name, [session.get_outputs()[0].name]
    return [session.run(outputs, {inputs: image_NHWC})[0] for image_NHWC in images]


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


def _parsed(model: bytes) -> onnx.ModelProto:
    with _quantiser():
        return onnx.load_from_string(model)
