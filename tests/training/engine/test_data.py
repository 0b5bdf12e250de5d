"""Batches read ahead, and a reader that dies."""

import contextlib
import threading

import pytest

from pipeline.storage import manifest
from tests.support import tiny_project
from tests.support.command_line import marginalia
from tests.support.training.tiny_samples import Memory
from training.engine import checkpoint
from training.engine.data import Batches, Images, ReadError
from training.reader.order import order


def test_batches_read_ahead_gives_the_same_batches():
    batches = Batches(Memory(5, 1), Memory(9, 2), (2, 3), seed=0)
    in_turn = [batches.get(step, True, True).names for step in range(4)]
    fresh = Batches(Memory(5, 1), Memory(9, 2), (2, 3), seed=0)
    assert fresh.get(3, True, False).names == in_turn[3]
    assert fresh.get(1, False, False).names == in_turn[1][:2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Rows of a small project on disk, cwd there, its params.yaml asking for four steps."""
    monkeypatch.chdir(tmp_path)
    rows = tiny_project.write_data(tmp_path, (("labelled", "base", "a", 3), ("unlabelled", "base", "b", 5)))
    settings = {
        "method": "fixmatch", "steps": 4, "warmup_steps": 0, "batch_labelled": 2, "batch_unlabelled": 2,
        "crop": [64, 96], "checkpoint_every": 1,
    }  # fmt: skip
    tiny_project.write_params(tmp_path, train=settings)
    return rows


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error"), KeyError("what")], ids=repr)
def test_a_reader_that_dies_stops_training_with_the_images_name(project, monkeypatch, capsys, error):
    """The first batch is read by the trainer itself; what the reader meets in the next one must reach it."""
    real, blamed = manifest.open_image, []

    def dying(row, *args):
        if threading.current_thread() is not threading.main_thread():
            blamed.append(row)
            raise error
        return real(row, *args)

    monkeypatch.setattr(manifest, "open_image", dying)
    monkeypatch.setattr("sys.argv", ["train"])
    assert marginalia("stage", "train") == 1
    said = capsys.readouterr().err
    (row,) = blamed
    assert f"marginalia: {row.shard} ({row.dump}/{row.name}) cannot be read: {type(error).__name__}" in said
    assert "Traceback" not in said
    (work,) = checkpoint.WORK.iterdir()  # step 0 is done and kept: the same command goes on from there
    assert (work / "checkpoint.pt").exists()


def test_an_error_is_told_again_when_the_image_is_asked_for_again(project, monkeypatch):
    """Nothing half-read is kept, and the next step is read anew by whoever asks."""
    (labelled, pool) = (Images([r for r in project if r.split == s], tiny_project.INPUT, ignore=255, max_pixels=10**6)
                        for s in ("labelled", "unlabelled"))  # fmt: skip
    whole = Batches(labelled, pool, (2, 2), seed=0)
    broken = pool.rows[order(5, 1, 2, 1)[0]]
    real = manifest.open_mask

    def gone(row, *args):
        if row is broken:
            raise FileNotFoundError(2, "No such file or directory", "data/ingested/masks.tar")
        return real(row, *args)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "open_mask", gone)
        whole.get(0, True, True)
        for _ in range(2):
            with pytest.raises(ReadError, match=rf"{broken.name}\) cannot be read: FileNotFoundError .*masks\.tar"):
                whole.get(1, True, True)
    assert broken.name in whole.get(1, True, True).names
    with contextlib.closing(whole):
        assert whole.get(2, True, False).names
