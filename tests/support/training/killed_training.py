"""Train in children that are killed (SIGKILL) at random moments until one finishes.

argv: the work folder, where to save the finished weights, how many kills.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # the first optimiser step imports it; once here instead of in every child

from tests.support import tiny_settings
from tests.support.training.tiny_network import Featured
from tests.support.training.tiny_samples import Memory
from tests.support.training.tiny_step import only
from training.engine import trainer
from training.engine.data import Batches
from training.methods import registry


def fit(work: Path) -> dict[str, torch.Tensor]:
    config = tiny_settings.train(
        method="s4mc+corrmatch", corrmatch={"start": 0.4}, s4mc_corrmatch=only("refined_selection"), steps=60,
        warmup_steps=4, batch_labelled=2,
        batch_unlabelled=2, crop=(16, 16), val_every=6, checkpoint_every=1, optimizer={"lr_warmup": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Featured()
    method = registry.build(config, n_classes=3, total=56, epoch_steps=4)
    batches = Batches(Memory(4, 1), Memory(7, 2), (2, 2), 0)
    task = trainer.Task(
        model, method, batches, n_classes=3, ignore=255, identity={"run": "killed"},
        validate=lambda m: float(next(m.parameters()).abs().sum()),
    )  # fmt: skip
    result = trainer.Trainer(task, config, log_every=5, work=work).train()
    curve = [[row["step"], row["loss_supervised"], row["val_miou"]] for row in result.history if "val_miou" in row]
    return {**result.student, **{f"teacher.{k}": v for k, v in result.teacher.items()}, "curve": torch.tensor(curve)}


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def main(work: Path, out: Path, kills: int) -> None:
    torch.set_num_threads(1)
    rng, deaths = random.Random(0), 0
    while True:
        before = written(work / "checkpoint.pt")
        child = os.fork()
        if child == 0:
            torch.save(fit(work), out)
            os._exit(0)
        while deaths < kills and written(work / "checkpoint.pt") == before and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.001)  # until it has come a step further; then at any moment of the next steps
        if deaths == kills:
            assert os.waitpid(child, 0)[1] == 0
            break
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        deaths += 1
    print(deaths, torch.load(work / "checkpoint.pt", weights_only=True)["step"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
