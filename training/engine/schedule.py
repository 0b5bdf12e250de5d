"""What changes with the step: learning rate and the weight of the unlabelled half; and the optimiser they act on."""

import torch
from torch import nn

from pipeline.config import Train


def learning_rate(step: int, config: Train) -> float:
    """Factor in (0, 1] on the base rates: linear warm-up, then (1 - t)^poly_power over the remaining steps."""
    if step < config.optimizer.lr_warmup:
        return (step + 1) / (config.optimizer.lr_warmup + 1)
    done = (step - config.optimizer.lr_warmup) / max(1, config.steps - config.optimizer.lr_warmup)
    return float((1 - done) ** config.optimizer.poly_power)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate: its `base` rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def unsup_weight(step: int, config: Train) -> float:
    """0 in the warm-up, then a linear ramp of `ramp_steps` up to `unsup_weight`."""
    since = step - config.warmup_steps
    if since < 0:
        return 0.0
    return config.unsup_weight * min(1.0, (since + 1) / max(1, config.ramp_steps))


def optimiser(model: nn.Module, extra: nn.Module | None, config: Train) -> torch.optim.AdamW:
    """AdamW on the encoder at lr_encoder and on everything else (`extra` too) at lr; each group's `base` keeps its rate.

    A network without `net.encoder` trains whole at lr. Fused: one pass over the weights, and a step can be skipped by a
    flag that never leaves the device.
    """
    encoder = getattr(getattr(model, "net", None), "encoder", None)
    first = [] if encoder is None else [p for p in encoder.parameters() if p.requires_grad]
    known = {id(p) for p in first}
    rest = [p for part in (model, extra) if part is not None for p in part.parameters()]
    rest = [p for p in rest if p.requires_grad and id(p) not in known]
    pairs = [(first, config.optimizer.lr_encoder), (rest, config.optimizer.lr)]
    groups = [{"params": params, "lr": lr, "base": lr} for params, lr in pairs if params]
    return torch.optim.AdamW(groups, weight_decay=config.optimizer.weight_decay, fused=True)
