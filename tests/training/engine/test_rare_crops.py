"""Crops placed by class: rare classes come more often, and the crop holds the pixel that was drawn."""

import pytest
import torch

from tests.training import test_train
from tests.training.test_train import data_of
from training import train
from training.engine.rare_crops import RareCrops, rare_crops
from training.methods import augment

project = test_train.project


def label_map():
    """120 x 160: class 0, but a row of class 1, 4 pixels of class 2, and ignored ones."""
    label_HW = torch.zeros(120, 160, dtype=torch.int32)
    label_HW[60] = 1
    label_HW[100:102, 10:12] = 2
    label_HW[:, 159] = 255
    return label_HW


def test_classes_are_drawn_by_one_over_the_root_of_their_pixels():
    label_HW = label_map()
    rare = rare_crops(1.0, [label_HW, label_HW], 4)
    counts = [2 * int((label_HW == k).sum()) for k in range(3)]
    wanted = torch.tensor([*counts, counts[2]], dtype=torch.float64) ** -0.5  # the absent one as the rarest
    assert torch.allclose(rare.weight_K.double(), wanted, rtol=1e-6)

    g = torch.Generator().manual_seed(0)
    centres_B2 = rare.centres([label_HW] * 1200, g).long()
    drawn = torch.bincount(label_HW[centres_B2[:, 0], centres_B2[:, 1]].long(), minlength=4) / 1200
    assert drawn[3] == 0
    assert torch.allclose(drawn[:3].double(), wanted[:3] / wanted[:3].sum(), atol=0.05)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_placed_crops_is_the_one_asked_for(share):
    rare = rare_crops(share, [label_map()], 3)
    placed = rare.centres([label_map()] * 800, torch.Generator().manual_seed(1)).isfinite().all(1)
    assert float(placed.float().mean()) == pytest.approx(share, abs=0.06)


def test_a_map_without_labels_is_left_to_chance():
    rare = RareCrops(1.0, torch.ones(3))
    nothing = torch.full((5, 6), 255, dtype=torch.int32)
    assert rare.centres([nothing], torch.Generator().manual_seed(1)).isnan().all()


def test_each_placed_crop_holds_its_class_wherever_it_lies():
    """At every scale, mirrored or not; without placing, few crops hold the four pixels."""
    label_HW = label_map()
    image_BCHW, label_BHW, sizes = augment.stack(
        [torch.zeros(120, 160, 3, dtype=torch.uint8)] * 200, [label_HW] * 200, 255
    )
    only_the_rarest = RareCrops(1.0, torch.tensor([0.0, 0.0, 1.0]))

    def holding(centres_B2):
        g = torch.Generator().manual_seed(3)
        view = augment.crop(image_BCHW, label_BHW, sizes, (64, 96), (1.0, 2.0), 255, g, centres_B2=centres_B2)
        return (view.label_BHW == 2).flatten(1).any(1).float().mean()

    placed = only_the_rarest.centres([label_HW] * 200, torch.Generator().manual_seed(2))
    assert holding(placed) > 0.97  # a pixel drawn at the very edge may fall between two samples
    assert holding(None) < 0.6
    left_to_chance = torch.full_like(placed, torch.nan)
    assert holding(left_to_chance) < 0.6


def test_training_places_labelled_crops_alone(project, monkeypatch):
    """The setting reaches the labelled views; unlabelled ones stay where chance puts them."""
    params, rows = project
    asked = params.model_copy(update={"train": params.train.model_copy(update={"rare_crops": 1.0})})
    assert train.prepare(params, data_of(rows), None).task.rare is None
    task = train.prepare(asked, data_of(rows), None).task
    counts = sum(
        torch.bincount(label[label != 255].long(), minlength=4) for label in train.labels_of(task.batches.labelled)
    )
    assert torch.allclose(task.rare.weight_K.double(), counts.double() ** -0.5, rtol=1e-6)

    seen = []
    crop = augment.crop

    def watched(*arguments, centres_B2=None, **options):
        seen.append(centres_B2)
        return crop(*arguments, centres_B2=centres_B2, **options)

    monkeypatch.setattr(augment, "crop", watched)
    trainer = train.trainer.Trainer(task, asked.train, work=None)
    batch = task.batches.get(2, True, False)
    trainer.cropper.views(batch, torch.Generator().manual_seed(0), partner=True)
    assert [centres is not None for centres in seen] == [True, False, False]
