"""TensorRT: is there a card and a module that can use it, what sizes an engine takes, and ONNX bytes -> engine bytes.

`tensorrt` (11 and later) and `tensorrt_rtx` have one Python interface, so everything here takes the imported module as
an argument. Neither is imported before `load` is called. The report of `look` goes into the export report.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from export.bundle.manifest import INPUT
from export.runtime import batches
from pipeline.imaging import resize

# The full TensorRT builds engines for server cards; `tensorrt_rtx` has the same Python interface for RTX cards.
MODULES = ("tensorrt", "tensorrt_rtx")
# The module comes from packages named after the CUDA version, with or without the metapackage of its own name.
_PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13"),
}
DRIVER, MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"
# tf32 is the fp32 graph with products rounded to 10 bits of mantissa; elsewhere only the graph's own types decide.
PRECISIONS = ("fp32", "tf32", "fp16", "int8")
RECIPE = 1  # part of an engine's key: raise it when `build` makes another engine of the same arguments
SCRATCH = 4 << 30  # bytes a layer may use for scratch; without a limit the builder may take the whole card
_CHANNELS = 3
_log = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """No engine can be built or used; the message says what is missing, or names the file and the node at fault."""


@dataclass(frozen=True)
class Found:
    """What was looked for and what came of it; `usable` needs a card and a module."""

    cards: tuple[str, ...]
    modules: dict[str, str]
    looked_for: dict[str, str]

    @property
    def usable(self) -> bool:
        return bool(self.cards and self.modules)

    def as_dict(self) -> dict[str, Any]:
        if not self.cards:
            says = "no card present: no engine built; the bundle's ONNX runs on the CPU"
        elif not self.modules:
            says = f"{self.cards[0]} present, but no TensorRT module: install the extra `gpu`"
        else:
            modules = ", ".join(f"{name} {version}" for name, version in self.modules.items())
            says = f"{self.cards[0]} with {modules}: engines can be built here"
        return {
            "usable": self.usable,
            "cards": list(self.cards),
            "modules": self.modules,
            "looked_for": self.looked_for,
            "says": says,
        }


@dataclass(frozen=True)
class Card:
    """What an engine is built for: `compute_capability` as "9.0", `driver` as "580.65.06", "unknown" if nobody says."""

    name: str
    compute_capability: str
    driver: str


@dataclass(frozen=True)
class Profile:
    """Images x height x width (pixels) an engine takes: the smallest, the most usual (kernels are chosen for it), the
    largest; heights and widths are multiples of `stride`. Raises ValueError when they are not, or do not rise.
    """

    stride: int
    min_NHW: tuple[int, int, int]
    opt_NHW: tuple[int, int, int]
    max_NHW: tuple[int, int, int]

    def __post_init__(self) -> None:
        for low, usual, high in zip(self.min_NHW, self.opt_NHW, self.max_NHW, strict=True):
            if not 1 <= low <= usual <= high:
                raise ValueError(f"profile sizes must rise: {self.min_NHW}, {self.opt_NHW}, {self.max_NHW}")
        if any(side % self.stride for shape in (self.min_NHW, self.opt_NHW, self.max_NHW) for side in shape[1:]):
            raise ValueError(f"profile heights and widths must be multiples of {self.stride}: {self}")

    @classmethod
    def of(cls, *, long_side: int, stride: int, max_batch: int | None = None, opt_batch: int = 1) -> "Profile":
        """Every size that `pipeline.imaging.resize` can make (pixels), in batches up to `max_batch`, else to `most_images`.

        Chosen for `opt_batch` photographs of 4:3 at full size: serving runs images one by one as they come.
        Raises ValueError for sizes below 1 or `opt_batch` above `max_batch`.
        """
        usual = resize.plan(3 * long_side, 4 * long_side, long_side=long_side, stride=stride)
        largest = resize.plan(long_side, long_side, long_side=long_side, stride=stride)
        return cls(
            stride,
            (1, stride, stride),
            (opt_batch, usual.padded_height, usual.padded_width),
            (max_batch or batches.most_images(long_side), largest.padded_height, largest.padded_width),
        )

    def check(self, shape_NHW: tuple[int, ...]) -> None:
        """Raises ValueError that names the axis and the bound which `shape_NHW` breaks."""
        for axis, size, low, high in zip(
            ("batch", "height", "width"), shape_NHW, self.min_NHW, self.max_NHW, strict=True
        ):
            if size < low:
                raise ValueError(f"{axis} {size} is below the engine's smallest, {low}")
            if size > high:
                raise ValueError(f"{axis} {size} is above the engine's largest, {high}; build for larger inputs")
            if axis != "batch" and size % self.stride:
                raise ValueError(f"{axis} {size} is not a multiple of {self.stride}; use pipeline.imaging.resize")


def _ask_driver() -> tuple[ctypes.CDLL, list[ctypes.c_int]]:
    """(the CUDA driver, its devices). Raises OSError without a driver or when it refuses."""
    driver, count = ctypes.CDLL(DRIVER), ctypes.c_int()
    if code := driver.cuInit(0):
        raise OSError(f"cuInit answered {code}")
    if code := driver.cuDeviceGetCount(ctypes.byref(count)):
        raise OSError(f"cuDeviceGetCount answered {code}")
    handles = [ctypes.c_int() for _ in range(count.value)]
    for index, handle in enumerate(handles):
        driver.cuDeviceGet(ctypes.byref(handle), index)
    return driver, handles


def _card_name(driver: ctypes.CDLL, handle: ctypes.c_int) -> str:
    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGetName(name, len(name), handle)
    return name.value.decode()


def _cards_by_driver() -> list[str]:
    """Card names from the CUDA driver itself. Raises OSError without a driver or when it finds no device."""
    driver, handles = _ask_driver()
    return [_card_name(driver, handle) for handle in handles]


def _driver_version(driver: ctypes.CDLL) -> str:
    """The driver's own version from NVML, else the CUDA version it supports."""
    text, number = ctypes.create_string_buffer(96), ctypes.c_int()
    try:
        management = ctypes.CDLL(MANAGEMENT)
        if management.nvmlInit_v2() == 0 and management.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode()
    except (OSError, AttributeError):
        pass
    return f"CUDA {number.value}" if driver.cuDriverGetVersion(ctypes.byref(number)) == 0 else "unknown"


