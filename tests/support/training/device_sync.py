"""A guard for code that must never wait for the device: it fails on any operator whose result the host has to see."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Fails on operators that wait, and records the numel of the largest float tensor made."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "equal" or any(wait in name for wait in self.WAITS):
            raise AssertionError(f"{name} waits for the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            picked = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in picked):
                raise AssertionError(f"{name} with a boolean index waits for the device")
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and "expand" not in name:
                self.largest = max(self.largest, tensor.numel())
        return out
