"""Cells of the evidence: how they are written, which are left to do, and that a real one is trained and kept."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import evidence, seeds
from benchmarks.evidence import Cell
from pipeline import config

ROOT = Path(__file__).parents[2]


def test_cells_are_read_with_their_settings() -> None:
    text = "# first the ceiling\n\nmsrc21 seed0/1_8 ceiling 0 1000\nccp seed1/1_32 s4mc:s4mc.alpha_end=0.2,ema=0.9 2 50 test\n"
    ceiling, ours = evidence.parse(text)
    assert ceiling == Cell("msrc21", "seed0/1_8", "ceiling", 0, 1000, "val")
    assert ours.named == {
        "data": "ccp", "split": "seed1/1_32", "seed": 2, "steps": 50, "on": "test", "method": "s4mc",
        "settings": {"s4mc.alpha_end": "0.2", "ema": "0.9"},
    }  # fmt: skip


def test_the_published_form_keeps_its_name_and_settings() -> None:
    (cell,) = evidence.parse("msrc21 seed0/1_8 s4mc-paper:ema=0.9 0 1000")
    params = seeds.variant(config.load(ROOT / "params.yaml"), cell.trained, cell.seed).train
    assert cell.named["method"] == "s4mc-paper"
    assert (params.method, params.s4mc.preset, params.s4mc.alpha, params.s4mc.alpha_end) == ("s4mc", "paper", 0.4, 0.0)
    assert params.ema == 0.9


@pytest.mark.parametrize("line", ["msrc21 seed0/1_8 ceiling 0", "msrc21 seed0/1_8 ceiling zero 10", "a b c 0 1 train"])
def test_a_line_that_is_no_cell_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        evidence.parse(f"# cells\n{line}\n")


def test_only_cells_without_a_row_are_left() -> None:
    cells = evidence.parse("a s fixmatch 0 5\na s fixmatch:ema=0.9 0 5\na s fixmatch 0 5\na s fixmatch 0 5 test\n")
    row = {**cells[0].named, "miou": 1.0, "commit": "abc"}
    assert evidence.missing(cells, [row]) == [cells[1], cells[3]]


@pytest.mark.slow
def test_a_cell_is_trained_scored_and_kept(tmp_path: Path) -> None:
    data = tmp_path / "data/tiny"
    _write(data, {"labelled": 2, "unlabelled": 2, "val": 2, "test": 1})
    cells = tmp_path / "cells.txt"
    cells.write_text("tiny seed0/half fixmatch:warmup_steps=1,ramp_steps=1,batch_labelled=2,batch_unlabelled=2 0 3\n")
    command = [
        sys.executable, ROOT / "benchmarks/evidence.py", "--data", tmp_path / "data", "--work", tmp_path / "work",
        "--cells", cells, "--out", tmp_path / "out.json",
    ]  # fmt: skip

    for _ in range(2):  # the second run has nothing left to do
        subprocess.run(command, check=True, cwd=tmp_path)
        (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["labels"] == 2
    assert 0 <= row["miou"] <= 100
    assert row["commit"]


def _write(folder: Path, counts: dict[str, int]) -> None:
    """A data set of random images of two classes, and its lists."""
    rng = np.random.default_rng(0)
    names: dict[str, list[str]] = {}
    for part, count in counts.items():
        names[part] = [f"{part}{i}" for i in range(count)]
        for name in names[part]:
            for kind in ("images", "masks"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)).save(folder / f"images/{name}.png")
            Image.fromarray(rng.integers(0, 2, (96, 96), np.uint8)).save(folder / f"masks/{name}.png")

    (folder / "classes.txt").write_text("one\ntwo\n")
    lists = folder / "splits/seed0/half"
    lists.mkdir(parents=True)
    for path, part in (
        (lists / "labeled.txt", "labelled"), (lists / "unlabeled.txt", "unlabelled"),
        (folder / "val.txt", "val"), (folder / "test.txt", "test"),
    ):  # fmt: skip
        path.write_text("\n".join(names[part]) + "\n")
