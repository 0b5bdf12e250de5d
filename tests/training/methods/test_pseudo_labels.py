"""Pseudo-labels that another model made: found, checked, measured, and trained on by their confidence."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.imaging import label_maps, resize
from pipeline.storage import manifest
from tests.support.training.tiny_samples import Memory
from tests.training import test_train
from tests.training.test_train import data_of
from training import train
from training.engine.data import Batches, Sample
from training.engine.views import Cropper
from training.methods import losses
from training.methods.pseudo_labels import Refused

project = test_train.project


def test_half_of_each_labelled_batch_is_of_the_given_images():
    """Each once before any twice, and a step's batch is the same from wherever one begins."""
    batches = Batches(Memory(5, 1), Memory(9, 2), (4, 3), seed=0, given=Memory(6, 3))
    seen = [batches.get(step, True, True) for step in range(3)]
    assert [[name[0] for name in batch.names] for batch in seen] == [list("1133222")] * 3
    assert sorted(name for batch in seen for name in batch.names if name[0] == "3") == [f"3-{i}" for i in range(6)]
    assert [len(batch.labelled) for batch in seen] == [4] * 3
    again = Batches(Memory(5, 1), Memory(9, 2), (4, 3), seed=0, given=Memory(6, 3))
    assert again.get(2, True, False).names == seen[2].names
    two = [Batches(Memory(5, 1), Memory(9, 2), (4, 3), 0, rank, 2, Memory(6, 3)).get(0, True, False) for rank in (0, 1)]
    given_names = [name for batch in two for name in batch.names if name[0] == "3"]
    assert len(set(given_names)) == 4  # ranks share one order


def test_few_given_images_have_their_share_alone():
    batches = Batches(Memory(50, 1), Memory(9, 2), (4, 3), seed=0, given=Memory(1, 3))
    assert [name[0] for name in batches.get(0, True, False).names] == list("1111222")
    batches = Batches(Memory(18, 1), Memory(9, 2), (4, 3), seed=0, given=Memory(6, 3))
    assert [name[0] for name in batches.get(0, True, False).names] == list("1113222")


@pytest.fixture
def asked(project, tmp_path):
    """(params, rows, folder): a mask and a confidence for each unlabelled image, one of which has a hidden label."""
    params, rows = project
    folder = tmp_path / "given"
    rng = np.random.default_rng(3)
    own = next(row for row in rows if row.split == "labelled")
    unlabelled = [row for row in rows if row.split == "unlabelled"]
    for row in unlabelled:
        shape = (row.height, row.width)
        write(folder, row, rng.choice([0, 1, 2, 3, 255], shape), rng.integers(0, 256, shape))

    hidden = {name: getattr(own, name) for name in ("mask_shard", "mask_offset", "mask_length", "mask_digest")}
    same_size = next(row for row in unlabelled if (row.height, row.width) == (own.height, own.width))
    rows = [replace(row, **hidden) if row is same_size else row for row in rows]
    params = params.model_copy(update={"train": params.train.model_copy(update={"pseudo_labels": folder})})
    return params, rows, folder


def write(folder, row, label_HW, confidence_HW=None):
    (folder / f"{row.name}.png").parent.mkdir(parents=True, exist_ok=True)
    (folder / "confidence" / f"{row.name}.png").parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{row.name}.png").write_bytes(label_maps.encode_png(label_HW.astype(np.uint8)))
    if confidence_HW is not None:
        (folder / "confidence" / f"{row.name}.png").write_bytes(label_maps.encode_png(confidence_HW.astype(np.uint8)))


def unlabelled_of(rows):
    return [row for row in rows if row.split == "unlabelled"]


def test_they_are_measured_on_hidden_labels_before_the_first_step(asked, capsys):
    params, rows, folder = asked
    ready = train.prepare(params, data_of(rows), None)
    known = right = weight = right_weight = labelled = pixels = 0
    for row in unlabelled_of(rows):
        label_HW = label_maps.decode_mask((folder / f"{row.name}.png").read_bytes(), max_pixels=1 << 20)
        confidence_HW = label_maps.decode_mask(
            (folder / "confidence" / f"{row.name}.png").read_bytes(), max_pixels=1 << 20
        )
        hidden_HW = manifest.open_mask(row, 1 << 20)
        for y, x in np.ndindex(*label_HW.shape):
            pixels += 1
            labelled += label_HW[y, x] != 255
            if hidden_HW is not None and 255 not in (label_HW[y, x], hidden_HW[y, x]):
                correct = label_HW[y, x] == hidden_HW[y, x]
                known, right = known + 1, right + correct
                weight += int(confidence_HW[y, x])
                right_weight += correct * int(confidence_HW[y, x])

    assert known > 0
    assert ready.given.images == 3
    assert ready.given.coverage == pytest.approx(labelled / pixels)
    assert ready.given.precision == pytest.approx(right / known)
    assert ready.given.weighted_precision == pytest.approx(right_weight / weight)
    said = capsys.readouterr().err
    assert f"3 images, {labelled / pixels:.1%}" in said
    assert f"{right / known:.1%} of the labels are right" in said


def test_without_hidden_labels_there_is_nothing_to_measure_and_that_is_said(asked, capsys):
    params, rows, _ = asked
    bare = [replace(row, mask_shard=None) if row.split == "unlabelled" else row for row in rows]
    assert train.prepare(params, data_of(bare), None).given.precision is None
    assert "nothing to measure them against" in capsys.readouterr().err


