"""export.tensorrt.session: its own book-keeping, on a stand-in for the card: buffers, graphs, threads, errors."""

import ctypes
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.tensorrt import builder, cudart, installation
from export.tensorrt import session as engines
from export.tensorrt.installation import EngineError
from export.tensorrt.profile import Profile
from tests.support import tiny_onnx

SMALL = Profile.of(long_side=32, stride=4, max_batch=2)


def test_without_a_card_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installation, "DRIVER", "libcuda-of-no-card.so.1")
    with pytest.raises(EngineError, match=r"no card to build an engine for .*libcuda-of-no-card"):
        engines.EngineSession(tiny_onnx.model(), precision="fp32", profile=SMALL, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_engines_import_neither_torch_nor_tensorrt() -> None:
    heavy = "{'torch', 'tensorrt', 'tensorrt_rtx', 'onnx'}"
    program = f"import sys, export.tensorrt.session\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class StandIn:
    """CUDA's calls, as `cuda.bindings.runtime` has them, on host memory, and an engine that answers `tiny_onnx.expected`.

    For the session's own book-keeping: which buffer goes where, what is given back, what happens when a capture fails.
    It says nothing about a card.
    """

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.recording: list[Any] | None = None
        self.launches = self.plain = self.last_error = 0
        self.fail: dict[str, int] = {}
        self.device_memory_size_v2 = 1024
        self.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def answer(*arguments: Any) -> tuple[Any, ...]:
            if code := self.fail.get(name):
                self.last_error = code
                return (code, None)
            value = getattr(self, f"_{name}", lambda *_: None)(*arguments)
            return (0,) if value is None else (0, value)

        return answer

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory", 900: b"operation not permitted when stream is capturing"}[code]

    def _cudaGetLastError(self) -> None:
        self.last_error = 0

    def _new(self, thing: Any) -> int:
        self.held[ctypes.addressof(thing)] = thing
        return ctypes.addressof(thing)

    def _drop(self, handle: int) -> None:
        del self.held[handle]

    def _cudaMalloc(self, size: int, *_: Any) -> int:
        return self._new(ctypes.create_string_buffer(size))

    _cudaHostAlloc = _cudaMalloc
    _cudaFree = _cudaFreeHost = _cudaStreamDestroy = _cudaGraphDestroy = _cudaGraphExecDestroy = _drop

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        return self._new(ctypes.c_long())

    def do(self, work: Any) -> None:
        work() if self.recording is None else self.recording.append(work)

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        self.do(lambda: ctypes.memmove(target, source, size))

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> None:
        self.recording = []

    def _cudaStreamEndCapture(self, stream: int) -> int:
        self.captured, self.recording = self.recording, None
        return self._new(ctypes.c_long())

    def _cudaGraphInstantiateWithFlags(self, graph: int, flags: int) -> int:
        ready = ctypes.c_long()
        self.held[ctypes.addressof(ready)] = (ready, self.captured)
        return ctypes.addressof(ready)

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
    monkeypatch.setattr(installation, "card", lambda: installation.Card("no card", "0.0", "none"))
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

                def end_and_heal(*arguments: Any) -> int:
                    stand_in.fail.pop("cudaMemcpyAsync", None)
                    return StandIn._cudaStreamEndCapture(stand_in, *arguments)

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
