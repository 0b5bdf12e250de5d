"""Labels that the champion gives once, before a training that starts from it."""

import numpy as np
import pytest
import torch

from tests.support.training.tiny_samples import Memory
from tests.training import test_train
from tests.training.test_train import data_of
from training import inference, train
from training.engine.data import Batches
from training.methods import pseudo_labels
from training.methods.s4mc import margin, refine
from training.methods.step import SemiSupervisedStep

project = test_train.project


class Colours(torch.nn.Module):
    """Scores are the channels: red is class 0, green 1, blue 2."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 40))

    def forward(self, image_BCHW):
        return image_BCHW * self.scale


def test_a_pixel_has_the_refined_class_where_its_lead_is_large_enough():
    logits_KHW = torch.randn(4, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = (logits_KHW.exp() / logits_KHW.exp().sum(0)).numpy()
    label_HW = pseudo_labels.sure_labels(logits_KHW, 0.3, 255)
    found = set()
    for y in range(9):
        for x in range(7):
            near = [
                share[:, v, u] for v in range(max(0, y - 1), min(9, y + 2)) for u in range(max(0, x - 1), min(7, x + 2))
                if (v, u) != (y, x)
            ]  # fmt: skip
            best = np.max(near, axis=0)  # the paper's event union with the most supportive of the 8 neighbours
            joined = share[:, y, x] + best - share[:, y, x] * best
            second, first = np.sort(joined)[-2:]
            if abs(first - second - 0.3) > 1e-5:
                assert label_HW[y, x] == (joined.argmax() if first - second >= 0.3 else 255)
                found.add(label_HW[y, x] == 255)
    assert found == {True, False}


def test_images_come_with_the_models_labels_where_it_is_sure(tmp_path):
    pool = Memory(4, 1)
    pool.samples[2].image_HWC[:] = 90  # grey: no class leads anywhere
    model, kept = Colours().train(), tmp_path / "work" / "offline.npz"
    made = pseudo_labels.relabel(model, pool, 3, least=0.2, ignore=255, stride=16, kept=kept)
    assert model.training
    assert [row.name for row in made.rows] == ["1-0", "1-1", "1-2"]
    assert len(made) == 3
    for i in range(3):
        sample = made[i]
        assert torch.equal(sample.image_HWC, pool[i].image_HWC)
        logits_KHW = inference.logits_of(model, pool[i].image_HWC, 16)
        refined = refine(torch.softmax(logits_KHW, 0)[None])
        wanted = torch.where(margin(refined)[0] >= 0.2, refined.argmax(1)[0], 255)
        assert sample.label_HW.dtype == torch.int32
        assert torch.equal(sample.label_HW, wanted.int())
        assert (wanted == 255).any()
        assert (wanted != 255).any() == (i != 2)
    again = pseudo_labels.relabel(None, pool, 3, least=0.2, ignore=255, stride=16, kept=kept)  # nobody is asked
    assert all(torch.equal(again[i].label_HW, made[i].label_HW) for i in range(3))


def test_half_of_each_labelled_batch_is_of_the_offline_images():
    """Each once before any twice, and a step's batch is the same from wherever one begins."""
    batches = Batches(Memory(5, 1), Memory(9, 2), (4, 3), seed=0, offline=Memory(6, 3))
    seen = [batches.get(step, True, True) for step in range(3)]
    assert [[name[0] for name in batch.names] for batch in seen] == [list("1133222")] * 3
    assert sorted(name for batch in seen for name in batch.names if name[0] == "3") == [f"3-{i}" for i in range(6)]
    assert [len(batch.labelled) for batch in seen] == [4] * 3
    again = Batches(Memory(5, 1), Memory(9, 2), (4, 3), seed=0, offline=Memory(6, 3))
    assert again.get(2, True, False).names == seen[2].names
    two = [Batches(Memory(5, 1), Memory(9, 2), (4, 3), 0, rank, 2, Memory(6, 3)).get(0, True, False) for rank in (0, 1)]
    offline_names = [name for batch in two for name in batch.names if name[0] == "3"]
    assert len(set(offline_names)) == 4  # ranks share one order


def test_few_offline_images_have_their_share_alone():
    batches = Batches(Memory(50, 1), Memory(9, 2), (4, 3), seed=0, offline=Memory(1, 3))
    assert [name[0] for name in batches.get(0, True, False).names] == list("1111222")
    batches = Batches(Memory(18, 1), Memory(9, 2), (4, 3), seed=0, offline=Memory(6, 3))
    assert [name[0] for name in batches.get(0, True, False).names] == list("1113222")


def test_without_an_offline_image_the_batches_are_the_plain_ones():
    plain = Batches(Memory(5, 1), Memory(9, 2), (3, 3), seed=0)
    none = pseudo_labels.Relabelled(Memory(1, 3), [])
    assert len(none) == 0
    other = Batches(Memory(5, 1), Memory(9, 2), (3, 3), seed=0, offline=none)
    assert [plain.get(s, True, True).names for s in range(3)] == [other.get(s, True, True).names for s in range(3)]


@pytest.fixture
def asked(project, tmp_path):
    """(params that ask for it, rows, the champion to start from)."""
    params, rows = project
    params = params.model_copy(update={"train": params.train.model_copy(update={"offline": 0.15})})
    return params, rows, test_train.champion(tmp_path, rows, ["f" * 64])


def test_the_champion_that_training_starts_from_gives_them(asked, project):
    params, rows, path = asked
    ready = train.prepare(params, data_of(rows), path)
    unlabelled = [row for row in rows if row.split == "unlabelled"]
    assert ready.offline == len(unlabelled) == 3
    assert [row.id for row in ready.task.batches.offline.rows] == [row.id for row in unlabelled]
    sure = []
    for sample in (ready.task.batches.offline[i] for i in range(3)):
        logits_KHW = inference.logits_of(ready.task.model.eval(), sample.image_HWC, params.input.stride)
        assert np.array_equal(sample.label_HW, pseudo_labels.sure_labels(logits_KHW, 0.15, 255))
        sure.append((sample.label_HW != 255).float().mean().item())
    assert 0 < sum(sure) < 3  # the bar matters
    assert train.prepare(params, data_of(rows), None).offline is None  # a first training has nobody to ask
    assert train.prepare(project[0], data_of(rows), path).offline is None  # nobody asked for it


def test_a_resumed_run_ends_as_an_undisturbed_one(asked, tmp_path, monkeypatch):
    params, rows, path = asked
    _, whole = test_train.fit(params, data_of(rows), tmp_path / "whole", path)

    class Killed(Exception):
        pass

    real, count = SemiSupervisedStep.__call__, [0]

    def dying(*arguments, **options):
        count[0] += 1
        if count[0] == 4:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(SemiSupervisedStep, "__call__", dying)
    with pytest.raises(Killed):
        test_train.fit(params, data_of(rows), tmp_path / "cut", path)
    monkeypatch.setattr(SemiSupervisedStep, "__call__", real)
    monkeypatch.setattr(pseudo_labels, "sure_labels", None)  # they are there already
    _, rest = test_train.fit(params, data_of(rows), tmp_path / "cut", path)
    assert all(torch.equal(value, rest.teacher[key]) for key, value in whole.teacher.items())
