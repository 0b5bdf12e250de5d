"""What TensorRT's own parser and builder say of our graphs, and which they refuse.

`tensorrt_rtx` parses and builds without a card; nothing executes there. Where a card and TensorRT are present, the last
test runs engines for real.
"""

import functools
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import quantization
from torch import nn

from export import onnx_graph
from export.tensorrt import builder, check, installation
from export.tensorrt import session as engines
from export.tensorrt.installation import EngineError
from export.tensorrt.profile import Profile
from tests.support import tiny_onnx
from tests.support.training.tiny_network import Featured

STRIDE = 4
SMALL = Profile.of(long_side=32, stride=STRIDE, max_batch=2)


class Half(nn.Module):
    """The network in float16 behind the same interface."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self.model(image_BCHW.half()).float()


class Noise(quantization.CalibrationDataReader):
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.left = [{"image": rng.integers(0, 256, (2, 16, 20, 3), dtype=np.uint8)} for _ in range(3)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


@functools.cache
def traced(half: bool) -> bytes:
    torch.manual_seed(0)
    model = Featured().eval()
    return onnx_graph.trace(Half(model) if half else model, STRIDE, {}).data


def graph(precision: str, folder: Path) -> bytes:
    """The exported graph of a small network. Of int8 there are forms that do not suit TensorRT: "int8-cpu" (unsigned,
    with quantised biases) cannot be parsed, "int8-all" (scalars quantised too) cannot be built.
    """
    data = traced(precision == "fp16")
    if not precision.startswith("int8"):
        return data
    plain, quantized = folder / "plain.onnx", folder / "quantized.onnx"
    plain.write_bytes(data)
    signed: dict[str, Any] = {
        "activation_type": quantization.QuantType.QInt8,
        "weight_type": quantization.QuantType.QInt8,
        "per_channel": True,
        "extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    }
    forms = {"int8-cpu": {}, "int8-all": signed, "int8": signed | {"op_types_to_quantize": ["Conv", "MatMul"]}}
    quantization.quantize_static(plain, quantized, Noise(), **forms[precision])
    return quantized.read_bytes()


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx is not installed (extra `trtcheck`): only its builder runs without a card"
    )


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "int8"])
def test_tensorrt_parses_and_builds(rtx: Any, tmp_path: Path, precision: str) -> None:
    """NVIDIA's parser and builder, and what they were asked for: types come from the graph, TF32 only by name."""
    asked: list[Any] = []

    class Spy(rtx.Builder):
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            asked.append((network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED), config.flags))
            asked.append(config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE))
            return super().build_serialized_network(network, config)

    model = graph(precision, tmp_path)
    types_in_graph = {tensor.data_type for tensor in onnx.load_from_string(model).graph.initializer}
    special = {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}.get(precision)
    assert special is None or special in types_in_graph
    module = types.SimpleNamespace(**(vars(rtx) | {"Builder": Spy}))
    built = builder.build(module, model, precision=precision, profile=SMALL)
    assert len(built.engine) > 10_000
    tf32 = 1 << int(rtx.BuilderFlag.TF32)
    assert asked == [(True, tf32 if precision == "tf32" else 0), builder.SCRATCH]
    print(f"{rtx.__name__} {rtx.__version__}: {precision} engine of {len(built.engine)} bytes")


def test_parser_errors_name_file_and_node(rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"bundle/model\.onnx: TensorRT cannot read the graph: node '.+' \(.+\): .+"):
        builder.build(rtx, graph("int8-cpu", tmp_path), precision="int8", profile=SMALL, name="bundle/model.onnx")
    with pytest.raises(EngineError, match=r"x\.onnx: TensorRT cannot read the graph"):
        builder.build(rtx, b"no graph", precision="fp32", profile=SMALL, name="x.onnx")


def test_builder_errors_name_the_file(rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"x\.onnx: no engine can be built: .*Quantized constant \("):
        builder.build(rtx, graph("int8-all", tmp_path), precision="int8", profile=SMALL, name="x.onnx")
    model = tiny_onnx.model().replace(b"image", b"imago")
    with pytest.raises(EngineError, match=r"x\.onnx: has inputs \['imago'\], not only 'image'"):
        builder.build(rtx, model, precision="fp32", profile=SMALL, name="x.onnx")


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(EngineError, match="unknown precision 'fp8'; choose one of fp32, tf32, fp16, int8"):
        builder.build(None, b"", precision="fp8", profile=SMALL)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine_on_a_card(tmp_path: Path, precision: str) -> None:
    found = installation.look()
    if not found.usable:
        pytest.skip(found.says)
    import onnxruntime

    model = graph(precision, tmp_path)
    reference = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for cached in (False, True):
        session = engines.EngineSession(model, precision=precision, profile=SMALL, cache=tmp_path / "cache")
        assert session.cached == cached
        for shape in [(1, 32, 32), (2, 4, 32), (1, 24, 32)] * 3:
            images = noise(*shape)
            label, _ = session.run(images)
            agreement = (label == reference.run(["label"], {"image": images})[0]).mean()
            assert agreement >= check.FLOORS[precision]
        assert session.captured == 3
        session.close()
