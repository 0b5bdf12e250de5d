"""A TensorRT engine as a session: uint8 images in, class ids and confidence out, on the first card."""

import logging
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import INPUT, OUTPUTS
from export.tensorrt import builder, cudart, installation
from export.tensorrt.cache import Cache, Key, default_folder
from export.tensorrt.installation import EngineError
from export.tensorrt.profile import Profile
from pipeline.storage import atomic

SHAPES = 16  # input shapes whose buffers and graphs are kept
_log = logging.getLogger(__name__)


class _Slot:
    """Everything for one input shape: a context, buffers on both sides, and the graph once captured.

    A context of its own, because a captured graph holds the addresses and sizes its context had.
    """

    def __init__(self, engine: Any, module: Any, scratch: cudart.DeviceMemory, shape_NHWC: tuple[int, ...]) -> None:
        self.context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.context is None:
            raise EngineError("TensorRT makes no execution context; the card may be out of memory")
        self.context.set_device_memory(scratch.handle, scratch.size)
        shape_NHW = shape_NHWC[:3]
        shapes = zip((INPUT, *OUTPUTS), (shape_NHWC, shape_NHW, shape_NHW), strict=True)
        self.hosts = {name: cudart.PinnedArray(shape) for name, shape in shapes}
        self.devices = {n: cudart.DeviceMemory(host.array.nbytes) for n, host in self.hosts.items()}
        if not self.context.set_input_shape(INPUT, shape_NHWC):
            raise EngineError(f"the engine refuses the input shape {shape_NHWC}")
        for name, memory in self.devices.items():
            if not self.context.set_tensor_address(name, memory.handle):
                raise EngineError(f"the engine has no input or output {name!r}; export the model again")
        self.graph: cudart.Graph | None = None
        self.runs, self.capturable = 0, True

    def enqueue(self, stream: cudart.Stream) -> None:
        stream.to_device(self.devices[INPUT], self.hosts[INPUT])
        if not self.context.execute_async_v3(stream.handle):
            raise EngineError("TensorRT refused to run the engine; its log says why")
        for name in OUTPUTS:
            stream.to_host(self.hosts[name], self.devices[name])

    def close(self) -> None:
        self.context = None
        for owned in (self.graph, *self.hosts.values(), *self.devices.values()):
            if owned is not None:
                owned.close()


class EngineSession:
    """A model on the first card. Safe to call from several threads; calls run one after the other.

    `key` says what was built, `cached` whether its file was used, `seconds` what building or loading took. `graphs`
    (may be changed between calls): replay a CUDA graph for shapes that come again.
    """

    def __init__(
        self,
        model: bytes,
        *,
        precision: str,
        profile: Profile,
        cache: Path | None = None,
        module: Any = None,
        name: str = "model.onnx",
        rebuild: bool = False,
    ) -> None:
        """Load `model` (ONNX, called `name` in messages) from the folder `cache` (None: `default_folder`), or build it.

        Raises:
            EngineError: no card, no TensorRT module or CUDA runtime, the model cannot be built, or the card has no
                memory for it; the message says which.
        """
        started = time.perf_counter()
        self.profile = profile
        card = installation.card()
        self._module = module or installation.load()
        self._log = builder.logger(self._module)
        self._runtime = self._module.Runtime(self._log)
        self.key = Key(
            self._module.__name__, self._module.__version__, card.name, card.compute_capability, card.driver,
            atomic.sha256(model), precision, profile,
        )  # fmt: skip

        def make(timings: bytes) -> builder.Built:
            return builder.build(self._module, model, precision=precision, profile=profile, name=name, timings=timings)

        self._engine, self.cached = Cache(cache or default_folder()).obtain(self.key, make, self._load, rebuild=rebuild)
        self.seconds = time.perf_counter() - started
        self.graphs = True
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[int, ...], _Slot] = OrderedDict()
        try:
            self._stream = cudart.Stream()
            # One block for all contexts: they run one after the other. By itself each would take the largest shape's.
            self._scratch = cudart.DeviceMemory(self._engine.device_memory_size_v2)
        except cudart.CudaError as error:
            raise EngineError(f"{name}: built, but cannot be run: {error}") from error

    def _load(self, payload: bytes) -> Any:
        try:
            return self._runtime.deserialize_cuda_engine(payload)
        except (RuntimeError, ValueError, TypeError) as error:  # it answers None, and may also throw
            _log.warning("TensorRT cannot load an engine: %s", error)
            return None

    @property
    def captured(self) -> int:
        """Shapes that a CUDA graph is kept for."""
        return sum(slot.graph is not None for slot in self._slots.values())

    def run(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """uint8 N x H x W x 3 RGB -> uint8 class ids and confidence (0..255), each N x H x W.

        Raises:
            ValueError: wrong type or shape, or outside the profile; the message says which bound.
            EngineError, cuda.CudaError: the card failed; or the session is closed.
        """
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
            raise ValueError(f"expected uint8 N x H x W x 3, got {images_NHWC.dtype} {images_NHWC.shape}")
        self.profile.check(images_NHWC.shape[:3])
        with self._lock:
            if self._engine is None:
                raise EngineError("the session is closed; open another")
            slot = self._slot(images_NHWC.shape)
            np.copyto(slot.hosts[INPUT].array, images_NHWC)
            self._launch(slot)
            self._stream.synchronize()
            slot.runs += 1
            label_NHW, confidence_NHW = (slot.hosts[name].array.copy() for name in OUTPUTS)
            return label_NHW, confidence_NHW

    def _slot(self, shape_NHWC: tuple[int, ...]) -> _Slot:
        if shape_NHWC not in self._slots:
            while len(self._slots) >= SHAPES:
                self._slots.popitem(last=False)[1].close()
            self._slots[shape_NHWC] = _Slot(self._engine, self._module, self._scratch, shape_NHWC)
        self._slots.move_to_end(shape_NHWC)
        return self._slots[shape_NHWC]

    def _launch(self, slot: _Slot) -> None:
        """Plainly the first time (TensorRT prepares for a shape then, which cannot be captured), later as a graph."""
        if self.graphs and slot.runs and slot.graph is None and slot.capturable:
            try:
                slot.graph = self._stream.capture(lambda: slot.enqueue(self._stream))
            except (cudart.CudaError, EngineError) as error:
                slot.capturable = False
                _log.warning("no CUDA graph for the input shape %s: %s", slot.hosts[INPUT].array.shape, error)
        if self.graphs and slot.graph is not None:
            slot.graph.launch(self._stream)
        else:
            slot.enqueue(self._stream)

    def close(self) -> None:
        """Give back all that is on the card. Closing twice does no harm."""
        with self._lock:
            while self._slots:
                self._slots.popitem()[1].close()
            self._engine = self._runtime = None
            self._scratch.close()
            self._stream.close()
