"""Profiles, refusals without a card, CUDA errors by name, and what TensorRT's own parser and builder say of our graphs.

`tensorrt_rtx` parses and builds without a card; nothing executes there. Where a card and TensorRT are present, the last
test runs engines for real.
"""

import ctypes
import functools
import json
import subprocess
import sys
import threading
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
from export.tensorrt import builder, check, cudart
from export.tensorrt import session as engines
from export.tensorrt.builder import EngineError, Profile
from pipeline.imaging import resize
from tests.support import tiny_onnx
from tests.support.command_line import marginalia
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


@pytest.mark.parametrize(
    ("long_side", "stride", "opt", "largest"),
    [(1024, 32, (768, 1024), 1024), (100, 32, (96, 128), 128), (8, 32, (32, 32), 32), (96, 32, (96, 96), 96)],
)
def test_profile_holds_all_that_the_policy_makes(
    long_side: int, stride: int, opt: tuple[int, int], largest: int
) -> None:
    profile = Profile.of(long_side=long_side, stride=stride, max_batch=4)
    assert profile.min_NHW == (1, stride, stride)
    assert profile.opt_NHW == (1, *opt)
    assert profile.max_NHW == (4, largest, largest)
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (1, 5000), (5000, 1), *rng.integers(1, 3000, (200, 2)).tolist()]:
        plan = resize.plan(height, width, long_side=long_side, stride=stride)
        for batch in (1, 4):
            profile.check((batch, plan.padded_height, plan.padded_width))


def test_profile_names_the_bound() -> None:
    profile = Profile.of(long_side=64, stride=16, max_batch=4)
    for shape, said in {
        (5, 64, 64): "batch 5 is above the engine's largest, 4",
        (0, 64, 64): "batch 0 is below the engine's smallest, 1",
        (1, 80, 64): "height 80 is above the engine's largest, 64",
        (1, 64, 0): "width 0 is below the engine's smallest, 16",
        (1, 64, 40): "width 40 is not a multiple of 16",
    }.items():
        with pytest.raises(ValueError, match=said):
            profile.check(shape)
    with pytest.raises(ValueError, match="must rise"):
        Profile.of(long_side=64, stride=16, max_batch=1, opt_batch=2)
    with pytest.raises(ValueError, match="multiples of 16"):
        Profile(16, (1, 16, 16), (1, 30, 32), (1, 64, 64))


