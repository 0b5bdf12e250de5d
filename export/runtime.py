"""Run a bundle with ONNX Runtime: images in, class ids and confidence out. No torch.

Provider policy: what is asked for by name is what runs, or the start is refused. Only "auto" may choose, and says what
it chose in `Runtime.provider`. ONNX Runtime itself falls back to the CPU silently and lists providers that the machine
lacks, so the answer is read from the finished session.
"""

import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.bundle import Bundle, BundleError
from pipeline import fit

Provider = Literal["cpu", "cuda", "tensorrt", "auto"]
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class ProviderError(RuntimeError):
    """The asked-for execution provider is not to be had; the message says what to install or choose."""


@dataclass(frozen=True)
class Segmentation:
    """One image's answer at its own size.

    `label_HW` uint8 class ids, `confidence_HW` uint8 (0..255 = 0..1); the same at the model's resolution without its
    padding as `scaled_label_hw`, `scaled_confidence_hw`; `timings` seconds of "fit", "run" and "restore".
    """

    label_HW: NDArray[np.uint8]
    confidence_HW: NDArray[np.uint8]
    scaled_label_hw: NDArray[np.uint8]
    scaled_confidence_hw: NDArray[np.uint8]
    timings: dict[str, float]


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


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once where /proc/cpuinfo tells."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores, current = set(), dict[str, str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in [*lines, ""]:
        key, _, value = line.partition(":")
        if key.strip():
            current[key.strip()] = value.strip()
        elif "core id" in current and int(current.get("processor", -1)) in usable:
            cores.add((current.get("physical id", "0"), current["core id"]))
            current = {}
    return max(1, min(len(usable), len(cores) or len(usable)))


def _create(model: bytes, providers: Sequence[str], threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # sizes differ from image to image; planned memory would be kept for each
    options.log_severity_level = 4  # fatal only: failures come back as exceptions
    return ort.InferenceSession(model, sess_options=options, providers=list(providers))


def _open_session(model: bytes, provider: Provider, threads: int) -> tuple[ort.InferenceSession, str]:
    """(session, provider that really runs). Raises ProviderError."""
    if provider == "tensorrt":
        if importlib.util.find_spec("tensorrt") is None:
            raise ProviderError("tensorrt is not installed: it comes with the gpu extra; or ask for 'cuda' or 'cpu'")
        raise ProviderError("running with tensorrt comes with a later release; ask for 'cuda' or 'cpu'")
    if provider not in ("cpu", "cuda", "auto"):
        raise ProviderError(f"unknown provider {provider!r}; choose cpu, cuda, tensorrt or auto")
    if provider != "cpu" and _CUDA in ort.get_available_providers():
        ort.preload_dlls()  # finds the CUDA libraries that pip put into the virtual environment
        session = _create(model, (_CUDA, _CPU), threads)
        if session.get_providers()[0] == _CUDA:
            return session, "cuda"
    if provider == "cuda":
        raise ProviderError(
            "CUDA was asked for but ONNX Runtime cannot use it here; "
            "check the driver and that onnxruntime-gpu is installed, or ask for 'cpu'"
        )
    return _create(model, (_CPU,), threads), "cpu"


class Runtime:
    """An opened model. Safe to call from several threads."""

    def __init__(self, bundle: Bundle, *, provider: Provider = "auto", threads: int | None = None) -> None:
        """Open the bundle's model on `provider` with `threads` intra-op threads (None = physical cores).

        Raises:
            ProviderError: the provider asked for by name does not run here (never a silent fallback).
            BundleError: the model cannot be loaded or has other inputs and outputs than a bundle's.
        """
        check_installation()
        self.bundle = bundle
        self.threads = threads or physical_cores()
        try:
            self._session, self.provider = _open_session(bundle.read_model(), provider, self.threads)
        except (ProviderError, BundleError):
            raise
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise BundleError(f"{bundle.folder / 'model.onnx'}: cannot be loaded ({error}); export it again") from error
        self._check_names()

    def _check_names(self) -> None:
        def facts(nodes: Any) -> list[tuple[str, str, int]]:
            return [(node.name, node.type, len(node.shape)) for node in nodes]

        inputs, outputs = facts(self._session.get_inputs()), facts(self._session.get_outputs())
        if inputs != [("image", "tensor(uint8)", 4)] or outputs != [
            ("label", "tensor(uint8)", 3),
            ("confidence", "tensor(uint8)", 3),
        ]:
            raise BundleError(
                f"{self.bundle.folder / 'model.onnx'}: has {inputs} -> {outputs}, "
                "not uint8 image (NHWC) -> uint8 label, uint8 confidence (NHW); export it again"
            )

    def run(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """uint8 N x H x W x 3 RGB, H and W multiples of the stride -> uint8 class ids and confidence, each N x H x W.

        Raises:
            ValueError: wrong type or shape. The exported graph itself would not notice every size that does not fit.
        """
        stride = self.bundle.manifest.input.stride
        shape = images_NHWC.shape
        if images_NHWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"expected uint8 N x H x W x 3, got {images_NHWC.dtype} {shape}")
        if 0 in shape or shape[1] % stride or shape[2] % stride:
            raise ValueError(f"height and width must be multiples of {stride}, got {shape}; use pipeline.fit")
        label_NHW, confidence_NHW = self._session.run(["label", "confidence"], {"image": images_NHWC})
        return np.asarray(label_NHW), np.asarray(confidence_NHW)

    def segment(self, image_HWC: NDArray[np.uint8]) -> Segmentation:
        """One uint8 RGB image of any size -> its `Segmentation` at that size, by the bundle's input policy."""
        plan = self.bundle.fit(*image_HWC.shape[:2])
        marks = [time.perf_counter()]
        fitted_HWC = fit.apply(image_HWC, plan)
        marks.append(time.perf_counter())
        label_NHW, confidence_NHW = self.run(fitted_HWC[None])
        marks.append(time.perf_counter())
        label_HW, confidence_HW = fit.restore(label_NHW[0], plan), fit.restore(confidence_NHW[0], plan)
        marks.append(time.perf_counter())
        names = ("fit", "run", "restore")
        timings = {name: end - start for name, start, end in zip(names, marks, marks[1:], strict=False)}
        scaled = np.s_[: plan.scaled_height, : plan.scaled_width]
        return Segmentation(label_HW, confidence_HW, label_NHW[0][scaled], confidence_NHW[0][scaled], timings)

    def warm_up(self) -> None:
        """Run the smallest and the largest usual size once, and check that the answers are what a bundle promises.

        Raises:
            BundleError: wrong output shape or type, an id of no class, or the model fails on the inputs it should take.
        """
        policy = self.bundle.manifest.input
        known = [item.id for item in self.bundle.manifest.classes]
        noise = np.random.default_rng(0)
        for side in (1, policy.long_side):
            image_HWC = noise.integers(0, 256, (side, side, 3), dtype=np.uint8)
            try:
                answer = self.segment(image_HWC)
            except Exception as error:  # whatever the model's own failure is, the bundle is at fault
                raise BundleError(f"{self.bundle.folder}: fails on a {side} x {side} image ({error})") from error
            for array in (answer.label_HW, answer.confidence_HW):
                if array.shape != (side, side) or array.dtype != np.uint8:
                    raise BundleError(f"{self.bundle.folder}: answers {array.dtype} {array.shape} to {side} x {side}")
            if strange := sorted(set(np.unique(answer.label_HW).tolist()) - set(known)):
                raise BundleError(f"{self.bundle.folder}: answers ids {strange[:5]} that are no class of bundle.json")