def card() -> Card:
    """The first card that this process may use; it is the one CUDA takes. Raises EngineError when there is none."""
    try:
        driver, handles = _ask_driver()
    except OSError as error:
        raise EngineError(f"no card to build an engine for ({error}); choose the provider 'cpu'") from error
    if not handles:
        raise EngineError("the CUDA driver lists no card; check CUDA_VISIBLE_DEVICES, or choose the provider 'cpu'")
    parts = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR in cuda.h
        value = ctypes.c_int()
        if code := driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handles[0]):
            raise EngineError(f"cuDeviceGetAttribute answered {code}; check the driver with nvidia-smi")
        parts.append(str(value.value))
    return Card(_card_name(driver, handles[0]), ".".join(parts), _driver_version(driver))


def _cards_by_tool() -> list[str]:
    """Lines of `nvidia-smi -L`. Raises OSError when the tool is absent or fails."""
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        raise OSError(f"nvidia-smi -L left with {done.returncode}")
    return [line.split(":", 1)[1].split("(")[0].strip() for line in done.stdout.splitlines() if line.startswith("GPU ")]


def _ask(source: Callable[[], list[str]]) -> tuple[list[str], str]:
    try:
        cards = source()
    except (OSError, subprocess.SubprocessError) as error:
        return [], f"not found: {error}"
    return cards, f"found: {', '.join(cards)}" if cards else "answers, but lists no card"


def _version(name: str) -> str:
    for package in _PACKAGES[name]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


