"""int8: what is quantised and what is not, that ranges come from the images given, and both runtimes' forms."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export import quantize
from tests.support import tiny_onnx, tiny_project, tiny_settings


@pytest.fixture(scope="module")
def fp32() -> bytes:
    return (tiny_project.exported() / "models/exported/model.onnx").read_bytes()


def scenes(count: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [tiny_project.scene(rng, 64, 96)[0][None] for _ in range(count)]


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def made(request: pytest.FixtureRequest, fp32: bytes) -> tuple[str, bytes]:
    return request.param, quantize.quantize(fp32, scenes(), request.param)


def test_weights_become_bytes_per_channel_and_the_last_layer_stays(fp32: bytes, made: tuple[str, bytes]) -> None:
    form, data = made
    before, after = onnx.load_from_string(fp32), onnx.load_from_string(data)
    onnx.checker.check_model(after, full_check=True)
    assert {entry.domain for entry in after.opset_import} == {""}
    assert [p.key for p in after.metadata_props] == [p.key for p in before.metadata_props]
    kinds = {t.name: t for t in after.graph.initializer}
    made_by = {out: node for node in after.graph.node for out in node.output}
    weighted = [node for node in after.graph.node if node.op_type == "Conv"]
    floats = [node for node in weighted if node.input[1] in kinds]
    assert len(floats) == 1, [node.name for node in floats]  # the classifier
    assert kinds[floats[0].input[1]].data_type == onnx.TensorProto.FLOAT
    for node in {n.name for n in weighted} - {floats[0].name}:
        conv = next(n for n in weighted if n.name == node)
        weight = made_by[conv.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert kinds[weight.input[0]].data_type == onnx.TensorProto.INT8
        assert list(kinds[weight.input[1]].dims) == [kinds[weight.input[0]].dims[0]]  # one scale per output channel
        activation = made_by[conv.input[0]]
        assert activation.op_type == "DequantizeLinear"
        zero = kinds[activation.input[2]]
        signed = zero.data_type == onnx.TensorProto.INT8
        assert signed == (form == "tensorrt")
        if signed:
            assert not onnx.numpy_helper.to_array(zero).any()  # symmetric
            for bias in conv.input[2:]:
                assert kinds[bias].data_type == onnx.TensorProto.FLOAT


def test_it_answers_much_as_before_and_is_a_quarter_of_the_size(fp32: bytes, made: tuple[str, bytes]) -> None:
    _, data = made
    assert len(data) < 0.35 * len(fp32)
    images = np.concatenate(scenes(8))
    answers = [
        onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]).run(["label"], {"image": images})[0]
        for m in (fp32, data)
    ]
    assert 0.95 < (answers[0] == answers[1]).mean() <= 1
    odd = images[:1, :32, :32]  # the free axes stayed free
    assert onnxruntime.InferenceSession(data).run(["label"], {"image": odd})[0].shape == (1, 32, 32)


def test_ranges_come_from_the_images(fp32: bytes) -> None:
    dark = [np.zeros((1, 64, 96, 3), np.uint8)]
    assert quantize.quantize(fp32, dark, "cpu") != quantize.quantize(fp32, scenes(), "cpu")
    assert quantize.quantize(fp32, scenes(2), "cpu") == quantize.quantize(fp32, scenes(2), "cpu")


def test_what_cannot_be_quantised_is_said(fp32: bytes) -> None:
    with pytest.raises(quantize.QuantizeError, match="no training image"):
        quantize.quantize(fp32, [], "cpu")
    with pytest.raises(quantize.QuantizeError, match="nothing to quantise before its last"):
        quantize.quantize(tiny_onnx.model(), scenes(1), "cpu")
    with pytest.raises(quantize.QuantizeError, match="the quantiser refuses this graph"):
        quantize.quantize(b"no graph", scenes(1), "cpu")


def test_float_nodes_of_a_chain() -> None:
    from onnx import TensorProto, helper

    def node(kind: str, name: str, takes: list[str], gives: str) -> onnx.NodeProto:
        return helper.make_node(kind, takes, [gives], name=name)

    graph = helper.make_graph(
        [
            node("Sub", "scale", ["x", "m"], "a"), node("Conv", "first", ["a", "w"], "b"), node("Relu", "relu", ["b"], "c"),
            node("Conv", "last", ["c", "w"], "d"), node("Softmax", "soft", ["d"], "e"), node("Shape", "shape", ["x"], "s"),
        ],
        "chain",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "m", "w")],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )  # fmt: skip
    assert quantize.float_nodes(graph) == ["last", "scale", "shape", "soft"]
    assert quantize.float_nodes(graph, float_layers=1) == ["first", "last", "scale", "shape", "soft"]


def chain(layers: int = 10) -> bytes:
    """A small graph: image uint8 NHWC -> `layers` convolutions of 4 channels -> label."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["x0"], "turn", perm=[0, 3, 1, 2]),
    ]
    given = []
    for i in range(layers):
        shape = (4, 3 if i == 0 else 4, 3, 3)
        given.append(numpy_helper.from_array(rng.normal(0, 0.4, shape).astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"], f"relu{i}"))
    nodes.append(helper.make_node("ArgMax", [f"c{layers - 1}"], ["best"], "best", axis=1, keepdims=0))
    nodes.append(helper.make_node("Cast", ["best"], ["label"], "label", to=TensorProto.UINT8))
    sides = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", "h", "w", 3])]
    outs = [helper.make_tensor_value_info("label", TensorProto.UINT8, ["n", "h", "w"])]
    graph = helper.make_graph(nodes[:-3] + nodes[-2:], "chain", sides, outs, given)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def weights(model: bytes) -> list[np.ndarray]:
    """The 8-bit weights."""
    graph = onnx.load_from_string(model).graph
    found = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    return [w.astype(int) for w in found if w.ndim == 4]


def test_weights_for_the_cpu_cannot_overflow_sums_of_two_products() -> None:
    assert max(np.abs(w).max() for w in weights(quantize.quantize(chain(), scenes(2), "cpu"))) == 64
    assert max(np.abs(w).max() for w in weights(quantize.quantize(chain(), scenes(2), "tensorrt"))) == 127


@pytest.mark.parametrize(
    ("agrees", "first"),
    [
        ((0.9, 0.994, 1.0), 4),
        ((0.994, 0.0, 0.0), 0),
        ((0.993, 0.994, 0.0), 4),
        ((0.9, 0.8, 0.95), 8),
        ((0.9, 0.991, 0.992), 4),
    ],
)
def test_as_few_layers_stay_in_float_as_the_labels_need(
    monkeypatch: pytest.MonkeyPatch, agrees: tuple[float, ...], first: int
) -> None:
    plain, asked = np.zeros((1, 10, 100), np.uint8), list[int]()

    def labels(model: bytes, batches: object) -> list[np.ndarray]:
        asked.append(len(weights(model)))
        wrong = 0 if len(asked) == 1 else round(1000 * (1 - agrees[len(asked) - 2]))
        return [np.where(np.arange(1000).reshape(1, 10, 100) < wrong, 1, plain)]

    monkeypatch.setattr(quantize, "labels", labels)
    made = quantize.quantize_to_agreement(chain(), scenes(1), "cpu", 0.99)
    assert (made.float_layers, len(weights(made.model))) == (first, 9 - first)  # the last one is never quantised
    assert made.agreement == pytest.approx(agrees[first // 4])
    assert asked == [0, 9, 5, 1][: len(asked)]


def test_the_graph_is_prepared_once_for_all_numbers_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    real, runs, images, graph = quantize.prepare, list[bytes](), scenes(2), chain()

    def watch(model: bytes) -> bytes:
        runs.append(model)
        return real(model)

    monkeypatch.setattr(quantize, "prepare", watch)
    monkeypatch.setattr(quantize, "FLOAT_LAYERS", (0, 2, 4))
    made = quantize.quantize_to_agreement(graph, images, "cpu", 1.01)  # out of reach: every number is tried
    assert len(runs) == 1
    assert made.model == quantize.quantize(graph, images, "cpu", float_layers=made.float_layers)
    assert len(runs) == 2


def test_agreement_is_that_of_the_two_graphs_labels() -> None:
    images, graph = scenes(3), chain()
    made = quantize.quantize_to_agreement(graph, images, "cpu", 0.0)
    assert made.model == quantize.quantize(graph, images, "cpu")
    answers = [
        onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]).run(
            ["label"], {"image": np.concatenate(images)}
        )
        for m in (graph, made.model)
    ]
    assert made.agreement == pytest.approx((answers[0][0] == answers[1][0]).mean())
    assert 0.5 < made.agreement < 1


def test_export_calibrates_on_training_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export import variants
    from pipeline import config
    from pipeline.storage import manifest
    from training import inference

    monkeypatch.chdir(tiny_project.exported())
    read: list[str] = []
    real = inference.read

    def watch(row: manifest.Row, *args: object, **options: object) -> inference.Sample:
        read.append(row.split)
        return real(row, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(inference, "read", watch)
    params = config.load()
    params = params.model_copy(update={"export": tiny_settings.export(calibration_images=5)})
    images = variants.calibration_images(params, tiny_project.INPUT)
    assert len(images) == len(read) == 5
    assert set(read) == {"labelled", "unlabelled"}
    assert {image.shape for image in images} <= {(1, 64, 96, 3), (1, 96, 96, 3), (1, 64, 128, 3), (1, 96, 128, 3)}
