"""Run a bundle: images in, class ids and confidence out, by the best runtime that is allowed here. No torch.

Policy: what is asked for by name is what runs, or the start is refused. "auto" takes the fastest of the options that
parity admitted into the bundle and that run here, and says which in `Runtime.option`. An int8 or bf16 option needs a
processor with that arithmetic.
"""

import importlib.util
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle, BundleError
from export.bundle.manifest import Manifest, Option, Precision, Provider, ranked
from export.runtime import batches, cpu
from export.runtime.sessions import ProviderError, Session, SignatureError, check_installation, open_session
from pipeline.imaging import resize

__all__ = ["Precision", "Provider", "ProviderError", "Runtime", "Segmentation", "check_installation", "options"]

RECENT = 8  # sizes that a runtime remembers
# What any bundle can run without a file of its own. fp32 is the same network in every runtime, but no two round alike.
PLAIN = (
    Option(runtime="tensorrt", device="cuda", precision="fp32"),
    Option(runtime="onnxruntime", device="cuda", precision="fp32"),
    Option(runtime="openvino", device="cpu", precision="fp32"),
    Option(runtime="onnxruntime", device="cpu", precision="fp32"),
)


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


def restored(label_HW: NDArray[np.uint8], confidence_HW: NDArray[np.uint8], plan: resize.Fit) -> Segmentation:
    """One image of what `Runtime.run` answers, padded to the plan's size -> its `Segmentation`, without timings."""
    scaled = np.s_[: plan.scaled_height, : plan.scaled_width]
    sizes = resize.restore(label_HW, plan), resize.restore(confidence_HW, plan)
    return Segmentation(*sizes, label_HW[scaled], confidence_HW[scaled], {})


def everything(manifest: Manifest) -> list[Option]:
    """The bundle's options and plain fp32 in every runtime, without those that parity found wrong; the best first."""
    known = {*manifest.rejected, *(str(o) for o in manifest.options)}
    return ranked([*manifest.options, *(o for o in PLAIN if str(o) not in known)])


def candidates(manifest: Manifest, provider: Provider, precision: Precision) -> list[Option]:
    """Options worth trying, best first.

    Where something is left to "auto", an option that parity did not judge is taken only if it is fp32 in ONNX Runtime,
    or in the runtime that is named: the same network, on a machine that parity has not seen.

    Raises:
        ProviderError: the bundle has nothing of that name, or parity found it wrong.
    """
    if provider not in ("cpu", "cuda", "openvino", "tensorrt", "auto"):
        raise ProviderError(f"unknown provider {provider!r}; choose cpu, cuda, openvino, tensorrt or auto")
    named = "auto" not in (provider, precision)
    pool = everything(manifest)
    found = [
        o
        for o in pool
        if provider in ("auto", o.provider)
        and precision in ("auto", o.precision)
        and (
            named
            or o.speedup is not None
            or (o.precision == "fp32" and (o.runtime == "onnxruntime" or o.provider == provider))
        )
    ]
    if not found:
        have = ", ".join(sorted(f"{o.provider} {o.precision}" for o in pool))
        wrong = f" (parity found {', '.join(manifest.rejected)} wrong)" if manifest.rejected else ""
        raise ProviderError(
            f"this bundle has nothing for provider {provider!r} in precision {precision!r}; it has {have}{wrong}"
        )
    return found


def _lacks(option: Option) -> str | None:
    """Why an option cannot or should not be picked here unless it is named; None when nothing is known against it."""
    if option.device == "cuda":
        from export.tensorrt import installation

        found = installation.look()
        return None if found.cards and (found.modules or option.runtime != "tensorrt") else found.says
    if option.runtime == "openvino" and importlib.util.find_spec("openvino") is None:
        return "openvino is not installed"
    if option.precision == "bf16" and not cpu.flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return "this processor has no bfloat16 arithmetic"
    return None


def options(bundle: Bundle) -> list[Option]:
    """Every option that can run on this machine, the best first."""
    return [o for o in everything(bundle.manifest) if _lacks(o) is None]


