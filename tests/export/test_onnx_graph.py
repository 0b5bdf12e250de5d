"""The exported graph: what it promises, that it is the network, that it is the same twice and tells no path."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export import onnx_graph
from tests.support import tiny_project

STRIDE = tiny_project.INPUT.stride


@pytest.fixture(scope="module")
def data() -> bytes:
    return (tiny_project.exported() / "models/exported/model.onnx").read_bytes()


def test_promises(data: bytes) -> None:
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [20]
    assert [v.name for v in proto.graph.input] == ["image"]
    assert [v.name for v in proto.graph.output] == ["label", "confidence"]
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.index("Cast") < kinds.index("Transpose")  # TensorRT refuses to transpose uint8


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 64, 96), (3, 96, 64), (2, 32, 160)])
def test_graph_says_what_the_network_says(data: bytes, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    image = np.stack([tiny_project.scene(rng, shape[1], shape[2])[0] for _ in range(shape[0])])
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    label, confidence = session.run(["label", "confidence"], {"image": image})
    assert label.dtype == confidence.dtype == np.uint8
    assert label.shape == confidence.shape == shape
    with torch.inference_mode():
        logits = tiny_project.trained()(torch.from_numpy(image).permute(0, 3, 1, 2).float()).double()
    probability = torch.softmax(logits, 1).numpy()
    assert (label == probability.argmax(1)).mean() >= 0.999
    assert np.abs(confidence - 255 * probability.max(1)).max() < 0.51
    assert len(np.unique(label)) > 1


@pytest.mark.slow
def test_two_exports_are_byte_identical_and_tell_no_path(data: bytes) -> None:
    proto = onnx.load_from_string(data)
    metadata = {p.key: p.value for p in proto.metadata_props}
    again = onnx_graph.trace(tiny_project.trained(), STRIDE, metadata)
    assert again.data == data
    assert (again.opset, again.ir_version, again.nodes) == (20, proto.ir_version, len(proto.graph.node))
    for tensor in proto.graph.initializer:  # weights are arbitrary bytes: everything else must be free of paths
        tensor.ClearField("raw_data")
    rest = proto.SerializeToString()
    root = str(Path(__file__).parents[2])
    for told in (root, str(Path.home()), "site-packages", "stack_trace", ".py", "tiny_project", "Segmenter"):
        assert told.encode() not in rest, told
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)


class Pooled(torch.nn.Module):
    """Global average pooling, as DeepLab and squeeze-and-excitation have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        value = self.conv(image_BCHW)
        return value * torch.nn.functional.adaptive_avg_pool2d(value, 1)


def test_a_global_pooling_leaves_no_index_arithmetic() -> None:
    kinds = {node.op_type for node in onnx.load_from_string(onnx_graph.trace(Pooled(), STRIDE, {}).data).graph.node}
    assert "ReduceMean" in kinds
    assert not kinds & {"Gather", "Range", "Shape", "Reshape", "Unsqueeze"}


def test_another_opset_or_signature_is_refused(data: bytes) -> None:
    proto = onnx.load_from_string(data)
    next(e for e in proto.opset_import if e.domain == "").version = 19
    with pytest.raises(onnx_graph.ExportError, match="asked for opset 20, the exporter wrote 19"):
        onnx_graph.check(proto, 32)
    fixed = onnx.load_from_string(data)
    fixed.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 64
    with pytest.raises(onnx_graph.ExportError, match="must be free"):
        onnx_graph.check(fixed, 32)


def test_tensorrt_parser_takes_the_graph(data: bytes) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip(
            "tensorrt_rtx is not installed (extra `trtcheck`): its parser is the only one that runs without a card"
        )
    import tensorrt_rtx

    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    network = tensorrt_rtx.Builder(logger).create_network()
    parser = tensorrt_rtx.OnnxParser(network, logger)
    parsed = parser.parse(data)
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert {network.get_output(i).name for i in range(network.num_outputs)} == {"label", "confidence"}
