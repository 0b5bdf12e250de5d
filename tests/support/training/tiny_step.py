"""A method by its settings, and one step of it on the small network."""

import torch

from pipeline import config
from tests.support import tiny_settings
from tests.support.training.tiny_network import Featured, view
from training.engine import ema
from training.engine.distributed import SINGLE
from training.methods import registry
from training.methods.step import SemiSupervisedStep, Views
from training.methods.student import student_of

# What s4mc+corrmatch can take of its two methods.
PARTS = ("refined_selection", "falling_quantile", "correlated_neighbours")


def only(*parts):
    """`train.s4mc_corrmatch` with these parts on and the others off."""
    return {name: name in parts for name in PARTS}


def build(n_classes=3, **changes):
    base = {"fixmatch": {"threshold": 0.4}, "corrmatch": {"start": 0.4}}
    settings = tiny_settings.train(**config.merge(base, changes))
    return registry.build(settings, n_classes=n_classes, total=10, epoch_steps=4)


def run(method, *, model=None, chunks=1, at=3, seed=0, hook=lambda s: s, views=None, cutmix=0.9, group=SINGLE):
    """One step on a fresh network; returns the step, the student and its gradients by name."""
    torch.manual_seed(7)
    model = model or Featured()
    trained = student_of(model, method, 3).train()
    teacher = ema.teacher_of(model)
    torch.manual_seed(seed)
    labelled, unlabelled = views or (view(4, 1), view(4, 2))
    partner = view(4, 3) if method.partner == "same" else None
    step = SemiSupervisedStep(method, hook(trained), teacher, ignore=255, cutmix=cutmix, chunks=chunks, group=group)
    done = step(Views(labelled, unlabelled, partner), at, 0.8, torch.Generator().manual_seed(seed))
    return done, trained, {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
