"""The few functions of the CUDA runtime that running an engine needs: memory, copies, a stream, graphs.

They are called through NVIDIA's `cuda-bindings` (Apache-2.0), which brings its own runtime and needs the driver alone.
Here are what it leaves to its caller: every return code is checked, and what was taken is given back.
"""

import ctypes
import functools
import logging
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NON_BLOCKING = 1  # cudaStreamNonBlocking: other libraries' work on the default stream does not hold this one up
_UNLOADING = 4  # cudaErrorCudartUnloading: the process ends and the driver has freed everything already
_log = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """A CUDA call failed, or there is no CUDA runtime; the message names the function and CUDA's own words."""


@functools.cache
def library() -> Any:
    """The bindings of the CUDA runtime. Raises CudaError when they cannot be imported."""
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError, RuntimeError) as error:
        raise CudaError(f"no CUDA runtime can be loaded ({error}); install the extra `gpu`") from error
    return runtime


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the runtime and return its value, if it has one.

    Raises CudaError with its name and CUDA's words when it answers an error.
    """
    code, *values = getattr(library(), name)(*arguments)
    if int(code):
        library().cudaGetLastError()  # CUDA remembers the error for the thread: the next user must not find it
        raise CudaError(f"{name}: {_words(code)}")
    return values[0] if values else None


def version() -> str:
    """The runtime's version, such as "13.0"."""
    number = int(call("cudaRuntimeGetVersion"))
    return f"{number // 1000}.{number % 1000 // 10}"


def _words(code: Any) -> str:
    _, text = library().cudaGetErrorString(code)
    return f"{text.decode()} (CUDA error {int(code)})"


def _release(function: str, handle: int) -> None:
    # While things are taken down there is often an earlier error on its way: it must not be hidden by this one.
    code, *_ = getattr(library(), function)(handle)
    if int(code) not in (0, _UNLOADING):
        _log.warning("%s: %s", function, _words(code))


class _Owned:
    """A handle from the runtime, given back by `close` or when nobody holds it any more."""

    def __init__(self, handle: Any, release: str) -> None:
        self.handle = int(handle)
        self.close = weakref.finalize(self, _release, release, self.handle)


class DeviceMemory(_Owned):
    """`size` bytes on the card at address `handle`, aligned to 256 bytes. Raises CudaError when they are not to be had."""

    def __init__(self, size: int) -> None:
        self.size = size
        super().__init__(call("cudaMalloc", max(1, size)), "cudaFree")


class PinnedArray(_Owned):
    """`array`: uint8 of `shape` in host memory that the card reads without a copy in between.

    Take copies of what is to outlive this object. Raises CudaError when the memory is not to be had.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = math.prod(shape)
        super().__init__(call("cudaHostAlloc", size, 0), "cudaFreeHost")
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.handle))
        self.array = self.array.reshape(shape)


class Graph(_Owned):
    """Work captured once and launched as a whole."""

    def __init__(self, captured: int) -> None:
        """Make `captured` (a cudaGraph_t, destroyed here) ready to launch. Raises CudaError."""
        try:
            ready = call("cudaGraphInstantiateWithFlags", captured, 0)
        finally:
            _release("cudaGraphDestroy", captured)
        super().__init__(ready, "cudaGraphExecDestroy")

    def launch(self, stream: "Stream") -> None:
        call("cudaGraphLaunch", self.handle, stream.handle)


class Stream(_Owned):
    """A queue of work on the card. All methods raise CudaError."""

    def __init__(self) -> None:
        super().__init__(call("cudaStreamCreateWithFlags", _NON_BLOCKING), "cudaStreamDestroy")

    def to_device(self, target: DeviceMemory, source: PinnedArray) -> None:
        """Queue a copy of the whole array."""
        kind = library().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", target.handle, source.handle, source.array.nbytes, kind, self.handle)

    def to_host(self, target: PinnedArray, source: DeviceMemory) -> None:
        """Queue a copy that fills the whole array."""
        kind = library().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", target.handle, source.handle, target.array.nbytes, kind, self.handle)

    def synchronize(self) -> None:
        """Wait until everything queued is done; errors of the work itself show here."""
        call("cudaStreamSynchronize", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` queues on this stream, as a graph; nothing of it runs yet.

        Raises what `enqueue` raises, and CudaError when something in it cannot be captured; the stream is usable then.
        """
        # Of this thread alone: another thread's allocation does not spoil the capture.
        call("cudaStreamBeginCapture", self.handle, library().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        except BaseException:
            _, captured = library().cudaStreamEndCapture(self.handle)
            library().cudaGetLastError()
            if captured is not None and int(captured):
                _release("cudaGraphDestroy", int(captured))
            raise
        return Graph(int(call("cudaStreamEndCapture", self.handle)))