def test_a_sample_has_the_masks_of_the_folder_at_working_size(asked):
    params, rows, folder = asked
    images = train.prepare(params, data_of(rows), None).task.batches.given
    assert [row.id for row in images.rows] == [row.id for row in unlabelled_of(rows)]
    for i, row in enumerate(images.rows):
        sample = images[i]
        label_HW = label_maps.decode_mask((folder / f"{row.name}.png").read_bytes(), max_pixels=1 << 20)
        plan = resize.plan(row.height, row.width, long_side=params.input.long_side, stride=params.input.stride)
        wanted = resize.nearest(label_HW, plan.scaled_height, plan.scaled_width)
        assert np.array_equal(sample.label_HW, wanted)
        assert sample.weight_HW.shape == sample.label_HW.shape == sample.image_HWC.shape[:2]


def test_a_folder_per_dump_goes_before_the_common_one(asked):
    params, rows, folder = asked
    row = unlabelled_of(rows)[0]
    (folder / row.dump / row.name).parent.mkdir(parents=True)
    (folder / row.dump / f"{row.name}.png").write_bytes(
        label_maps.encode_png(np.full((row.height, row.width), 2, np.uint8))
    )
    sample = train.prepare(params, data_of(rows), None).task.batches.given[0]
    assert (sample.label_HW == 2).all()
    assert (sample.weight_HW == 255).all()  # it has no confidence of its own


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda label_HW: label_HW[1:], "resize the file"),
        (lambda label_HW: np.full_like(label_HW, 4), "class id 4"),
    ],
    ids=["size", "class"],
)
def test_a_bad_mask_costs_itself_and_is_named(asked, capsys, spoil, word):
    params, rows, folder = asked
    row = unlabelled_of(rows)[1]
    write(folder, row, spoil(np.zeros((row.height, row.width), np.uint8)))
    ready = train.prepare(params, data_of(rows), None)
    assert (ready.given.images, ready.given.refused) == (2, 1)
    said = capsys.readouterr().err
    assert f"{row.name}.png" in said
    assert word in said


def test_masks_that_do_not_decode_are_refused_and_none_left_is_an_error(asked):
    params, rows, folder = asked
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(Refused, match=r"no mask for any of 3 unlabelled images; the first of 3 refused: .*\.png"):
        train.prepare(params, data_of(rows), None)
    for file in folder.rglob("*.png"):
        file.rename(file.with_name(f"other-{file.name}"))
    with pytest.raises(Refused, match=r"the folder holds .*other-.* would be one"):
        train.prepare(params, data_of(rows), None)
    absent = params.model_copy(update={"train": params.train.model_copy(update={"pseudo_labels": folder / "no"})})
    with pytest.raises(Refused, match="no such folder"):
        train.prepare(absent, data_of(rows), None)


def test_changed_masks_are_another_training(asked):
    params, rows, folder = asked
    first = train.prepare(params, data_of(rows), None).task.identity
    assert train.prepare(params, data_of(rows), None).task.identity == first
    row = unlabelled_of(rows)[0]
    write(folder, row, np.zeros((row.height, row.width), np.uint8))
    assert train.prepare(params, data_of(rows), None).task.identity != first


def test_a_training_with_them_learns_and_says_what_it_was_given(asked, tmp_path):
    params, rows, _ = asked
    ready, result = test_train.fit(params, data_of(rows), tmp_path / "with")
    plain = params.model_copy(update={"train": params.train.model_copy(update={"pseudo_labels": None})})
    _, without = test_train.fit(plain, data_of(rows), tmp_path / "without")
    assert any(not torch.equal(value, without.teacher[key]) for key, value in result.teacher.items())
    assert all(value.isfinite().all() for value in result.teacher.values())
    told = train.describe(params, data_of(rows), ready, result, 1.0)
    assert told.pseudo_labels == ready.given
    assert "3 pseudo-labels from outside" in train.table(told).caption


def test_a_crop_cuts_the_weights_as_the_labels(project):
    """Where the weight of a pixel is 50 times its class, it is so in every view, scaled, cut and mirrored."""
    params, _ = project
    g = torch.Generator().manual_seed(5)
    label_HW = torch.randint(1, 4, (70, 90), generator=g, dtype=torch.int32)
    image_HWC = torch.randint(0, 256, (70, 90, 3), generator=g, dtype=torch.uint8)
    samples = [Sample(image_HWC, label_HW, (50 * label_HW).to(torch.uint8)), Sample(image_HWC[:40], label_HW[:40])]
    cropper = Cropper(params.train, 255, torch.device("cpu"))
    view = cropper.crop(samples, g)
    inside = view.valid_BHW
    assert torch.allclose(255 * view.weight_BHW[0][inside[0]], 50.0 * view.label_BHW[0][inside[0]])
    assert (view.weight_BHW[1][inside[1]] == 1).all()
    assert cropper.crop([samples[1]] * 2, g).weight_BHW is None


def test_a_labelled_pixel_counts_its_weight_in_either_supervised_loss():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 4, 4), generator=g)
    label[0, 0] = 255
    weight = torch.rand(2, 4, 4, generator=g)
    log_prob = logits.log_softmax(1)
    known = (label != 255).nonzero().tolist()
    total = sum(-float(weight[b, y, x] * log_prob[b, label[b, y, x], y, x]) for b, y, x in known)
    found = losses.supervised(logits, label, 255, weight_BHW=weight)
    assert found.mean().item() == pytest.approx(total / len(known), rel=1e-5)
    every = losses.hard(logits, label, 255, sure=1.0, least=1, weight_BHW=weight)
    assert every.mean().item() == pytest.approx(total / len(known), rel=1e-5)
