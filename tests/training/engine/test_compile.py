"""`train.compile: true` trains the same network: torch.compile against the plain run."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import tiny_settings
from tests.support.training.tiny_samples import Memory
from training.engine import trainer
from training.engine.data import Batches
from training.methods import registry

# What inductor calls on a CPU.
READY = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()


class Halved(nn.Module):
    """Convolutions at half the size, upsampled: the gradient that inductor has had wrong."""

    def __init__(self):
        super().__init__()
        self.net = nn.Module()
        self.net.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(8, 3, 1)
        self.register_buffer("scale", torch.tensor(255.0))

    def forward(self, image_BCHW):
        logits = self.head(self.net.encoder(image_BCHW / self.scale))
        return F.interpolate(logits, image_BCHW.shape[-2:], mode="bilinear")


def fit(work, **changes):
    config = tiny_settings.train(
        method="fixmatch", fixmatch={"threshold": 0.0}, steps=3, warmup_steps=0, ramp_steps=1,
        optimizer={"lr_warmup": 1}, batch_labelled=2,
        batch_unlabelled=2, crop=(16, 16), **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model, method = Halved(), registry.build(config, n_classes=3, total=3, epoch_steps=2)
    before = model.head.weight.detach().clone()
    batches = Batches(Memory(4, 1), Memory(5, 2), (2, 2), 0)
    task = trainer.Task(
        model, method, batches, n_classes=3, ignore=255, identity={"run": "compiled"}, validate=lambda _: 1.0
    )
    result = trainer.Trainer(task, config, log_every=1, work=work).train()
    return result, before


@pytest.mark.skipif(not READY, reason="inductor needs a C++ compiler and Python's headers, and one of them is missing")
@pytest.mark.slow
def test_a_compiled_student_learns_what_a_plain_one_learns(tmp_path):
    (plain, before), (compiled, _) = (fit(tmp_path / str(c), compile=c) for c in (False, True))
    for one, two in zip(plain.history, compiled.history, strict=True):
        assert two == pytest.approx(one, rel=1e-4, nan_ok=True)
    assert list(compiled.student) == list(plain.student)
    moved = (plain.student["head.weight"] - before).abs().max()
    assert (plain.student["head.weight"] - compiled.student["head.weight"]).abs().max() < 0.01 * moved
