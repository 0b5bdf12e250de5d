"""EMA, resume, guards."""

import math
import os
import signal
from itertools import pairwise

import pytest
import torch
from torch import nn

from pipeline import config
from tests.support import tiny_settings
from tests.support.training import tiny_network
from tests.support.training.tiny_samples import Memory
from training.engine import checkpoint, ema, guards, schedule, trainer
from training.engine.data import Batches, Sample
from training.methods import registry


class Tiny(nn.Module):
    """A network with BatchNorm and dropout, shaped like Segmenter where the engine looks."""

    def __init__(self, k=3):
        super().__init__()
        self.net = nn.Module()
        self.net.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Conv2d(6, k, 1))

    def forward(self, image_BCHW):
        return self.head(self.net.encoder(image_BCHW / 127.5 - 1))


def settings(**changes):
    base = {
        "method": "s4mc", "steps": 12, "batch_labelled": 2, "batch_unlabelled": 3, "crop": (16, 16), "warmup_steps": 3,
        "ramp_steps": 4, "val_every": 4, "checkpoint_every": 1, "optimizer": {"lr_warmup": 2}, "scale": (0.8, 1.2),
    }  # fmt: skip
    return tiny_settings.train(**config.merge(base, changes))


def train_(config, work, *, validate=None, on_log=lambda _: None, model=None, log_every=2, identity=None):
    torch.manual_seed(0)
    model = model or Tiny()
    method = registry.build(config, n_classes=3, total=config.steps - config.warmup_steps, epoch_steps=4)
    batches = Batches(Memory(4, 1), Memory(7, 2), (config.batch_labelled, config.batch_unlabelled), config.seed)
    task = trainer.Task(
        model, method, batches, n_classes=3, ignore=255, identity=identity or {"run": "a"},
        validate=validate or (lambda _: 1.0),
    )  # fmt: skip
    return trainer.Trainer(task, config, on_log=on_log, log_every=log_every, work=work).train()


train = train_


def test_decay_schedule_and_start():
    assert ema.decay_at(0, 0.99) == 0.0
    assert ema.decay_at(1, 0.99) == 0.5
    assert ema.decay_at(10_000, 0.99) == 0.99


def test_average_over_n_steps_equals_the_closed_form_and_integers_are_copied():
    student = Tiny().double()
    teacher = ema.teacher_of(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    name = "net.encoder.0.weight"
    seen = [student.state_dict()[name].clone()]
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        with torch.no_grad():
            for value in student.state_dict().values():
                value.copy_(
                    torch.randn(value.shape, generator=g, dtype=torch.float64)
                    if value.is_floating_point()
                    else value + 300
                )
        ema.Average(teacher, student).update(0.9)
        seen.append(student.state_dict()[name].clone())
    expected = 0.9**6 * seen[0] + sum(0.1 * 0.9 ** (6 - i) * seen[i] for i in range(1, 7))
    assert torch.allclose(teacher.state_dict()[name], expected, atol=1e-12)
    assert (
        teacher.state_dict()["net.encoder.1.num_batches_tracked"]
        == student.state_dict()["net.encoder.1.num_batches_tracked"]
    )
    ema.Average(teacher, student).update(ema.decay_at(0, 0.99))
    for t, s in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.equal(t, s)


class Killed(BaseException):
    """Stands for kill -9: nothing in the engine may catch it and save."""


METHODS = ("supervised", "fixmatch", "s4mc", "unimatch", "s4mc+unimatch", "corrmatch", "s4mc+corrmatch")


@pytest.mark.parametrize(
    ("method", "at"),
    [*((m, 8) for m in METHODS), ("s4mc", 3), ("corrmatch-reference", 8), ("corrmatch", 3), ("unimatch-v1", 8)],
)
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path, method, at):
    """Every method, through its warm-up (a death at 3 precedes the first pseudo-label), with its threshold's state."""
    name, _, kind = method.partition("-")
    extra = {"reference": {"variant": "reference"}}.get(kind, {})
    streams = "v1" if kind == "v1" else "v2"
    config = settings(
        method=name,
        fixmatch={"threshold": 0.4},
        corrmatch={"start": 0.4, "momentum": 0.8, **extra},
        unimatch={"streams": streams},
        checkpoint_every=3,
    )
    make = Tiny if name in ("supervised", "fixmatch", "s4mc") else tiny_network.Featured

    def train(*args, **kwargs):
        torch.manual_seed(0)
        return train_(*args, model=make(), **kwargs)

    whole = train(config, tmp_path / "whole")

    def die(event):
        if event.step >= at:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "cut", on_log=die)
    logged = []
    resumed = train(config, tmp_path / "cut", on_log=lambda e: logged.append(e.step))
    for name in ("student", "teacher", "best"):
        for key, value in getattr(whole, name).items():
            assert torch.equal(value, getattr(resumed, name)[key]), (name, key)
    assert str(resumed.history) == str(whole.history)
    assert logged == [2, 4, 6, 8, 10, 12]


def test_bf16_trains_and_keeps_its_weights_in_fp32(tmp_path):
    result = train(settings(precision="bf16"), tmp_path)
    assert all(v.isfinite().all() for v in result.teacher.values())
    assert {v.dtype for v in result.student.values()} == {torch.float32, torch.int64}
    assert str(result.history) != str(train(settings(), tmp_path / "other").history)


def test_a_collapse_is_counted_across_interruptions(tmp_path):
    config = settings(method="fixmatch", fixmatch={"threshold": 1.0}, steps=40, collapse={"steps": 10}, warmup_steps=0)

    def notice(event):
        if event.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(trainer.Interrupted):
        train(config, tmp_path, on_log=notice)
    with pytest.raises(guards.TrainingStopped, match="step 10"):
        train(config, tmp_path)


