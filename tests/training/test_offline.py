"""Labels that the champion gives once, before a training that starts from it."""

import numpy as np
import pytest
import torch
from tiny_samples import Memory

from tests.training import test_train
from tests.training.test_train import data_of
from training import infer, offline, train
from training.data import Batches
from training.refine import margin, refine

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
    label_HW = offline.sure_labels(logits_KHW, 0.3, 255)
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


def test_images_come_with_the_models_labels_and_only_where_it_is_sure():
    pool = Memory(4, 1)
    pool.samples[2].image_HWC[:] = 90  # grey: no class leads anywhere
    model = Colours().train()
    made = offline.relabel(model, pool, range(3), least=0.2, ignore=255, stride=16)
    assert model.training
    assert [row.name for row in made.rows] == ["1-0", "1-1"]
    assert len(made) == 2
    for i in range(2):
        sample = made[i]
        assert torch.equal(sample.image_HWC, pool[i].image_HWC)
        logits_KHW = infer.logits_of(model, pool[i].image_HWC, 16)
        refined = refine(torch.softmax(logits_KHW, 0)[None])
        wanted = torch.where(margin(refined)[0] >= 0.2, refined.argmax(1)[0], 255)
        assert sample.label_HW.dtype == torch.int32
        assert torch.equal(sample.label_HW, wanted.int())


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


def test_without_an_offline_image_the_batches_are_the_plain_ones():
    plain = Batches(Memory(5, 1), Memory(9, 2), (3, 3), seed=0)
    none = offline.Relabelled(Memory(1, 3))
    assert len(none) == 0
    other = Batches(Memory(5, 1), Memory(9, 2), (3, 3), seed=0, offline=none)
    assert [plain.get(s, True, True).names for s in range(3)] == [other.get(s, True, True).names for s in range(3)]


@pytest.mark.parametrize("least", [0.0, None])
def test_the_champion_that_training_starts_from_gives_them(project, tmp_path, least):
    params, rows = project
    params = params.model_copy(update={"train": params.train.model_copy(update={"offline": least})})
    path = test_train.champion(tmp_path, rows, ["f" * 64])
    ready = train.prepare(params, data_of(rows), path)
    if least is None:
        assert (ready.offline, ready.batches.offline) == (None, None)
        return
    unlabelled = [row for row in rows if row.split == "unlabelled"]
    assert ready.offline == len(unlabelled) == 3
    assert [row.id for row in ready.batches.offline.rows] == [row.id for row in unlabelled]
    sample = ready.batches.offline[1]
    logits_KHW = infer.logits_of(ready.model.eval(), sample.image_HWC, params.input.stride)
    assert torch.equal(sample.label_HW, refine(torch.softmax(logits_KHW, 0)[None]).argmax(1)[0].int())
    assert train.prepare(params, data_of(rows), None).offline is None  # a first training has nobody to ask
    _, result = test_train.fit(params, data_of(rows), tmp_path / "w", path)
    assert all(v.isfinite().all() for v in result.teacher.values())
