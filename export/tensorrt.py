"""Is there a card, and a TensorRT that can use it? The answer goes into the export report, with everything that was
tried.
"""

import ctypes
import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The full TensorRT builds engines for server cards; `tensorrt_rtx` has the same Python interface for RTX cards.
MODULES = ("tensorrt", "tensorrt_rtx")
DRIVER = "libcuda.so.1"


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


def _cards_by_driver() -> list[str]:
    """Card names from the CUDA driver itself. Raises OSError without a driver or when it finds no device."""
    driver = ctypes.CDLL(DRIVER)
    if code := driver.cuInit(0):
        raise OSError(f"cuInit answered {code}")
    count = ctypes.c_int()
    if code := driver.cuDeviceGetCount(ctypes.byref(count)):
        raise OSError(f"cuDeviceGetCount answered {code}")
    names = []
    for index in range(count.value):
        handle, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        driver.cuDeviceGet(ctypes.byref(handle), index)
        driver.cuDeviceGetName(name, len(name), handle)
        names.append(name.value.decode())
    return names


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
        try:
            modules[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            modules[name] = "of unknown version"
        looked[f"Python module {name}"] = f"found: {modules[name]}"
    return Found(tuple(by_driver or by_tool), modules, looked)