def test_nothing_kept_for_long_stops_with_the_reason_and_the_weights(tmp_path):
    config = settings(method="fixmatch", fixmatch={"threshold": 1.0}, steps=40, collapse={"steps": 10}, warmup_steps=0)
    with pytest.raises(guards.TrainingStopped, match=r"step 10: no unlabelled pixel was kept for 10 steps.*s4mc"):
        train(config, tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.pt", {"run": "a"})["step"] == 10


class Sure(Tiny):
    """Answers class 1 everywhere."""

    def forward(self, image_BCHW):
        return super().forward(image_BCHW) + torch.tensor([0.0, 1e4, 0.0]).view(1, 3, 1, 1)


@pytest.mark.parametrize("share", [0.99, 1.0])
def test_one_class_that_takes_over_stops_with_the_reason(tmp_path, share):
    config = settings(method="fixmatch", steps=14, collapse={"steps": 10, "share": share}, warmup_steps=0)
    if share == 1.0:  # the user says that the data is so
        assert train(config, tmp_path, model=Sure()).history[-1]["top_class"] == 1.0
        return
    with pytest.raises(guards.TrainingStopped, match=r"class 1 held over 99\.0% of the kept pixels for 10 steps"):
        train(config, tmp_path, model=Sure())


def test_sigterm_saves_and_says_so(tmp_path):
    config = settings(checkpoint_every=100)
    before = signal.getsignal(signal.SIGTERM)

    def notice(event):
        if event.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(trainer.Interrupted, match="step 6"):
        train(config, tmp_path / "cut", on_log=notice)
    assert signal.getsignal(signal.SIGTERM) is before
    whole, resumed = train(config, tmp_path / "whole"), train(config, tmp_path / "cut")
    assert all(torch.equal(v, resumed.teacher[k]) for k, v in whole.teacher.items())
    assert str(resumed.history) == str(whole.history)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path):
    config = settings(checkpoint_every=2)
    train(config, tmp_path, identity={"classes": 3, "split": "x"})
    with pytest.raises(checkpoint.CheckpointError, match=r"split: 'x' there, 'y' here"):
        train(config, tmp_path, identity={"classes": 3, "split": "y"})


class Broken(Tiny):
    """Answers NaN on chosen calls, after BatchNorm has seen them."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, image_BCHW):
        if self.training:
            self.count += 1
            if self.count in self.calls:
                image_BCHW = image_BCHW * math.nan
        return super().forward(image_BCHW)


def test_non_finite_steps_stop_with_the_images_named_and_the_last_good_weights_saved(tmp_path):
    model = Broken(range(1, 100))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(guards.TrainingStopped, match=r"steps in a row.*1-"):
        train(settings(method="supervised"), tmp_path, model=model)
    kept = checkpoint.load(tmp_path / "checkpoint.pt", {"run": "a"})["student"]
    assert all(torch.equal(v, before[k.removeprefix("model.")]) for k, v in kept.items())


def test_one_non_finite_step_leaves_no_trace_in_any_statistics(tmp_path):
    result = train(settings(method="supervised"), tmp_path, model=Broken({5}))
    for weights in (result.student, result.teacher, result.best):
        assert all(v.isfinite().all() for v in weights.values())


def test_without_a_validation_there_is_no_best(tmp_path):
    result = train(settings(), tmp_path, validate=lambda _: math.nan)
    assert result.best is None
    assert result.best_step is None


def test_learning_rate_and_unsupervised_weight_schedules():
    config = settings(steps=100, optimizer={"lr_warmup": 4}, warmup_steps=10, ramp_steps=5, unsup_weight=2.0)
    rates = [schedule.learning_rate(s, config) for s in range(100)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[52] == pytest.approx(0.5**0.9)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[-1] > 0
    weights = [schedule.unsup_weight(s, config) for s in range(20)]
    assert weights[:10] == [0.0] * 10
    assert weights[10:16] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])


def test_training_learns_and_reports_its_pseudo_labels(tmp_path):
    result = train(settings(steps=60, optimizer={"lr": 1e-2, "lr_encoder": 1e-2}, ema=0.9), tmp_path, log_every=10)
    first, last = result.history[0], result.history[-1]
    assert last["loss_supervised"] < 0.7 * first["loss_supervised"]
    assert 0.5 < last["kept"] <= 1
    assert last["precision"] > 0.6
    assert set(last) >= {"threshold", "kept_0", "kept_2", "precision_1", "val_miou", "loss_unsupervised"}
    assert "kept" not in train(settings(method="supervised"), tmp_path / "s").history[-1]


def test_hidden_labels_measure_but_never_teach(tmp_path):
    """Masks of unlabelled images may be any nonsense: weights are the same, only the measured precision differs."""

    class Nonsense(Memory):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return Sample(sample.image_HWC, torch.full_like(sample.label_HW, 1))

    results = []
    for kind in (Memory, Nonsense):
        torch.manual_seed(0)
        config = settings()
        method = registry.build(config, n_classes=3, total=9, epoch_steps=4)
        batches = Batches(Memory(4, 1), kind(7, 2), (2, 3), 0)
        identity = {"k": kind.__name__}
        task = trainer.Task(Tiny(), method, batches, n_classes=3, ignore=255, identity=identity, validate=lambda _: 1.0)
        results.append(trainer.Trainer(task, config, log_every=2, work=tmp_path / kind.__name__).train())
    honest, nonsense = results
    assert all(torch.equal(v, nonsense.student[k]) for k, v in honest.student.items())
    assert honest.history[-1]["precision"] != nonsense.history[-1]["precision"]
