"""Lets torchvision be imported where its compiled half was built for another torch."""

import functools
import importlib.util
from pathlib import Path

import torch

_library: torch.library.Library | None = None  # the operator definitions live as long as this reference


@functools.cache
def ensure_torchvision() -> str:
    """Let `import torchvision` work when its compiled half was built for CUDA but torch was not.

    timm and segmentation_models_pytorch import torchvision for a handful of Python helpers; on a CPU torch that import
    dies because the operators `nms` and `qnms` were never registered. Declaring them (without a kernel) is enough. Only the
    first call in a process does anything.

    Returns:
        "absent" (no torchvision), "native" (its compiled operators load) or "shimmed".
    """
    global _library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "absent"

    compiled = [p for name in ("_C.so", "_C_stable.so") if (p := Path(spec.origin).with_name(name)).exists()]
    if compiled:
        try:
            torch.ops.load_library(str(compiled[0]))
            return "native"
        except OSError:
            pass  # built for CUDA: its libraries are not here

    _library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return "shimmed"
