"""Checkpoints: whole or absent, written beside the training, and never a mixture of two steps."""

import threading

import pytest
import torch

from training.engine import checkpoint


def test_a_torn_checkpoint_write_leaves_the_last_good_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"identity": checkpoint.describe({"a": 1}), "step": 1})

    def torn(value, handle):
        handle.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"identity": "", "step": 2})
    monkeypatch.undo()
    assert checkpoint.load(path, {"a": 1})["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_holds_the_moment_of_saving_not_that_of_writing(tmp_path, monkeypatch):
    """Training goes on, in place, while the file is being written."""
    path, may_write, real = tmp_path / "checkpoint.pt", threading.Event(), checkpoint.save

    def late(path, state):
        assert may_write.wait(30)
        real(path, state)

    monkeypatch.setattr(checkpoint, "save", late)
    weight, history = torch.zeros(5), [{"step": 1.0}]
    state = {"identity": checkpoint.describe({}), "net": {"w": weight}, "list": [weight], "history": history}
    with checkpoint.Writer() as writer:
        writer.save(path, state)
        assert not path.exists()
        weight += 1
        history.append({"step": 2.0})
        history[0]["step"] = 3.0
        may_write.set()
    found = checkpoint.load(path, {})
    assert found["net"]["w"].tolist() == found["list"][0].tolist() == [0.0] * 5
    assert found["history"] == [{"step": 1.0}]


def test_a_write_that_failed_is_told_at_the_next_save_and_at_the_end(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "checkpoint.pt"
    with checkpoint.Writer() as writer:
        writer.save(path, {"step": 1})
        with pytest.raises(OSError, match="file"):
            writer.save(path, {"step": 2})
    with pytest.raises(OSError, match="file"), checkpoint.Writer() as writer:
        writer.save(path, {"step": 3})


def test_saves_are_written_in_order(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with checkpoint.Writer() as writer:
        for step in range(5):
            writer.save(path, {"identity": checkpoint.describe({}), "step": step})
    assert checkpoint.load(path, {})["step"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
