"""The training loop: device, precision, schedule, guards and resume; the method's step is in `step`."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import stage
from pipeline.config import Train
from training import inference
from training.engine import checkpoint, distributed, ema, guards, schedule, train_state
from training.engine.data import Batches, Sample
from training.methods import augment, corrmatch
from training.methods.augment import View
from training.methods.pseudo_label_stats import PseudoLabels
from training.methods.registry import Method
from training.methods.step import Step, step
from training.methods.student import NoFeatures, Student


class Interrupted(stage.Interrupted):
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
    image, label = augment.send(image, device), augment.send(label, device)
    return augment.crop(image, label, sizes, config.crop, config.scale, ignore, generator)


@torch.no_grad()
def uncut(teacher: nn.Module, samples: list[Sample], stride: int) -> Tensor:
    """logits_BCHW of the whole images, each answered for as at test time, padded right/bottom with 0 to the largest."""
    maps = [inference.logits_of(teacher, sample.image_HWC, stride) for sample in samples]
    height, width = (max(logits.shape[axis] for logits in maps) for axis in (1, 2))
    out = torch.zeros(len(maps), len(maps[0]), height, width, device=maps[0].device)
    for i, logits in enumerate(maps):
        out[i, :, : logits.shape[1], : logits.shape[2]] = logits
    return out


def student_of(model: nn.Module, method: Method, n_classes: int) -> Student:
    """The network with the head that the method asks for. Raises NoFeatures where the network hides its features."""
    needs = method.correlation is not None or method.feature_dropout != "none"
    if needs and not getattr(model, "has_features", False):
        raise NoFeatures(
            f"train.method needs feature maps and {type(model).__name__} gives logits only; choose supervised, fixmatch "
            "or s4mc, or give the network encode(image) and decode(features, size)"
        )
    if method.correlation is None:
        return Student(model)
    channels: Any = model.channels
    return Student(model, corrmatch.Head(channels, n_classes))


def fit(
    model: nn.Module,
    batches: Batches,
    method: Method,
    config: Train,
    *,
    n_classes: int,
    ignore: int,
    identity: dict[str, Any],
    validate: Callable[[nn.Module], float],
    on_log: Callable[[Event], None] = lambda _: None,
    log_every: int = 10,
    stride: int = 32,
    work: Path | None = None,
    group: distributed.Group = distributed.SINGLE,
) -> Result:
    """Train `model` for `config.steps` steps, resuming from the work folder where a checkpoint of the same run lies.

    Every step draws its randomness from (seed, step, rank) alone, so k + m steps equal k steps, a kill, and m steps.

    Args:
        identity: everything that shapes the run; keys the checkpoint.
        validate: teacher -> mIoU on val in percent; called every `val_every` steps and at the end, on every rank.
        on_log: called every `log_every` steps, and for the steps of a resumed history.
        stride: the network takes images whose sides are multiples of it (`input.stride`), under `teacher_view: whole`.
        group: the processes that train together; rank 0 writes.
    Raises:
        guards.TrainingStopped: too many non-finite steps in a row, or collapsed pseudo-labels. Interrupted: SIGTERM.
        student.NoFeatures.
    """
    device, us = group.device or pick_device(), group.ranks
    student = student_of(model, method, n_classes)
    student.to(device, memory_format=torch.channels_last).train()
    teacher = ema.teacher_of(model).to(memory_format=torch.channels_last)
    optimizer = schedule.optimiser(model, student.head, config)
    seen, finite = PseudoLabels(n_classes, device), guards.Finite(student, device)
    collapse = guards.Collapse(config.collapse.steps, config.collapse.share)
    path = (work or checkpoint.folder(identity)) / "checkpoint.pt"
    parts: dict[str, Any] = {"student": student, "teacher": teacher, "optimizer": optimizer}
    if method.table_K is not None:
        method = replace(method, table_K=method.table_K.to(device))
    now = train_state.restore(path, identity, parts, method, seen, finite, collapse, device, us)
    for row in now.history:
        on_log(Event(int(row["step"]), row))
    whole = group.wrap(student)
    if config.compile:
        whole.compile()
    average = ema.Average(teacher, model)

    def save(last: bool = False) -> None:
        state = train_state.state(identity, now, parts, method, seen, finite, collapse, us)
        if us.rank == 0:
            writer.save(path, state)
        if last:
            writer.wait()
            group.barrier()  # nobody leaves before the state is safe

    def backward(loss: Tensor) -> None:
        with torch.autocast(device.type, enabled=False):  # operators go back in the precision they came in
            loss.backward()

    # Not with torch.compile: in 2.13 inductor's gradient of a bilinear upsampling is 0 in deterministic mode.
    repeats = config.deterministic and device.type == "cpu" and not config.compile
    with _arithmetic(repeats), _on_sigterm() as told_to_stop, checkpoint.Writer() as writer:
        for at in range(now.step, config.steps):
            weight = schedule.unsup_weight(at, config)
            semi = method.threshold is not None and weight > 0
            seed = ((config.seed * 1_000_003 + at) * 2 * us.world) + 2 * us.rank
            torch.manual_seed(seed)  # dropout
            generator = torch.Generator().manual_seed(seed + 1)  # views
            batch = batches.get(at, semi, method.threshold is not None and schedule.unsup_weight(at + 1, config) > 0)
            labelled = _view(batch.labelled, config, ignore, device, generator)
            unlabelled = _view(batch.unlabelled, config, ignore, device, generator) if semi else None
            twins = semi and method.partner == "same"
            partner = _view(batch.unlabelled, config, ignore, device, generator) if twins else None
            factor = schedule.learning_rate(at, config)
            for rate in optimizer.param_groups:
                rate["lr"] = rate["base"] * factor
            finite.before_step(at, batch.names)
            optimizer.zero_grad(set_to_none=True)
            with autocast(config, device):
                wide = semi and config.teacher_view == "whole"
                done = step(
                    method, whole, teacher, labelled, unlabelled,
                    ignore=ignore, at=at - config.warmup_steps, unsup_weight=weight, cutmix=config.cutmix,
                    generator=generator, partner=partner, chunks=config.accumulate, ranks=us,
                    uncut_BCHW=uncut(teacher, batch.unlabelled, stride) if wide else None,
                    backward=backward, hold=lambda: group.hold(whole),
                )  # fmt: skip
            norm = nn.utils.clip_grad_norm_(student.parameters(), config.optimizer.clip_norm)
            finite.after_backward(done.loss, norm, optimizer, us)
            optimizer.step()
            distributed.average(student, us)
            average.update(ema.decay_at(at, config.ema))
            if done.selection is not None and unlabelled is not None:
                seen.add(done.selection, unlabelled.valid_BHW, unlabelled.label_BHW, ignore)
            now.running.append(torch.stack([t.mean().detach().float() for t in done.losses.values()]))
            now.step = at + 1
            last = now.step == config.steps
            if now.step % log_every == 0 or last:
                row = {"step": float(now.step), "lr": factor * config.optimizer.lr, **_mean_losses(now.running, done)}
                now.running.clear()
                try:
                    finite.check(path)
                except guards.TrainingStopped:
                    save(last=True)
                    raise
                trouble = None
                if semi:
                    report = seen.fetch(us)
                    row |= {
                        "kept": report.kept, "precision": report.precision, "threshold": report.bar,
                        "top_class": report.top_class, "unsup_weight": weight,
                        **{f"kept_{i}": v for i, v in enumerate(report.kept_K)},
                        **{f"precision_{i}": v for i, v in enumerate(report.precision_K)},
                    }  # fmt: skip
                    trouble = collapse.look(report, log_every)
                due = now.step >= config.val_every and now.step % config.val_every < log_every
                if due or last:
                    row["val_miou"] = validate(teacher)
                    if row["val_miou"] > now.best.miou:
                        now.best = train_state.Best(row["val_miou"], now.step, _copy(teacher))
                now.history.append(row)
                if us.rank == 0:
                    on_log(Event(now.step, row))
                if trouble is not None:
                    save(last=True)
                    raise guards.TrainingStopped(f"step {now.step}: {trouble}. The last weights are in {path}")
            # Several ranks look at one common step: the notice may reach one of them a step before the others.
            if us.world > 1 and now.step % log_every == 0:
                stop = bool(us.highest(torch.tensor(float(told_to_stop()), device=device)))
            else:
                stop = us.world == 1 and told_to_stop()
            if stop:
                save(last=True)
                raise Interrupted(f"told to stop at step {now.step}; the state is in {path}; the same command resumes")
            if now.step % config.checkpoint_every == 0 and not last:
                save()
    batches.close()
    return Result(_copy(model), _copy(teacher), now.best.weights, now.best.step, now.history)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


def _mean_losses(running: list[Tensor], done: Step) -> dict[str, float]:
    names = list(done.losses)
    same = [values for values in running if len(values) == len(names)]
    means = torch.stack(same).mean(0).tolist()
    return {f"loss_{name}": value for name, value in zip(names, means, strict=True)}