def test_without_a_card_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builder, "DRIVER", "libcuda-of-no-card.so.1")
    with pytest.raises(EngineError, match=r"no card to build an engine for .*libcuda-of-no-card"):
        engines.EngineSession(tiny_onnx.model(), precision="fp32", profile=SMALL, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_a_module_each_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installed package whose libraries are missing fails like this; the next one is tried."""
    broken = tmp_path / "tensorrt_of_tests"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(builder, "MODULES", ("tensorrt_of_tests", "no_such_module"))
    with pytest.raises(EngineError, match=r"libnvinfer\.so\.11.*No module named 'no_such_module'.*extra `gpu`"):
        builder.load()
    monkeypatch.setattr(builder, "MODULES", ("tensorrt_of_tests", "json"))
    assert builder.load() is json


def test_missing_cuda_library_is_told_with_every_place(tmp_path: Path) -> None:
    (tmp_path / "libcudart.so.13").write_bytes(b"no library")
    with pytest.raises(cudart.CudaError, match=r"libcudart\.so\.13: .*; libno\.so: .*install the extra `gpu`"):
        cudart.open_library([str(tmp_path / "libcudart.so.13"), "libno.so"])
    with pytest.raises(cudart.CudaError, match="cudaMalloc"):  # loads, but is something else
        cudart.open_library(["libc.so.6"])


def test_pip_folder_is_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("cu13/lib", "cuda_runtime/lib"):
        (tmp_path / "nvidia" / folder).mkdir(parents=True)
        (tmp_path / "nvidia" / folder / "libcudart.so.13").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    places = cudart.places()
    assert places[:2] == ["libcudart.so.13", "libcudart.so.12"]
    assert {str(tmp_path / "nvidia" / f / "libcudart.so.13") for f in ("cu13/lib", "cuda_runtime/lib")} < set(places)


def test_command_without_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_onnx.write(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    nothing = builder.Found((), {}, {"CUDA driver libcuda.so.1": "not found: [no such file]"})
    monkeypatch.setattr(builder, "look", lambda: nothing)
    assert marginalia("engines", str(made.folder)) == 1
    said = capsys.readouterr().err
    assert "CUDA driver libcuda.so.1: not found: [no such file]" in said
    assert "no card present" in said
    assert marginalia("engines", str(made.folder), "--precision", "fp16") == 1
    assert "model.fp16.onnx: not in this bundle; it has fp32, tf32" in capsys.readouterr().err
    assert marginalia("engines", str(tmp_path / "none")) == 1
    assert "no bundle folder here" in capsys.readouterr().err
    assert marginalia("engines", str(made.folder), "--max-batch", "0") == 1
    assert not (tmp_path / "reports").exists()


def test_engines_import_neither_torch_nor_tensorrt() -> None:
    heavy = "{'torch', 'tensorrt', 'tensorrt_rtx', 'onnx'}"
    program = f"import sys, export.tensorrt.session\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class StandIn:
    """CUDA's calls on host memory, and an engine that answers `tiny_onnx.expected`.

    For the session's own book-keeping: which buffer goes where, what is given back, what happens when a capture fails.
    It says nothing about a card.
    """

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.recording: list[Any] | None = None
        self.launches = self.plain = self.last_error = 0
        self.fail: dict[str, int] = {}
        self.device_memory_size_v2 = 1024

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def answer(*arguments: Any) -> int:
            if code := self.fail.get(name):
                self.last_error = code
                return code
            return getattr(self, f"_{name}", lambda *_: 0)(*arguments) or 0

        return answer

    def cudaGetErrorString(self, code: int) -> bytes:
        return {2: b"out of memory", 900: b"operation not permitted when stream is capturing"}[code]

    def _cudaGetLastError(self) -> None:
        self.last_error = 0

    def _new(self, pointer: Any, thing: Any) -> None:
        pointer._obj.value = ctypes.addressof(thing)
        self.held[ctypes.addressof(thing)] = thing

    def _drop(self, handle: int) -> None:
        del self.held[handle]

    def _cudaMalloc(self, pointer: Any, size: int, *_: Any) -> None:
        self._new(pointer, ctypes.create_string_buffer(size))

    _cudaHostAlloc = _cudaMalloc
    _cudaFree = _cudaFreeHost = _cudaStreamDestroy = _cudaGraphDestroy = _cudaGraphExecDestroy = _drop

    def _cudaStreamCreateWithFlags(self, pointer: Any, flags: int) -> None:
        self._new(pointer, ctypes.c_long())

    def do(self, work: Any) -> None:
        work() if self.recording is None else self.recording.append(work)

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        self.do(lambda: ctypes.memmove(target, source, size))

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> None:
        self.recording = []

    def _cudaStreamEndCapture(self, stream: int, pointer: Any) -> None:
        self._new(pointer, ctypes.c_long())
        self.captured, self.recording = self.recording, None

    def _cudaGraphInstantiateWithFlags(self, pointer: Any, graph: Any, flags: int) -> None:
        ready = ctypes.c_long()
        self._new(pointer, ready)
        self.held[ctypes.addressof(ready)] = (ready, self.captured)

    def _cudaGraphLaunch(self, handle: int, stream: int) -> None:
        self.launches += 1
        for work in self.held[handle][1]:
            work()

    # The engine and its contexts, as TensorRT names them.
    def deserialize_cuda_engine(self, payload: bytes) -> Any:
        return self if payload == b"engine" else None

    def create_execution_context(self, strategy: Any) -> Any:
        context = types.SimpleNamespace(at={}, shape=None, set_device_memory=lambda handle, size: None)
        context.set_input_shape = lambda name, shape: context.__setattr__("shape", shape) or True
        context.set_tensor_address = lambda name, handle: context.at.__setitem__(name, handle) or True

        def view(name: str, shape: tuple[int, ...]) -> np.ndarray:
            return np.ctypeslib.as_array(ctypes.cast(context.at[name], ctypes.POINTER(ctypes.c_uint8)), shape)

        def work() -> None:
            label, confidence = tiny_onnx.expected(view("image", context.shape))
            view("label", context.shape[:3])[:], view("confidence", context.shape[:3])[:] = label, confidence

        def execute_async_v3(stream: int) -> bool:
            self.plain += self.recording is None
            self.do(work)
            return True

        context.execute_async_v3 = execute_async_v3
        return context


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    card = StandIn()
    monkeypatch.setattr(cudart, "library", lambda: card)
    monkeypatch.setattr(builder, "card", lambda: builder.Card("no card", "0.0", "none"))
    monkeypatch.setattr(builder, "build", lambda *_, **__: builder.Built(b"engine", b""))
    return card


def session_on(card: StandIn, folder: Path) -> engines.EngineSession:
    class Logger:
        pass

    module = types.SimpleNamespace(
        __name__="tensorrt", __version__="0", ILogger=Logger, Runtime=lambda log: card,
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED=2),
    )  # fmt: skip
    profile = Profile.of(long_side=64, stride=16)
    return engines.EngineSession(b"onnx", precision="fp32", profile=profile, cache=folder, module=module)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_session_keeps_its_books(stand_in: StandIn, tmp_path: Path) -> None:
    session = session_on(stand_in, tmp_path)
    shapes = [(n, h, w) for n in (1, 2, 3) for h in (16, 32, 64) for w in (16, 48)]
    assert len(shapes) > engines.SHAPES
    kept: list[tuple[np.ndarray, Any]] = []
    for seed in range(4):
        for shape in (*shapes, shapes[-1], shapes[-1]):
            images = noise(*shape, seed=seed)
            kept.append((images, session.run(images)))
    for images, answer in kept:  # answers are copies: later runs did not change them
        np.testing.assert_array_equal(np.stack(answer), np.stack(tiny_onnx.expected(images)))
    assert stand_in.launches >= 8
    assert 1 <= session.captured <= len(session._slots) == engines.SHAPES
    with pytest.raises(ValueError, match="height 80 is above"):
        session.run(noise(1, 80, 64))
    with pytest.raises(ValueError, match="expected uint8"):
        session.run(noise(1, 64, 64).astype(np.float32))
    plain = stand_in.plain
    session.graphs = False
    session.run(noise(*shapes[-1]))
    assert stand_in.plain == plain + 1
    session.close()
    session.close()
    assert not stand_in.held  # everything was given back
    with pytest.raises(EngineError, match="closed"):
        session.run(noise(1, 64, 64))


def test_session_goes_on_plainly_when_a_capture_fails(stand_in: StandIn, tmp_path: Path) -> None:
    session, images = session_on(stand_in, tmp_path), noise(1, 64, 64)
    for function in ("cudaGraphInstantiateWithFlags", "cudaMemcpyAsync"):
        for seed in range(3):
            images = noise(1, 64, 48 if function == "cudaMemcpyAsync" else 64, seed=seed)
            if seed == 1:
                begin = stand_in._cudaStreamBeginCapture

                def begin_and_fail(*arguments: Any, begin: Any = begin, function: str = function) -> None:
                    begin(*arguments)
                    stand_in.fail[function] = 900

                def end_and_heal(*arguments: Any) -> None:
                    StandIn._cudaStreamEndCapture(stand_in, *arguments)
                    stand_in.fail.pop("cudaMemcpyAsync", None)

                stand_in._cudaStreamBeginCapture, stand_in._cudaStreamEndCapture = begin_and_fail, end_and_heal
            np.testing.assert_array_equal(session.run(images)[0], tiny_onnx.expected(images)[0])
        stand_in.fail.clear()
        del stand_in._cudaStreamBeginCapture, stand_in._cudaStreamEndCapture
    assert session.captured == stand_in.launches == 0
    session.close()
    assert not stand_in.held


def test_session_from_several_threads(stand_in: StandIn, tmp_path: Path) -> None:
    session, wrong = session_on(stand_in, tmp_path), []

    def work(seed: int) -> None:
        for i in range(30):
            images = noise(1 + i % 2, 32, 16 * (1 + (seed + i) % 4), seed=seed)
            if not np.array_equal(session.run(images)[0], tiny_onnx.expected(images)[0]):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_cuda_errors_name_the_function(stand_in: StandIn, tmp_path: Path) -> None:
    session = session_on(stand_in, tmp_path)
    held = set(stand_in.held)
    stand_in.fail["cudaMalloc"] = 2
    with pytest.raises(cudart.CudaError, match=r"cudaMalloc: out of memory \(CUDA error 2\)"):
        session.run(noise(1, 16, 16))
    assert stand_in.last_error == 0  # CUDA keeps it per thread, and TensorRT would take it for its own
    assert set(stand_in.held) == held  # the host buffers of the half-made slot too
    stand_in.fail.clear()
    session.run(noise(1, 16, 16))
    session.close()
    stand_in.fail["cudaMalloc"] = 2
    with pytest.raises(EngineError, match=r"model\.onnx: built, but cannot be run: cudaMalloc: out of memory"):
        session_on(stand_in, tmp_path)


def test_real_cuda_runtime_answers_by_name() -> None:
    """NVIDIA's own library where it is installed: with a card it works, without one it says why."""
    try:
        cudart.library()
    except cudart.CudaError as error:
        pytest.skip(f"no CUDA runtime: {error}")
    assert cudart.version().split(".")[0] in ("12", "13")
    if not builder.look().cards:
        with pytest.raises(cudart.CudaError, match=r"^cudaStreamCreateWithFlags: .+ \(CUDA error \d+\)$"):
            cudart.Stream()
        return
    stream = cudart.Stream()
    there, here, back = cudart.DeviceMemory(1000), cudart.PinnedArray((1000,)), cudart.PinnedArray((1000,))

    def both_ways() -> None:
        stream.to_device(there, here)
        stream.to_host(back, there)

    graph = stream.capture(both_ways)
    for value in (7, 9):
        here.array[:] = value
        graph.launch(stream)
        stream.synchronize()
        assert (back.array == value).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine_on_a_card(tmp_path: Path, precision: str) -> None:
    found = builder.look()
    if not found.usable:
        pytest.skip(found.as_dict()["says"])
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