@functools.cache
def look() -> Found:
    """Look for a card (driver, then nvidia-smi, device files) and for a TensorRT module; never raises, imports none
    of them.
    """
    by_driver, said_driver = _ask(_cards_by_driver)
    by_tool, said_tool = _ask(_cards_by_tool)
    devices = sorted(p.name for p in Path("/dev").glob("nvidia[0-9]*"))
    looked = {
        f"CUDA driver {DRIVER}": said_driver,
        "nvidia-smi -L": said_tool,
        "device files /dev/nvidia0..": f"found: {', '.join(devices)}" if devices else "not found",
    }
    modules = {}
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            looked[f"Python module {name}"] = "not found"
            continue
        modules[name] = _version(name)
        looked[f"Python module {name}"] = f"found: {modules[name]}"
    # Where the driver answers, it knows: nvidia-smi also lists cards that CUDA_VISIBLE_DEVICES hides.
    cards = by_driver if by_driver or "answer" in said_driver else by_tool
    return Found(tuple(cards), modules, looked)


def load() -> ModuleType:
    """The first of `MODULES` that can be imported. Raises EngineError with each one's reason when none can."""
    reasons = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # installed without its libraries, it fails as it likes
            reasons.append(f"{name}: {error}")
    raise EngineError(f"no TensorRT module can be imported ({'; '.join(reasons)}); install the extra `gpu`")


def logger(module: Any) -> Any:
    """TensorRT's messages into our log: warnings and worse; `complaints` keeps the text of the errors.

    It must live as long as anything made with it.
    """

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.complaints: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = int(severity)  # 0 internal error, 1 error, 2 warning, 3 info, 4 verbose
            if level <= 1:
                self.complaints = [*self.complaints[-9:], message]
            if level <= 2:
                _log.log(logging.ERROR if level <= 1 else logging.WARNING, "%s: %s", module.__name__, message)

    return Log()


@dataclass(frozen=True)
class Built:
    """A serialised engine, and the timings of kernels that make the next build on this card faster (may be empty)."""

    engine: bytes
    timings: bytes


def build(
    module: Any, model: bytes, *, precision: str, profile: Profile, name: str = "model.onnx", timings: bytes = b""
) -> Built:
    """Build an engine for the card at hand (`tensorrt_rtx` needs none: it finishes the kernels when it loads one).

    Args:
        model: ONNX with its weights inside: uint8 NHWC `image` -> uint8 NHW `label`, `confidence`.
        precision: one of `PRECISIONS`. It changes the build only between fp32 and tf32; types come from the graph.
        name: what error messages call the model.
        timings: `Built.timings` of an earlier build on an equal card; anything unusable is ignored by TensorRT.

    Raises:
        EngineError: unknown precision, or the graph cannot be parsed or built; names `name`, and the node where
            TensorRT tells it.
    """
    if precision not in PRECISIONS:
        raise EngineError(f"{name}: unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    log = logger(module)
    builder = module.Builder(log)
    # Every network of version 11 is strongly typed; 10 must be told.
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, log)
    if not parser.parse(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = [f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors]
        raise EngineError(f"{name}: TensorRT cannot read the graph: {'; '.join(said) or 'no reason given'}")
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    if inputs != [INPUT]:
        raise EngineError(f"{name}: has inputs {inputs}, not only {INPUT!r}; export it again")
    config = builder.create_builder_config()
    if precision != "tf32":  # on unless switched off; fp32 is to agree with ONNX Runtime
        config.clear_flag(module.BuilderFlag.TF32)
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, SCRATCH)
    sizes = builder.create_optimization_profile()
    sizes.set_shape(INPUT, *((*shape, _CHANNELS) for shape in (profile.min_NHW, profile.opt_NHW, profile.max_NHW)))
    config.add_optimization_profile(sizes)
    timed = module.__name__ != "tensorrt_rtx"  # there these calls do nothing and are deprecated since 1.2
    if timed:
        config.set_timing_cache(config.create_timing_cache(timings), ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"{name}: no engine can be built: {'; '.join(log.complaints) or 'TensorRT gave no reason'}")
    return Built(bytes(engine), bytes(config.get_timing_cache().serialize()) if timed else b"")
