"""The training loop: device, precision, schedule, guards and resume; the method's step is in `methods`."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Train
from training import augment, checkpoint, ema, methods
from training.augment import View
from training.data import Batches, Sample
from training.diagnostics import PseudoLabels
from training.models import Segmenter

MAX_BAD_STEPS = 5


class TrainingStopped(RuntimeError):
    """Training cannot go on (non-finite loss); the message gives the reason and where the last good weights are."""


class Interrupted(RuntimeError):
    """SIGTERM arrived; the state is saved and the same command resumes. Exit code 75 (EX_TEMPFAIL)."""


@dataclass(frozen=True)
class Event:
    """Handed to `on_log`: the step just done and named numbers, means since the last event."""

    step: int
    values: dict[str, float]


@dataclass
class Result:
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    best: dict[str, Tensor] | None
    best_step: int | None
    history: list[dict[str, float]]


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(config: Train, device: torch.device) -> torch.autocast:
    """bf16 where it pays: on a CUDA card that has it. On CPU `auto` means fp32 (the backward of depthwise convolutions
    gains nothing there: 0.78 s against 0.79 s a step for the default network); ask for bf16 by name to have it."""
    wanted = config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def learning_rate(step: int, config: Train) -> float:
    """Factor in (0, 1] on the base rates: linear warm-up, then (1 - t)^poly_power over the remaining steps."""
    if step < config.lr_warmup:
        return (step + 1) / (config.lr_warmup + 1)
    done = (step - config.lr_warmup) / max(1, config.steps - config.lr_warmup)
    return float((1 - done) ** config.poly_power)


def optimiser(model: Segmenter, config: Train) -> torch.optim.AdamW:
    encoder = list(model.net.encoder.parameters())
    known = {id(p) for p in encoder}
    head = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": encoder, "lr": config.lr_encoder}, {"params": head, "lr": config.lr}]
    for group in groups:
        group["base"] = group["lr"]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def unsup_weight(step: int, config: Train) -> float:
    """0 in the warm-up, then a linear ramp of `ramp_steps` up to `unsup_weight`."""
    since = step - config.warmup_steps
    if since < 0:
        return 0.0
    return config.unsup_weight * min(1.0, (since + 1) / max(1, config.ramp_steps))


@contextmanager
def _on_sigterm() -> Iterator[Callable[[], bool]]:
    """Within the block, tells whether SIGTERM has arrived (a spot notice) instead of dying by it."""
    arrived: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    except ValueError:  # not the main thread: signals are someone else's business
        yield lambda: False
        return
    try:
        yield lambda: bool(arrived)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _arithmetic(deterministic: bool) -> Iterator[None]:
    """Within the block: denormals are zero (a CPU run can slow down many times over without), and on a CPU bits repeat.

    On CUDA some backward passes (bilinear upsampling) have no deterministic form: seeds are fixed, bits are not.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid: a pass over every new tensor
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(before)


def _view(samples: list[Sample], config: Train, ignore: int, device: torch.device, generator: torch.Generator) -> View:
    image, label, sizes = augment.stack([s.image_HWC for s in samples], [s.label_HW for s in samples], ignore)
    return augment.crop(image.to(device), label.to(device), sizes, config.crop, config.scale, ignore, generator)


