"""Whatever is wrong with a candidate, it is refused with a reason and the old model serves on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from export.bundle.bundle import Bundle, open_bundle
from export.runtime.runtime import Runtime
from serving.model import checks
from serving.telemetry import metrics
from tests.support import admin_client, live_server, tiny_onnx
from tests.support.image_files import save
from tests.support.live_server import Server, error, until

PICTURE = save(Image.fromarray(np.random.default_rng(4).integers(0, 256, (60, 80, 3), dtype=np.uint8)))
RAW = {"Content-Type": "application/octet-stream"}
RENAMED = [{**item, "name": item["name"].replace("blue", "sky")} for item in tiny_onnx.CLASSES]


def softmax(bias: float) -> bytes:
    """As the export ends a network: softmax, its highest share as uint8. A bias of NaN makes every score NaN."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["pixels", "weight"], ["linear"]),
        helper.make_node("Add", ["linear", "bias"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=3),
        helper.make_node("ArgMax", ["shares"], ["index"], axis=3, keepdims=0),
        helper.make_node("Cast", ["index"], ["label"], to=TensorProto.UINT8),
        helper.make_node("ReduceMax", ["shares", "axes"], ["highest"], keepdims=0),
        helper.make_node("Mul", ["highest", "byte"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["rounded"]),
        helper.make_node("Cast", ["rounded"], ["confidence"], to=TensorProto.UINT8),
    ]
    constants = {
        "weight": np.eye(3, 4, dtype=np.float32) / 50,
        "bias": np.array([0, 0, bias, 1], np.float32),
        "axes": np.array([3], np.int64),
        "byte": np.array(255, np.float32),
    }
    return _finish(nodes, constants)


def slow() -> bytes:
    """The tiny model, with some hundred million multiplications on the way to its confidence that change nothing."""
    proto = onnx.load_from_string(tiny_onnx.model(60.0))
    nodes = [node for node in proto.graph.node if "confidence" not in node.output]
    nodes += [
        helper.make_node("MatMul", ["pixels", "wide"], ["much"]),
        helper.make_node("ReduceMax", ["much", "axes"], ["nothing"], keepdims=0),
        helper.make_node("Max", ["brightest", "nothing"], ["same"]),
        helper.make_node("Cast", ["same"], ["confidence"], to=TensorProto.UINT8),
    ]
    constants = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    return _finish(nodes, constants | {"wide": np.zeros((3, 16384), np.float32)})


def _finish(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> bytes:
    free = ["N", "H", "W"]
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, [*free, 3])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.UINT8, free) for name in ("label", "confidence")]
    graph = helper.make_graph(
        nodes, "made", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    opset = [helper.make_opsetid("", tiny_onnx.OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=tiny_onnx.IR).SerializeToString()


def corrupt(folder: Path) -> None:
    made = tiny_onnx.write(folder, model_bytes=tiny_onnx.model(61.0))
    (made.folder / "model.onnx").write_bytes(b"damaged")


def cut(folder: Path) -> None:
    """Whole by its checksums, but no ONNX Runtime will load it."""
    proto = onnx.load_from_string(tiny_onnx.model(62.0))
    del proto.graph.node[3:]
    tiny_onnx.write(folder, model_bytes=proto.SerializeToString())


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "other-classes": (lambda folder: tiny_onnx.write(folder, classes=RENAMED), "classes", "3 'blue' -> 'sky'"),
    "fewer-classes": (
        lambda folder: tiny_onnx.write(folder, classes=tiny_onnx.CLASSES[:3]), "bundle", "no class of bundle.json"
    ),
    "unknown-ids": (
        lambda folder: tiny_onnx.write(folder, model_bytes=tiny_onnx.model(shift=9)), "bundle", "no class of bundle.json"
    ),
    "nan": (lambda folder: tiny_onnx.write(folder, model_bytes=softmax(np.nan)), "output", "NaN or infinite"),
    "infinite": (lambda folder: tiny_onnx.write(folder, model_bytes=softmax(np.inf)), "output", "NaN or infinite"),
    "slow": (lambda folder: tiny_onnx.write(folder, model_bytes=slow()), "slow", "MARGINALIA_MAX_SLOWDOWN"),
    "corrupt": (corrupt, "bundle", "does not match its line in SHA256SUMS"),
    "cut": (cut, "bundle", "export it again"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Server:
    return live_server.kept()


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with admin_client.client(server) as client:
        yield client


@pytest.fixture(scope="module")
def good(server: Server) -> Bundle:
    """The first champion, served again at the beginning."""
    made = open_bundle(server.folder / "champions" / "first" / "bundle")
    with admin_client.client(server) as client:
        assert admin_client.load(client, admin_client.below(server, made.folder)).status_code == 200
    return made


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_candidate_is_refused_and_the_old_model_serves_on(
    server: Server, http: httpx.Client, good: Bundle, kind: str
) -> None:
    make, cause, said = BAD[kind]
    folder = server.folder / "bad" / kind
    make(folder)
    before = http.get("/v1/models").json()
    answer = http.post("/v1/segment", content=PICTURE, headers=RAW)
    refused = {
        "marginalia_swaps_total": {"result": "refused"},
        "marginalia_candidates_refused_total": {"cause": cause},
    }
    counts = {name: admin_client.metric(http, name, **labels) for name, labels in refused.items()}
    loaded = admin_client.metric(http, "marginalia_swaps_total", result="loaded")

    response = admin_client.load(http, admin_client.below(server, folder))

    assert (response.status_code, error(response)) == (422, "bundle-refused")
    assert said in response.json()["error"]["message"]
    assert str(server.folder) not in response.text
    after = http.get("/v1/models").json()
    assert [after[slot] for slot in ("current", "previous", "candidate")] == [
        before["current"],
        before["previous"],
        None,
    ]
    event = after["events"][-1]
    assert (event["event"], event["cause"], event["source"]) == ("bundle-refused", cause, "load")
    assert said in event["error"]
    assert event["still_serving"] == good.manifest.id
    assert server.events("bundle-refused")[-1]["cause"] == cause
    for name, labels in refused.items():
        assert admin_client.metric(http, name, **labels) == counts[name] + 1
    assert admin_client.metric(http, "marginalia_swaps_total", result="loaded") == loaded
    again = http.post("/v1/segment", content=PICTURE, headers=RAW)
    assert again.headers["x-bundle-id"] == good.manifest.id
    assert again.content == answer.content


def test_by_the_pointer_it_is_the_same(server: Server, http: httpx.Client, good: Bundle) -> None:
    champions = server.folder / "champions"
    for kind in ("nan", "slow", "other-classes"):
        folder = server.folder / "bad" / f"pointed-{kind}"
        BAD[kind][0](folder)
        live_server.point(champions, folder)
        event = until(lambda folder=folder: next((e for e in _events(http) if folder.name in e.get("path", "")), None))
        assert (event["cause"], event["source"]) == (BAD[kind][1], "pointer")
        assert http.get("/v1/model").json()["bundle"] == good.manifest.id
    live_server.point(champions, good.folder)
    until(lambda: _events(http)[-1]["event"] == "bundle-same")


def _events(http: httpx.Client) -> list[dict[str, str]]:
    return http.get("/v1/models").json()["events"]  # type: ignore[no-any-return]


def test_a_finite_softmax_and_a_named_change_of_classes_are_taken(
    server: Server, http: httpx.Client, good: Bundle
) -> None:
    """The same makers without the fault: the checks refuse what is wrong and nothing else."""
    folder = server.folder / "bad" / "finite"
    made = tiny_onnx.write(folder, model_bytes=softmax(0.5))
    assert admin_client.load(http, admin_client.below(server, folder)).json()["current"]["bundle"] == made.manifest.id
    renamed = tiny_onnx.write(server.folder / "bad" / "renamed", classes=RENAMED)
    response = admin_client.load(http, admin_client.below(server, renamed.folder), allow_class_change=True)
    assert response.json()["current"]["classes"] == ["dark", "red", "green", "sky"]
    response = admin_client.load(http, admin_client.below(server, good.folder), allow_class_change=True)
    assert response.json()["current"]["bundle"] == good.manifest.id


def test_speed_is_compared_round_by_round_with_the_best_of_each() -> None:
    """A clock that the test moves: the times of old and new in turns, as the trial asks for them."""

    class Timed:
        def __init__(self, *times: float) -> None:
            self.times = list(times)

        def segment(self, image_HWC: np.ndarray) -> None:
            now[0] += self.times.pop(0)

    now = [0.0]

    def look(old: Timed, new: Timed, factor: float) -> int:
        """Rounds that were left."""
        checks.check_speed(new, old, np.zeros((1, 1, 3), np.uint8), factor, clock=lambda: now[0])  # type: ignore[arg-type]
        return len(new.times)

    assert look(Timed(0.1, 0.1), Timed(0.2, 9), 2.01) == 1
    assert look(Timed(0.1, 0.1, 0.1), Timed(0.5, 0.5, 0.2), 2.01) == 0  # a busy moment is no slow model
    assert look(Timed(0.0001), Timed(0.004), 1.0) == 0  # too fast to be called slow
    with pytest.raises(checks.CandidateRefused, match=r"500\.0 ms .* 5\.0 times .* \(now 2\)") as caught:
        look(Timed(0.3, 0.1, 0.3, 0.3, 0.3), Timed(0.6, 0.6, 0.5, 0.6, 0.6), 2.0)
    assert caught.value.cause in metrics.CAUSES


def test_the_probe_is_no_candidate_s_bad_luck(tmp_path: Path) -> None:
    image_HWC = checks.test_image(64)
    assert (image_HWC.shape, image_HWC.dtype) == ((48, 64, 3), np.uint8)
    assert image_HWC.min() > 0
    assert np.array_equal(image_HWC, checks.test_image(64))
    checks.check_answers(
        Runtime(tiny_onnx.write(tmp_path / "b"), provider="cpu", threads=1), None, allow_class_change=False
    )
    assert checks.test_image(1).shape == (1, 1, 3)


def test_no_error_was_internal(server: Server) -> None:
    assert server.events("internal-error") == []
    assert "Traceback" not in server.log()
