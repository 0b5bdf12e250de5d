"""What of NVIDIA's is on this machine: driver, cards, and the Python modules of TensorRT.

Nothing of it is imported before `load` is called. The report of `look` goes into the export report.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel, ConfigDict, computed_field

# The full TensorRT builds engines for server cards; `tensorrt_rtx` has the same Python interface for RTX cards.
MODULES = ("tensorrt", "tensorrt_rtx")
# The module comes from packages named after the CUDA version, with or without the metapackage of its own name.
_PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13"),
}
DRIVER, MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"


class EngineError(RuntimeError):
    """No engine can be built or used; the message says what is missing, or names the file and the node at fault."""


class Installation(BaseModel):
    """What was looked for and what came of it. `modules` are TensorRT's Python modules with their versions."""

    model_config = ConfigDict(frozen=True)

    cards: tuple[str, ...]
    modules: dict[str, str]
    looked_for: dict[str, str]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def usable(self) -> bool:
        """Engines need a card and a module."""
        return bool(self.cards and self.modules)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def says(self) -> str:
        if not self.cards:
            return "no card present: no engine built; the bundle's ONNX runs on the CPU"
        if not self.modules:
            return f"{self.cards[0]} present, but no TensorRT module: install the extra `gpu`"
        modules = ", ".join(f"{name} {version}" for name, version in self.modules.items())
        return f"{self.cards[0]} with {modules}: engines can be built here"


@dataclass(frozen=True)
class Card:
    """What an engine is built for: `compute_capability` as "9.0", `driver` as "580.65.06", "unknown" if nobody says."""

    name: str
    compute_capability: str
    driver: str


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
def look() -> Installation:
    """Look for a card (driver, then nvidia-smi, device files) and a TensorRT module; never raises, imports none of them."""
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
    return Installation(cards=tuple(cards), modules=modules, looked_for=looked)


def load() -> ModuleType:
    """The first of `MODULES` that can be imported. Raises EngineError with each one's reason when none can."""
    reasons = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # installed without its libraries, it fails as it likes
            reasons.append(f"{name}: {error}")
    raise EngineError(f"no TensorRT module can be imported ({'; '.join(reasons)}); install the extra `gpu`")