def fit(
    model: Segmenter,
    batches: Batches,
    method: methods.Method,
    config: Train,
    *,
    n_classes: int,
    ignore: int,
    identity: dict[str, Any],
    validate: Callable[[nn.Module], float],
    on_log: Callable[[Event], None] = lambda _: None,
    log_every: int = 10,
    work: Path | None = None,
) -> Result:
    """Train `model` for `config.steps` steps, resuming from the work folder where a checkpoint of the same run lies.

    Every step draws its randomness from (seed, step) alone, so k + m steps equal k steps, a kill, and m steps.

    Args:
        identity: everything that shapes the run; keys the checkpoint.
        validate: teacher -> mIoU on val in percent; called every `val_every` steps and at the end.
        on_log: called every `log_every` steps, and for the steps of a resumed history.
    Raises:
        TrainingStopped: MAX_BAD_STEPS non-finite steps in a row. Interrupted: SIGTERM.
    """
    device = pick_device()
    model.to(device, memory_format=torch.channels_last).train()
    teacher = ema.teacher_of(model).to(memory_format=torch.channels_last)
    optimizer = optimiser(model, config)
    seen = PseudoLabels(n_classes, device)
    best: tuple[float, int | None, dict[str, Tensor] | None] = (-1.0, None, None)
    history: list[dict[str, float]] = []
    path = (work or checkpoint.folder(identity)) / "checkpoint.pt"
    running: list[Tensor] = []
    start, bad = 0, 0
    if (state := checkpoint.load(path, identity)) is not None:
        model.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        seen.counts, seen.bars = state["seen"]["counts"].to(device), state["seen"]["bars"].to(device)
        best = (state["best"]["miou"], state["best"]["step"], state["best"]["weights"])
        start, bad, history = state["step"], state["bad"], state["history"]
        running = [values.to(device) for values in state["running"]]
        for row in history:
            on_log(Event(int(row["step"]), row))

    def save(step: int) -> None:
        state = {
            "identity": checkpoint_identity,
            "step": step,
            "bad": bad,
            "student": model.state_dict(),
            "teacher": teacher.state_dict(),
            "optimizer": optimizer.state_dict(),
            "seen": {"counts": seen.counts, "bars": seen.bars},
            "best": {"miou": best[0], "step": best[1], "weights": best[2]},
            "history": history,
            "running": running,
        }
        checkpoint.save(path, state)

    checkpoint_identity = checkpoint.describe(identity)
    with _arithmetic(config.deterministic and device.type == "cpu"), _on_sigterm() as told_to_stop:
        for step in range(start, config.steps):
            weight = unsup_weight(step, config)
            semi = method.threshold is not None and weight > 0
            torch.manual_seed(_mix(config.seed, step))  # dropout
            generator = torch.Generator().manual_seed(_mix(config.seed, step) + 1)  # views
            next_semi = method.threshold is not None and unsup_weight(step + 1, config) > 0
            batch = batches.get(step, semi, next_semi)
            labelled = _view(batch.labelled, config, ignore, device, generator)
            unlabelled = _view(batch.unlabelled, config, ignore, device, generator) if semi else None
            factor = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
            buffers = [value.clone() for value in model.buffers()]  # BatchNorm's statistics move in the forward pass
            with autocast(config, device):
                done = methods.step(
                    method, model, teacher, labelled, unlabelled,
                    ignore=ignore, at=step - config.warmup_steps, unsup_weight=weight, cutmix=config.cutmix,
                    generator=generator,
                )  # fmt: skip
            loss = done.loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if math.isfinite(float(norm)) and math.isfinite(float(loss.detach())):
                optimizer.step()
                ema.update(teacher, model, ema.decay_at(step, config.ema))
                bad = 0
            else:
                bad += 1
                for value, good in zip(model.buffers(), buffers, strict=True):
                    value.copy_(good)
                if bad >= MAX_BAD_STEPS:
                    save(step)
                    raise TrainingStopped(
                        f"the loss or its gradient was not finite for {bad} steps in a row, the last at step {step} on "
                        f"{', '.join(batch.names)}; the last good weights are in {path}. Lower train.lr, or set "
                        "train.precision: fp32"
                    )
            if done.selection is not None and unlabelled is not None:
                seen.add(done.selection, unlabelled.valid_BHW, unlabelled.label_BHW, ignore)
            running.append(torch.stack([t.mean().detach() for t in done.losses.values()]))
            last = step + 1 == config.steps
            if (step + 1) % log_every == 0 or last:
                row = {"step": float(step + 1), "lr": factor * config.lr, **_mean_losses(running, done)}
                if semi:
                    report = seen.fetch()
                    row |= {
                        "kept": report.kept, "precision": report.precision, "threshold": report.bar,
                        "top_class": report.top_class, "unsup_weight": weight,
                        **{f"kept_{i}": v for i, v in enumerate(report.kept_K)},
                        **{f"precision_{i}": v for i, v in enumerate(report.precision_K)},
                    }  # fmt: skip
                due = step + 1 >= config.val_every and (step + 1) % config.val_every < log_every
                if due or last:
                    row["val_miou"] = validate(teacher)
                    if row["val_miou"] > best[0]:
                        best = (row["val_miou"], step + 1, _copy(teacher))
                history.append(row)
                running.clear()
                on_log(Event(step + 1, row))
            if told_to_stop():
                save(step + 1)
                raise Interrupted(f"told to stop at step {step + 1}; the state is in {path}; the same command resumes")
            if (step + 1) % config.checkpoint_every == 0 and not last:
                save(step + 1)
    batches.close()
    return Result(_copy(model), _copy(teacher), best[2], best[1], history)


def _mix(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) * 2


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


def _mean_losses(running: list[Tensor], done: methods.Step) -> dict[str, float]:
    names = list(done.losses)
    same = [values for values in running if len(values) == len(names)]
    means = torch.stack(same).mean(0).tolist()
    return {f"loss_{name}": value for name, value in zip(names, means, strict=True)}
