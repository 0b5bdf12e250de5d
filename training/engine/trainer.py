"""The training loop, to be read from top to bottom: `train` calls `train_step`, which calls `forward_backward_step`.

Device, precision, schedule, guards and resume are here; what a method does is in `training.methods.step`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pipeline import stage
from pipeline.config import Train
from training import inference
from training.engine import checkpoint, distributed, ema, guards, schedule
from training.engine.data import Batch, Batches
from training.engine.device import arithmetic, autocast, bits_repeat
from training.engine.rare_crops import RareCrops
from training.engine.train_state import Best, Progress
from training.engine.views import Cropper, uncut
from training.methods.pseudo_label_stats import PseudoLabels
from training.methods.registry import Method
from training.methods.step import SemiSupervisedStep, StepResult, Views
from training.methods.student import student_of
from training.methods.threshold import ClassMax


class Interrupted(stage.Interrupted):
    """SIGTERM arrived; the state is saved and the same command resumes. Exit code 75 (EX_TEMPFAIL)."""


@dataclass(frozen=True)
class Task:
    """What is trained, by which method and on what.

    identity: everything that shapes the run; keys the checkpoint.
    validate: teacher -> mIoU on val in percent; called every `val_every` steps and at the end, on every rank.
    stride: the network takes images whose sides are multiples of it (`input.stride`), under `teacher_view: whole`.
    rare: places part of the labelled crops; None: chance places all of them.
    """

    model: nn.Module
    method: Method
    batches: Batches
    n_classes: int
    ignore: int
    identity: dict[str, Any]
    validate: Callable[[nn.Module], float]
    stride: int = 32
    rare: RareCrops | None = None


@dataclass(frozen=True)
class Event:
    """Handed to `on_log`: the step just done and named numbers, means since the last event."""

    step: int
    values: dict[str, float]


@dataclass
class Result:
    """Weights of the last step, and of the best teacher on val if there was a validation; a row per log line."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    best: dict[str, Tensor] | None
    best_step: int | None
    history: list[dict[str, float]]


