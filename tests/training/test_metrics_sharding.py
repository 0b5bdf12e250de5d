"""Several processes, uneven shares, spatially padded inputs: exactly the one-process result."""

import multiprocessing
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import config
from pipeline.storage import manifest
from tests.support import tiny_project
from training import evaluate, inference, metrics
from training.models import segmenter


def part(root: str, rank: int, world: int, size: int) -> list[tuple[str, metrics.Tally]]:
    """One process: its own share of the test split, with one thread so that sums run in the same order everywhere."""
    import os

    os.chdir(root)
    torch.set_num_threads(1)
    model, _ = segmenter.load(Path("models/student/student.safetensors"))
    rows = [r for r in manifest.read(Path("data/split/manifest.parquet")) if r.split == "test"]
    batches = inference.shard(inference.plan_batches(rows, tiny_project.INPUT, size), rank, world)
    how = evaluate.Counting(tiny_project.INPUT, classes=4, ignore=255, distance=2, max_pixels=10**6)
    result = evaluate.score(model, batches, how)
    return [(row.id, tally) for row, tally in zip(result.rows, result.tallies, strict=True)]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_counts(tmp_path: Path) -> None:
    tiny_project.write(tmp_path)
    shares_of = [(2, 3), (5, 8)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        tasks = [(str(tmp_path), 0, 1, size) for _, size in shares_of]
        tasks += [(str(tmp_path), rank, world, size) for world, size in shares_of for rank in range(world)]
        answers = dict(zip(tasks, pool.starmap(part, tasks, chunksize=1), strict=True))
    for world, size in shares_of:
        alone = answers[str(tmp_path), 0, 1, size]
        shares = [answers[str(tmp_path), rank, world, size] for rank in range(world)]
        ids = [id for share in shares for id, _ in share]
        assert len(ids) == len(set(ids)) == 11  # none counted twice to even the shares out
        assert sorted(ids) == sorted(id for id, _ in alone)
        assert len({len(share) for share in shares}) > 1  # the shares really are uneven
        one = reduce(add, (tally for _, tally in alone))
        many = reduce(add, (tally for share in reversed(shares) for _, tally in share))
        for field in ("confusion_KK", "boundary_3K", "calibration_L2"):
            np.testing.assert_array_equal(getattr(one, field), getattr(many, field))
        assert metrics.summary(one) == metrics.summary(many)


def test_padding_is_never_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted pixels are the known pixels of the masks at their own size, though inputs are padded to the stride."""
    tiny_project.write_data(tmp_path, [("test", "base", "a", 4)], size=(50, 70))
    tiny_project.write_student(tmp_path, tiny_project.trained())
    monkeypatch.chdir(tmp_path)
    params: config.Params = tiny_project.write_params(tmp_path)
    model, meta = segmenter.load(Path("models/student/student.safetensors"))
    result = evaluate.score_split(model, meta, "test", params)
    for row, tally in zip(result.rows, result.tallies, strict=True):
        truth = manifest.open_mask(row, 10**6)
        assert truth is not None
        np.testing.assert_array_equal(tally.confusion_KK.sum(1), [(truth == c).sum() for c in range(4)])
        assert tally.calibration_L2.sum() == (truth != 255).sum()
