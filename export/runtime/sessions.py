"""One opened model in one runtime: uint8 images in, class ids and confidence out. No torch, no policy.

A session runs what was asked for or is not made (`ProviderError`): ONNX Runtime itself falls back to the CPU silently
and lists providers that the machine lacks, so the answer is read from the finished session.
"""

import importlib.metadata
import importlib.util
import threading
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import INPUT, OUTPUTS, Option
from export.runtime import telemetry

Answer = tuple[NDArray[np.uint8], NDArray[np.uint8]]
_FIRST = threading.Lock()
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class ProviderError(RuntimeError):
    """The asked-for runtime is not to be had here; the message says what to install or choose."""


class SignatureError(ValueError):
    """The model has other inputs and outputs than a bundle's."""


class Session(Protocol):
    """`run` may be called from several threads."""

    def run(self, images_NHWC: NDArray[np.uint8]) -> Answer: ...


def check_installation() -> None:
    """onnxruntime and onnxruntime-gpu write the same files: with both, the last one installed wins unseen.

    Raises:
        ProviderError: both are installed.
    """
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            importlib.metadata.version(name)
            found.append(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(found) == 2:
        raise ProviderError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "uninstall both, then install one"
        )


def _same(found: tuple[list[Any], list[Any]], uint8: str) -> None:
    wanted = ([(INPUT, uint8, 4)], [(name, uint8, 3) for name in OUTPUTS])
    if found != wanted:
        raise SignatureError(
            f"has {found[0]} -> {found[1]}, not uint8 image (NHWC) -> uint8 label, uint8 confidence (NHW)"
        )


class OnnxRuntime:
    """ONNX Runtime on the CPU or a CUDA card."""

    def __init__(self, model: bytes, device: str, threads: int) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise ProviderError(
                "onnxruntime is not installed: `pip install 'marginalia-seg[cpu]'`, or [gpu] for a CUDA card"
            )
        telemetry.turn_off()
        import onnxruntime as ort

        providers: list[Any] = [_CPU]
        if device == "cuda":
            if _CUDA not in ort.get_available_providers():
                raise ProviderError(_no_cuda())
            ort.preload_dlls()  # finds the CUDA libraries that pip put into the virtual environment
            # TensorFloat-32 is on by default: 10 bits of mantissa where fp32 was promised.
            providers = [(_CUDA, {"use_tf32": "0"}), _CPU]

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # sizes differ from image to image; planned memory would be kept for each
        options.log_severity_level = 4  # fatal only: failures come back as exceptions

        # ONNX Runtime's Python class answers a failed call on the CPU from then on, with a line on stdout: not here.
        self._session = ort.InferenceSession(model, sess_options=options, providers=providers, enable_fallback=0)
        self._session.disable_fallback()
        if device == "cuda" and self._session.get_providers()[0] != _CUDA:
            raise ProviderError(_no_cuda())

        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        facts = tuple([(node.name, node.type, len(node.shape)) for node in side] for side in (inputs, outputs))
        _same((facts[0], facts[1]), "tensor(uint8)")

    def run(self, images_NHWC: NDArray[np.uint8]) -> Answer:
        label_NHW, confidence_NHW = self._session.run(list(OUTPUTS), {INPUT: images_NHWC})
        return np.asarray(label_NHW), np.asarray(confidence_NHW)


def _no_cuda() -> str:
    return (
        "CUDA was asked for but ONNX Runtime cannot use it here; "
        "check the driver and that onnxruntime-gpu is installed, or ask for 'cpu'"
    )


class OpenVino:
    """OpenVINO on the CPU. The precision is the arithmetic's, whatever the file's: bf16 is refused where it is emulated."""

    def __init__(self, model: bytes, precision: str, threads: int) -> None:
        if importlib.util.find_spec("openvino") is None:
            raise ProviderError("openvino is not installed: `pip install 'marginalia-seg[openvino]'`; or ask for 'cpu'")
        telemetry.turn_off()
        import openvino as ov

        with _FIRST:
            # The binding fills its table of NumPy's functions at first use, and two threads that come first together
            # wait for each other for ever (seen: one holds the interpreter's lock, the other the table's).
            _ = ov.Tensor(np.zeros(1, np.uint8)).data[:]
        core = ov.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ProviderError("this processor has no bfloat16 arithmetic; ask for precision 'fp32'")
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # Threads tied to cores wait for whoever else is on theirs; on a quiet machine both are as fast.
            "ENABLE_CPU_PINNING": False,
            # Kernels made for shapes seen. The default of 5000 took the demo's network from 180 to 790 MB over 160 shapes
            # (this: 410) and was no faster.
            "CPU_RUNTIME_CACHE_CAPACITY": 256,
        }
        self._model = core.compile_model(core.read_model(model), "CPU", settings)
        sides = (self._model.inputs, self._model.outputs)
        facts = tuple(
            [(port.any_name, port.element_type.get_type_name(), len(port.partial_shape)) for port in side]
            for side in sides
        )
        _same((facts[0], facts[1]), "u8")
        self._outputs = [self._model.output(name) for name in OUTPUTS]
        # A request holds one run's buffers, tens of megabytes. One per thread would keep as many as there are threads,
        # for each model in memory (seen: 1.1 GB in a soak); so many as run at once are enough.
        self._idle: list[Any] = []

    def run(self, images_NHWC: NDArray[np.uint8]) -> Answer:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        found = request.infer({INPUT: np.ascontiguousarray(images_NHWC)})
        label_NHW, confidence_NHW = (np.array(found[port]) for port in self._outputs)
        self._idle.append(request)  # not after an error: a request that failed is not used again
        return label_NHW, confidence_NHW


def open_session(option: Option, model: bytes, *, threads: int, long_side: int, stride: int) -> Session:
    """The session for an option. Raises ProviderError, SignatureError, or the runtime's own error for a damaged model."""
    if option.runtime == "onnxruntime":
        return OnnxRuntime(model, option.device, threads)
    if option.runtime == "openvino":
        return OpenVino(model, option.precision, threads)
    from export.tensorrt import installation  # looks for a driver: only when asked for
    from export.tensorrt.profile import Profile
    from export.tensorrt.session import EngineSession

    found = installation.look()
    if not found.usable:
        raise ProviderError(f"tensorrt: {found.says}; ask for 'cuda' or 'cpu'")
    try:
        profile = Profile.of(long_side=long_side, stride=stride)
        session: Session = EngineSession(model, precision=option.precision, profile=profile)
    except (installation.EngineError, OSError) as error:
        raise ProviderError(f"tensorrt: {error}; ask for 'cuda' or 'cpu'") from error
    return session