class Trainer:
    """Trains a task for `config.steps` steps, resuming from the work folder where a checkpoint of the same run lies.

    Every step draws its randomness from (seed, step, rank) alone, so k + m steps equal k steps, a kill, and m steps.

    Args:
        work: where the checkpoint lies; None: a folder of its own for each identity.
        group: the processes that train together; rank 0 writes.
        on_log: called every `log_every` steps, and for the steps of a resumed history.
    Raises:
        student.NoFeatures: the method needs feature maps and the network has none.
    """

    def __init__(
        self,
        task: Task,
        config: Train,
        *,
        work: Path | None = None,
        group: distributed.Group = distributed.SINGLE,
        on_log: Callable[[Event], None] = lambda _: None,
        log_every: int = 10,
    ) -> None:
        self.task, self.config = task, config
        self.group, self.ranks = group, group.ranks
        self.on_log, self.log_every = on_log, log_every
        self.path = (work or checkpoint.folder(task.identity)) / "checkpoint.pt"
        self.device = group.device or inference.device()

        self.method = task.method
        if task.method.table_K is not None:
            self.method = replace(task.method, table_K=task.method.table_K.to(self.device))
        self.student = student_of(task.model, self.method, task.n_classes)
        self.student.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.teacher = ema.teacher_of(task.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = schedule.optimiser(task.model, self.student.head, config)

        self.progress = Progress()
        self.pseudo_labels = PseudoLabels(task.n_classes, self.device, self.ranks)
        self.finite = guards.Finite(self.student, self.device)
        self.collapse = guards.Collapse(config.collapse.steps, config.collapse.share)
        self.cropper = Cropper(config, task.ignore, self.device, task.rare)

    def train(self) -> Result:
        """Train to the last step.

        Raises:
            guards.TrainingStopped: too many non-finite steps in a row, or collapsed pseudo-labels. Interrupted: SIGTERM.
            checkpoint.CheckpointError: the checkpoint is another run's, or not the same on every machine.
        """
        self.resume()
        self.step = self._compose_step()
        self.average = ema.Average(self.teacher, self.task.model)

        repeat = bits_repeat(self.config, self.device)
        with arithmetic(repeat), guards.SigtermNotice() as notice, checkpoint.Writer() as self.writer:
            while not self.finished:
                done = self.train_step()
                if self.finished or self.progress.step % self.log_every == 0:
                    self.log(done)
                if self._told_to_stop(notice):
                    self.save_and_wait()
                    raise Interrupted(
                        f"told to stop at step {self.progress.step}; the state is in {self.path}; the same command resumes"
                    )
                if self.progress.step % self.config.checkpoint_every == 0 and not self.finished:
                    self.save()

        self.task.batches.close()
        best = self.progress.best
        return Result(_copy(self.task.model), _copy(self.teacher), best.weights, best.step, self.progress.history)

    def train_step(self) -> StepResult:
        """One batch: crops, gradients, optimiser, teacher, and what the pseudo-labels did."""
        at = self.progress.step
        generator = self._seed(at)
        batch = self.task.batches.get(at, self._uses_unlabelled(at), self._uses_unlabelled(at + 1))
        views = self.cropper.views(batch, generator, partner=self.method.partner == "same")

        schedule.set_learning_rate(self.optimizer, schedule.learning_rate(at, self.config))
        self.finite.before_step(at, batch.names)
        done = self.forward_backward_step(batch, views, generator)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optimizer.clip_norm)
        self.finite.after_backward(done.loss, norm, self.optimizer, self.ranks)
        self.optimizer.step()

        distributed.average(self.student, self.ranks)
        self.average.update(ema.decay_at(at, self.config.ema))
        if done.selection is not None and views.unlabelled is not None:
            seen = views.unlabelled
            self.pseudo_labels.add(done.selection, seen.valid_BHW, seen.label_BHW, self.task.ignore)
        self.progress.add(done)
        return done

    def forward_backward_step(self, batch: Batch, views: Views, generator: Generator) -> StepResult:
        """Fresh gradients of the student from one batch."""
        at = self.progress.step
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config, self.device):
            if self.config.teacher_view == "whole" and views.unlabelled is not None:
                views = replace(views, uncut_BCHW=uncut(self.teacher, batch.unlabelled, self.task.stride))
            weight = schedule.unsup_weight(at, self.config)
            return self.step(views, at - self.config.warmup_steps, weight, generator)

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.config.steps

    def _compose_step(self) -> SemiSupervisedStep:
        wrapped = self.group.wrap(self.student)
        if self.config.compile:
            wrapped.compile()
        return SemiSupervisedStep(
            self.method, wrapped, self.teacher, self.task.ignore, self.config.cutmix, self.config.accumulate, self.group
        )

    def _uses_unlabelled(self, at: int) -> bool:
        return self.method.threshold is not None and schedule.unsup_weight(at, self.config) > 0

    def _seed(self, at: int) -> Generator:
        """Seed this step's dropout; returns the generator of its views and boxes."""
        seed = ((self.config.seed * 1_000_003 + at) * 2 * self.ranks.world) + 2 * self.ranks.rank
        torch.manual_seed(seed)
        return torch.Generator().manual_seed(seed + 1)

    # Logging and validation

    def log(self, done: StepResult) -> None:
        """Add the means since the last line to the history, validate when it is due, and stop a run that goes wrong."""
        at = self.progress.step
        factor = schedule.learning_rate(at - 1, self.config)
        row = {"step": float(at), "lr": factor * self.config.optimizer.lr, **self.progress.take_means(done)}
        self._check_finite()

        trouble = None
        if done.selection is not None:
            report = self.pseudo_labels.fetch()
            row |= report.row(schedule.unsup_weight(at - 1, self.config))
            trouble = self.collapse.look(report, self.log_every)

        due = at >= self.config.val_every and at % self.config.val_every < self.log_every
        if due or self.finished:
            row["val_miou"] = self.validate()
        self.progress.history.append(row)
        if self.ranks.rank == 0:
            self.on_log(Event(at, row))
        if trouble is not None:
            self.save_and_wait()
            raise guards.TrainingStopped(f"step {at}: {trouble}. The last weights are in {self.path}")

    def validate(self) -> float:
        """The teacher's mIoU on val in percent; its weights are kept if it is the best so far."""
        miou = self.task.validate(self.teacher)
        if miou > self.progress.best.miou:
            self.progress.best = Best(miou, self.progress.step, _copy(self.teacher))
        return miou

    def _check_finite(self) -> None:
        try:
            self.finite.check(self.path)
        except guards.TrainingStopped:
            self.save_and_wait()
            raise

    def _told_to_stop(self, notice: guards.SigtermNotice) -> bool:
        """Several ranks look at one common step: the notice may reach one of them a step before the others."""
        if self.ranks.world == 1:
            return notice.arrived
        if self.progress.step % self.log_every:
            return False
        return bool(self.ranks.highest(torch.tensor(float(notice.arrived), device=self.device)))

    # Resuming

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {
            "student": self.student,
            "teacher": self.teacher,
            "optimizer": self.optimizer,
            "progress": self.progress,
            "pseudo_labels": self.pseudo_labels,
            "finite": self.finite,
            "collapse": self.collapse,
        }
        if isinstance(self.method.threshold, ClassMax):
            parts["threshold"] = self.method.threshold
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs. All ranks call it together: some of it is summed over them."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def resume(self) -> None:
        """Go on from the checkpoint of the same run, if there is one, and log its history again."""
        state = checkpoint.load(self.path, self.task.identity)
        at = torch.tensor([0 if state is None else state["step"]], device=self.device)
        if int(self.ranks.highest(at)) != -int(self.ranks.highest(-at)):
            raise checkpoint.CheckpointError(
                f"{self.path}: the processes find different checkpoints; machines that train together need one shared "
                "project folder"
            )
        if state is None:
            return
        self.load_state_dict(state)
        for row in self.progress.history:
            self.on_log(Event(int(row["step"]), row))

    def save(self) -> None:
        """Hand the state to the writer thread; training goes on as soon as it has been copied."""
        state = {"identity": checkpoint.describe(self.task.identity), "step": self.progress.step, **self.state_dict()}
        if self.ranks.rank == 0:
            self.writer.save(self.path, state)

    def save_and_wait(self) -> None:
        """As `save`; no rank returns before the state is on disk."""
        self.save()
        self.writer.wait()
        self.group.barrier()


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
