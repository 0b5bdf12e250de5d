"""The processes that train together: who this one is, and what they do in common."""

import atexit
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Reduce = Callable[[Tensor], Tensor]


def alone(value: Tensor) -> Tensor:
    """One process: the sum, or maximum, over ranks is the value itself."""
    return value


@dataclass(frozen=True)
class Ranks:
    """`add` and `highest` return the elementwise sum and maximum of a tensor over all ranks, on its own device."""

    rank: int = 0
    world: int = 1
    add: Reduce = alone
    highest: Reduce = alone


ALONE = Ranks()


@torch.no_grad()
def average(model: nn.Module, us: Ranks) -> None:
    """Give every rank the mean of the running statistics: without it each rank's teacher would judge by its own."""
    values = [value for value in model.buffers() if value.is_floating_point()]
    if us.world == 1 or not values:
        return
    mean = us.add(torch.cat([value.flatten() for value in values])) / us.world
    for value, part in zip(values, mean.split([value.numel() for value in values]), strict=True):
        value.copy_(part.view_as(value))


def share_batches(module: nn.Module) -> nn.Module:
    """BatchNorm over the images of all ranks, in place where it can be. timm's form: torch's own drops the activations
    that timm's encoders keep inside their BatchNorm."""
    from timm.layers.norm_act import convert_sync_batchnorm  # late: takes seconds, and only CUDA ranks need it

    shared: nn.Module = convert_sync_batchnorm(module)
    return shared


@dataclass(frozen=True)
class Group:
    """The processes that train together, as the trainer uses them; here there is only this one.

    device: where this rank computes; None: the trainer picks.
    """

    ranks: Ranks = ALONE
    device: torch.device | None = None

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over ranks in the backward pass."""
        return module

    def hold(self, wrapped: nn.Module) -> AbstractContextManager[object]:
        """Within it, backward passes of a wrapped module add up gradients without waiting for the other ranks."""
        return nullcontext()

    def barrier(self) -> None:
        """Return when every rank has got here."""


class TorchrunGroup(Group):
    """The processes that `torchrun` started: one a CUDA device (NCCL), or on CPUs (gloo)."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            torch.distributed.init_process_group("nccl", device_id=device)
        else:
            device = torch.device("cpu")
            torch.distributed.init_process_group("gloo")
        atexit.register(torch.distributed.destroy_process_group)

        kinds = torch.distributed.ReduceOp
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        super().__init__(Ranks(rank, world, _over_ranks(kinds.SUM), _over_ranks(kinds.MAX)), device)

    @property
    def _device_ids(self) -> list[torch.device] | None:
        return [self.device] if self.device is not None and self.device.type == "cuda" else None

    def wrap(self, module: nn.Module) -> nn.Module:
        if self._device_ids is not None:
            module = share_batches(module)
        return DistributedDataParallel(module, device_ids=self._device_ids)

    def hold(self, wrapped: nn.Module) -> AbstractContextManager[object]:
        held: AbstractContextManager[object] = wrapped.no_sync()  # type: ignore[operator]  # DDP, perhaps compiled
        return held

    def barrier(self) -> None:
        torch.distributed.barrier(device_ids=None if self._device_ids is None else [torch.cuda.current_device()])


def _over_ranks(kind: torch.distributed.ReduceOp.RedOpType) -> Reduce:
    def reduce(value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total, kind)
        return total

    return reduce


SINGLE = Group()


def connect() -> Group:
    """The processes that `torchrun` started; this one alone where it did not."""
    return TorchrunGroup() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SINGLE
