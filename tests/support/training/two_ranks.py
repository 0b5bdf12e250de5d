"""What two processes find together, for test_distributed.py to compare with one. Run by torchrun; rank 0 writes argv[1]."""

import os
import signal
import sys
from pathlib import Path

import torch

from tests.support import tiny_settings
from tests.support.training.tiny_network import Featured, view
from tests.support.training.tiny_samples import Memory
from training.engine import distributed, ema, trainer
from training.engine.data import Batches
from training.engine.validation import Validator
from training.methods import augment, registry, threshold
from training.methods.augment import View
from training.methods.step import SemiSupervisedStep, Views
from training.methods.student import Student

METHODS = {
    "fixmatch": {}, "s4mc": {}, "unimatch": {}, "s4mc ref_a": {"s4mc": {"preset": "ref_a"}},
    "fixmatch ohem": {"supervised_loss": "ohem", "ohem": {"pixels": 150}},
}  # fmt: skip


def half(value: View, us: distributed.Ranks) -> View:
    return View(*(v.chunk(us.world)[us.rank] for v in (value.image_BCHW, value.label_BHW, value.valid_BHW)))


def gradients(name: str, group: distributed.Group) -> dict[str, torch.Tensor]:
    """One step on this rank's part of a common batch, without what is random per rank (views, mixing, dropped channels)."""
    us = group.ranks
    torch.manual_seed(0)
    model = Featured(dropout=0.0, norm=False)
    method = registry.build(
        tiny_settings.train(method=name.split()[0], fixmatch={"threshold": 0.36}, **METHODS[name]),
        n_classes=3,
        total=10,
        epoch_steps=4,
        table_K=torch.tensor([0.9, 0.8, 0.7]),
    )
    method = registry.replace(method, dropout="none")
    whole = group.wrap(Student(model))
    labelled, unlabelled = half(view(4, 1), us), half(view(4, 2), us)
    step = SemiSupervisedStep(method, whole, ema.teacher_of(model), ignore=255, cutmix=0.0, group=group)
    step(Views(labelled, unlabelled), 4, 1.0, torch.Generator().manual_seed(0))
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def together(group: distributed.Group, work: Path) -> dict[str, object]:
    us = group.ranks
    g = torch.Generator().manual_seed(0)
    score, label = torch.rand(6, 9, 7, generator=g), torch.randint(0, 3, (6, 9, 7), generator=g)
    valid = torch.rand(6, 9, 7, generator=g) < 0.7
    valid[3:] &= label[3:] != 2  # the second rank never sees class 2
    mine = [v.chunk(us.world)[us.rank] for v in (score, label, valid)]
    slow = threshold.ClassMax(3, 0.6, 0.9)
    torch.manual_seed(1)
    model = Featured(dropout=0.0)
    augment.strong, keep = (lambda image, generator: image), augment.strong
    found = {name: gradients(name, group) for name in METHODS}
    augment.strong = keep
    images = Memory(7, 3)  # does not divide by two
    out = {
        "quantile": [threshold.quantile(mine[0], mine[2], a, us.add) for a in (0.1, 0.4, 0.9)],
        "class_max": [slow.value(*mine, 0, us) for _ in range(3)],
        "miou": Validator(images, 3, 4, 255, us)(model),
        "gradients": found,
    }
    if us.world > 1:
        result = fit(group, work / "whole")
        flat = torch.cat([v.double().flatten() for k, v in sorted(result.student.items())])
        teacher = torch.cat([v.double().flatten() for k, v in sorted(result.teacher.items())])
        out["apart"] = float(us.highest(flat).sub(-us.highest(-flat)).abs().max())
        out["teachers_apart"] = float(us.highest(teacher).sub(-us.highest(-teacher)).abs().max())
        out["kept"] = result.history[-1]["kept"]
        try:
            fit(group, work / "cut", notice_at_rank=1)
        except trainer.Interrupted as told:
            out["told"] = str(told)
        again = fit(group, work / "cut")
        out["resumed_alike"] = all(torch.equal(v, again.student[k]) for k, v in result.student.items())
        out["histories"] = [str(result.history), str(again.history)]
    return out


def fit(group: distributed.Group, work: Path, notice_at_rank: int = -1) -> trainer.Result:
    """A short CorrMatch run; the spot notice reaches one rank only, at the first validation."""
    us = group.ranks
    config = tiny_settings.train(
        method="corrmatch", corrmatch={"start": 0.4}, steps=8, warmup_steps=2, batch_labelled=2, batch_unlabelled=2,
        crop=(16, 16), val_every=4, checkpoint_every=100, optimizer={"lr_warmup": 2},
    )  # fmt: skip
    torch.manual_seed(us.rank)  # DDP makes them start alike
    method = registry.build(config, n_classes=3, total=6, epoch_steps=4)
    score = Validator(Memory(7, 3), 3, 4, 255, us)

    def validate(teacher: torch.nn.Module) -> float:
        if us.rank == notice_at_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return float(score(teacher))

    batches = Batches(Memory(3, 1), Memory(5, 2), (2, 2), 0, us.rank, us.world)
    task = trainer.Task(
        Featured(), method, batches, n_classes=3, ignore=255, identity={"run": "two"}, validate=validate
    )
    return trainer.Trainer(task, config, log_every=2, work=work, group=group).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = distributed.connect()
    answer = together(group, Path(sys.argv[1]).parent / "work")
    if group.ranks.rank == 0:
        torch.save(answer, sys.argv[1])
    group.barrier()