class Runtime:
    """An opened model. Safe to call from several threads. `option` is what runs; `passed_over` why better ones do not."""

    def __init__(
        self, bundle: Bundle, *, provider: Provider = "auto", precision: Precision = "auto", threads: int | None = None
    ) -> None:
        """Open the bundle on `provider` in `precision` with `threads` threads per call (None = physical cores).

        Raises:
            ProviderError: what was asked for by name does not run here (never a silent fallback).
            BundleError: the model cannot be loaded or has other inputs and outputs than a bundle's.
        """
        check_installation()
        self.bundle = bundle
        self.threads = threads or cpu.cores()
        self.passed_over: dict[str, str] = {}
        self.recent: deque[tuple[int, int]] = deque(maxlen=RECENT)  # heights and widths that came lately
        self.option, self._session = self._open(provider, precision)
        self.provider, self.precision = self.option.provider, self.option.precision

    def _open(self, provider: Provider, precision: Precision) -> tuple[Option, Session]:
        tried = candidates(self.bundle.manifest, provider, precision)
        policy, free = self.bundle.manifest.input, provider == "auto" and precision == "auto"
        problem: Exception = ProviderError("nothing to try")
        for option in tried:
            if (lack := _lacks(option)) and (provider == "auto" or precision == "auto") and option.device == "cpu":
                problem = ProviderError(f"{option}: {lack}; name both provider and precision to run it all the same")
                self.passed_over[str(option)] = lack
                continue
            model = self.bundle.read_model(option.file)
            try:
                session = open_session(
                    option, model, threads=self.threads, long_side=policy.long_side, stride=policy.stride
                )
            except ProviderError as error:
                problem, reason = error, str(error)
            except Exception as error:  # the runtimes' own exceptions share no base class
                reason = str(error) if isinstance(error, SignatureError) else f"cannot be loaded ({error})"
                problem = BundleError(f"{self.bundle.folder / option.file}: {reason}; export it again")
            else:
                return option, session
            if not free and isinstance(problem, BundleError):
                raise problem
            self.passed_over[str(option)] = reason
        raise problem

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
            raise ValueError(
                f"height and width must be multiples of {stride}, got {shape}; use pipeline.imaging.resize"
            )
        size = (shape[1], shape[2])
        if size not in self.recent:
            self.recent.append(size)
        answers = [self._session.run(images_NHWC[part]) for part in batches.parts(shape[0], self._most(*shape[1:3]))]
        if len(answers) == 1:
            return answers[0]
        return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])

    def _most(self, height: int, width: int) -> int:
        """Images of this size that run together. On a CPU no more pixels than the largest single image has: its runtimes
        keep the buffers of the largest batch (demo, 8 of 512 x 512: 760 to 1060 MB against 135 to 255) and from 256 x 192
        on were no faster for one."""
        if self.option.device != "cpu":
            return batches.most_images(self.bundle.manifest.input.long_side)
        return max(1, self.bundle.manifest.input.long_side**2 // (height * width))

    def segment(self, image_HWC: NDArray[np.uint8]) -> Segmentation:
        """One uint8 RGB image of any size -> its `Segmentation` at that size, by the bundle's input policy."""
        plan = self.bundle.fit(*image_HWC.shape[:2])
        marks = [time.perf_counter()]
        fitted_HWC = resize.apply(image_HWC, plan)
        marks.append(time.perf_counter())
        label_NHW, confidence_NHW = self.run(fitted_HWC[None])
        marks.append(time.perf_counter())
        found = restored(label_NHW[0], confidence_NHW[0], plan)
        marks.append(time.perf_counter())
        names = ("fit", "run", "restore")
        timings = {name: end - start for name, start, end in zip(names, marks, marks[1:], strict=False)}
        return replace(found, timings=timings)

    def warm_up(self, sizes: Iterable[tuple[int, int]] = ()) -> None:
        """Run the smallest and the largest usual size once, and check that the answers are what a bundle promises.

        Args:
            sizes: heights and widths that `run` will meet, such as another runtime's `recent`: OpenVINO compiles kernels
                for each when it first comes, a fraction of a second that a request would wait for.

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
        for height, width in sizes:
            if not (height % policy.stride or width % policy.stride) and max(height, width) <= policy.long_side:
                self.run(np.zeros((1, height, width, 3), np.uint8))
