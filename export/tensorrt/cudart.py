"""The few functions of the CUDA runtime that running an engine needs, by ctypes: memory, copies, a stream, graphs.

No torch and no binding package: libcudart comes with every CUDA installation and with the pip packages that ONNX
Runtime and TensorRT bring. Every return code is checked. Signatures: CUDA Runtime API, the same in 12 and 13.
"""

import ctypes
import functools
import importlib.util
import logging
import math
import weakref
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("libcudart.so.13", "libcudart.so.12")
# Where pip's packages of CUDA 13 and 12 keep it, inside the namespace package `nvidia`.
PIP_FOLDERS = ("cu13/lib", "cuda_runtime/lib")

_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_NON_BLOCKING = 1  # cudaStreamNonBlocking: other libraries' work on the default stream does not hold this one up
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: another thread's allocation does not spoil a capture
_UNLOADING = 4  # cudaErrorCudartUnloading: the process ends and the driver has freed everything already

_pointer = ctypes.POINTER(c_void_p)
_SIGNATURES: dict[str, list[Any]] = {
    "cudaMalloc": [_pointer, c_size_t],
    "cudaFree": [c_void_p],
    "cudaHostAlloc": [_pointer, c_size_t, c_uint],
    "cudaFreeHost": [c_void_p],
    "cudaMemcpyAsync": [c_void_p, c_void_p, c_size_t, c_int, c_void_p],
    "cudaStreamCreateWithFlags": [_pointer, c_uint],
    "cudaStreamDestroy": [c_void_p],
    "cudaStreamSynchronize": [c_void_p],
    "cudaStreamBeginCapture": [c_void_p, c_int],
    "cudaStreamEndCapture": [c_void_p, _pointer],
    "cudaGraphInstantiateWithFlags": [_pointer, c_void_p, c_ulonglong],
    "cudaGraphDestroy": [c_void_p],
    "cudaGraphLaunch": [c_void_p, c_void_p],
    "cudaGraphExecDestroy": [c_void_p],
    "cudaRuntimeGetVersion": [ctypes.POINTER(c_int)],
    "cudaGetLastError": [],
}
_log = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """A CUDA call failed, or there is no CUDA runtime; the message names the function and CUDA's own words."""


def places() -> list[str]:
    """Names and paths to try, in order: what the system or this process knows, then pip's folders, newest first."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    found = [str(p) for root in roots for folder in PIP_FOLDERS for p in (Path(root) / folder).glob("libcudart.so.*")]
    return [*NAMES, *sorted(found, reverse=True)]


def open_library(candidates: list[str]) -> ctypes.CDLL:
    """The first of `candidates` that loads and has all functions. Raises CudaError with each one's reason."""
    reasons = []
    for place in candidates:
        try:
            library = ctypes.CDLL(place)
            for name, arguments in _SIGNATURES.items():
                getattr(library, name).argtypes = arguments
            library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = [c_int], c_char_p
        except (OSError, AttributeError) as error:
            reasons.append(f"{place}: {error}")
        else:
            return library
    raise CudaError(f"no CUDA runtime can be loaded ({'; '.join(reasons)}); install the extra `gpu`")


@functools.cache
def library() -> Any:
    """The CUDA runtime of this process. Raises CudaError when none can be loaded."""
    return open_library(places())


def call(name: str, *arguments: Any) -> None:
    """Call a function of the runtime. Raises CudaError with its name and CUDA's words when it answers an error."""
    runtime = library()
    if code := getattr(runtime, name)(*arguments):
        runtime.cudaGetLastError()  # CUDA remembers the error for the thread: the next user must not find it
        raise CudaError(f"{name}: {runtime.cudaGetErrorString(code).decode()} (CUDA error {code})")


def version() -> str:
    """The runtime's version, such as "13.0"."""
    number = c_int()
    call("cudaRuntimeGetVersion", ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _release(function: str, handle: int) -> None:
    # While things are taken down there is often an earlier error on its way: it must not be hidden by this one.
    if (code := getattr(library(), function)(handle)) not in (0, _UNLOADING):
        _log.warning("%s: %s (CUDA error %d)", function, library().cudaGetErrorString(code).decode(), code)


class _Owned:
    """A handle from the runtime, given back by `close` or when nobody holds it any more."""

    def __init__(self, handle: c_void_p, release: str) -> None:
        self.handle = int(handle.value or 0)
        self.close = weakref.finalize(self, _release, release, self.handle)


class DeviceMemory(_Owned):
    """`size` bytes on the card at address `handle`, aligned to 256 bytes. Raises CudaError when they are not to be had."""

    def __init__(self, size: int) -> None:
        address = c_void_p()
        call("cudaMalloc", ctypes.byref(address), max(1, size))
        self.size = size
        super().__init__(address, "cudaFree")


class PinnedArray(_Owned):
    """`array`: uint8 of `shape` in host memory that the card reads without a copy in between.

    Take copies of what is to outlive this object. Raises CudaError when the memory is not to be had.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        address, size = c_void_p(), math.prod(shape)
        call("cudaHostAlloc", ctypes.byref(address), size, 0)
        super().__init__(address, "cudaFreeHost")
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.handle))
        self.array = self.array.reshape(shape)


class Graph(_Owned):
    """Work captured once and launched as a whole."""

    def __init__(self, captured: c_void_p) -> None:
        """Make `captured` (a cudaGraph_t, destroyed here) ready to launch. Raises CudaError."""
        ready = c_void_p()
        try:
            call("cudaGraphInstantiateWithFlags", ctypes.byref(ready), captured, 0)
        finally:
            _release("cudaGraphDestroy", int(captured.value or 0))
        super().__init__(ready, "cudaGraphExecDestroy")

    def launch(self, stream: "Stream") -> None:
        call("cudaGraphLaunch", self.handle, stream.handle)


class Stream(_Owned):
    """A queue of work on the card. All methods raise CudaError."""

    def __init__(self) -> None:
        handle = c_void_p()
        call("cudaStreamCreateWithFlags", ctypes.byref(handle), _NON_BLOCKING)
        super().__init__(handle, "cudaStreamDestroy")

    def to_device(self, target: DeviceMemory, source: PinnedArray) -> None:
        """Queue a copy of the whole array."""
        call("cudaMemcpyAsync", target.handle, source.handle, source.array.nbytes, _TO_DEVICE, self.handle)

    def to_host(self, target: PinnedArray, source: DeviceMemory) -> None:
        """Queue a copy that fills the whole array."""
        call("cudaMemcpyAsync", target.handle, source.handle, target.array.nbytes, _TO_HOST, self.handle)

    def synchronize(self) -> None:
        """Wait until everything queued is done; errors of the work itself show here."""
        call("cudaStreamSynchronize", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` queues on this stream, as a graph; nothing of it runs yet.

        Raises what `enqueue` raises, and CudaError when something in it cannot be captured; the stream is usable then.
        """
        captured = c_void_p()
        call("cudaStreamBeginCapture", self.handle, _THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            library().cudaStreamEndCapture(self.handle, ctypes.byref(captured))
            library().cudaGetLastError()
            if captured.value:
                _release("cudaGraphDestroy", captured.value)
            raise
        call("cudaStreamEndCapture", self.handle, ctypes.byref(captured))
        return Graph(captured)
