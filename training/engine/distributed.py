"""The processes that train together: who this one is, and what they do in common."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

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
    return convert_sync_batchnorm(module)


@dataclass(frozen=True)
class Group:
    """What the engine asks of the processes: a module whose gradients are averaged, backward, and gradients held back.

    device None: the engine picks. hold: within it, backward passes do not wait for the other ranks.
    """

    ranks: Ranks = ALONE
    device: torch.device | None = None
    wrap: Callable[[Any], Any] = lambda module: module
    backward: Callable[[Tensor], None] = lambda loss: loss.backward()
    hold: Callable[[Any], AbstractContextManager[Any]] = lambda module: nullcontext()
    barrier: Callable[[], None] = lambda: None


SINGLE = Group()


def connect() -> Group:
    """The processes that `torchrun` started, joined by Lightning Fabric; this one alone where it did not.

    Fabric is imported only then: it costs five seconds.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return SINGLE
    from lightning_fabric import Fabric

    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    fabric = Fabric(accelerator="auto", devices=per_node, num_nodes=world // per_node, strategy="ddp")
    fabric.launch()

    # Not fabric.all_reduce: it puts a barrier before every sum, and a barrier makes the host wait.
    def reduce(kind: torch.distributed.ReduceOp.RedOpType) -> Reduce:
        def over_ranks(value: Tensor) -> Tensor:
            total = value.clone()
            torch.distributed.all_reduce(total, kind)
            return total

        return over_ranks

    def wrap(module: nn.Module) -> Any:
        return fabric.setup_module(
            share_batches(module) if fabric.device.type == "cuda" else module, move_to_device=False
        )

    kinds = torch.distributed.ReduceOp
    return Group(
        Ranks(fabric.global_rank, fabric.world_size, reduce(kinds.SUM), reduce(kinds.MAX)),
        fabric.device, wrap, fabric.backward, fabric.no_backward_sync, fabric.barrier,
    )  # fmt: skip
