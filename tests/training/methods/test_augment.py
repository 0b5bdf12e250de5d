"""Views and CutMix: exact copies, boxes shared by everything, padding that never counts."""

import colorsys

import numpy as np
import pytest
import torch

from tests.support import tiny_settings
from training.methods import augment, losses, registry, selection


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(sizes=((7, 9), (5, 4)), seed=0):
    g = generator(seed)
    images = [torch.randint(0, 256, (*s, 3), generator=g, dtype=torch.uint8) for s in sizes]
    labels = [torch.randint(0, 4, s, generator=g, dtype=torch.int32) for s in sizes]
    return images, labels


def test_scale_one_is_a_copy_with_padding_marked():
    images, labels = batch()
    image, label, sizes = augment.stack(images, labels, 255)
    view = augment.crop(image, label, sizes, (8, 10), (1.0, 1.0), 255, generator(), flip=False)
    for i, (h, w) in enumerate([(7, 9), (5, 4)]):
        assert torch.allclose(view.image_BCHW[i, :, :h, :w], images[i].permute(2, 0, 1).float(), rtol=0, atol=1e-3)
        assert torch.equal(view.label_BHW[i, :h, :w], labels[i].long())
        assert view.valid_BHW[i].sum() == h * w
        assert (view.label_BHW[i][~view.valid_BHW[i]] == 255).all()
        assert (view.image_BCHW[i][:, ~view.valid_BHW[i]] == 0).all()


def test_padding_between_images_of_other_sizes_never_bleeds_in():
    images = [torch.full((20, 24, 3), 200, dtype=torch.uint8), torch.full((9, 7, 3), 200, dtype=torch.uint8)]
    labels = [torch.ones(20, 24, dtype=torch.int32), torch.ones(9, 7, dtype=torch.int32)]
    image, label, sizes = augment.stack(images, labels, 255)
    for seed in range(5):
        view = augment.crop(image, label, sizes, (16, 16), (0.6, 1.7), 255, generator(seed))
        inside = view.image_BCHW.permute(0, 2, 3, 1)[view.valid_BHW]
        assert (inside - 200).abs().max() < 1e-2
        assert (view.label_BHW[view.valid_BHW] == 1).all()


def test_crop_windows_and_flips_are_windows_and_flips_of_the_source():
    images, labels = batch(((12, 11),))
    image, label, sizes = augment.stack(images, labels, 255)
    found = set()
    for seed in range(40):
        view = augment.crop(image, label, sizes, (5, 6), (1.0, 1.0), 255, generator(seed))
        got = view.label_BHW[0]
        matches = {
            (y, x, flip)
            for y in range(8)
            for x in range(6)
            for flip in (False, True)
            if torch.equal(
                got, (label[0, y : y + 5, x : x + 6].flip(1) if flip else label[0, y : y + 5, x : x + 6]).long()
            )
        }
        assert len(matches) == 1
        (y, x, flip) = matches.pop()
        window = image[0, :, y : y + 5, x : x + 6].float()
        assert torch.allclose(view.image_BCHW[0], window.flip(2) if flip else window, atol=1e-3)
        found.add((y, x, flip))
    assert len(found) > 20
    assert {f for _, _, f in found} == {False, True}


def test_scaling_matches_pillow_upsampling():
    from PIL import Image

    smooth = np.add.outer(np.arange(8) * 12, np.arange(8) * 15).astype(np.uint8)
    rgb = np.repeat(smooth[..., None], 3, 2)
    image, label, sizes = augment.stack([torch.from_numpy(rgb)], [torch.zeros(8, 8, dtype=torch.int32)], 255)
    view = augment.crop(image, label, sizes, (16, 16), (2.0, 2.0), 255, generator(), flip=False)
    expected = np.asarray(Image.fromarray(rgb).resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float32)
    assert np.abs(view.image_BCHW[0].permute(1, 2, 0).numpy() - expected).max() <= 1.0


def test_strong_view_keeps_range_shape_and_draws_per_image():
    image = torch.rand(6, 3, 20, 24, generator=generator()) * 255
    out = augment.strong(image, generator(1))
    assert out.shape == image.shape
    assert out.min() >= 0
    assert out.max() <= 255
    assert torch.equal(out, augment.strong(image, generator(1)))
    assert not torch.equal(out, augment.strong(image, generator(2)))
    same = augment.strong(image[:1].expand(6, -1, -1, -1), generator(3))
    assert len({float(v) for v in same.mean((1, 2, 3))}) > 3


def test_hue_rotation_keeps_grey_and_luma_and_moves_the_hue():
    matrix = augment._hue_matrix(torch.tensor([0.0, 0.25]))
    assert torch.allclose(matrix[0], torch.eye(3), atol=1e-5)
    grey = torch.full((3,), 0.4)
    assert torch.allclose(matrix[1] @ grey, grey, atol=1e-3)
    red = torch.tensor([0.6, 0.4, 0.4])
    turned = matrix[1] @ red
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert torch.isclose(luma @ turned, luma @ red, atol=1e-3)
    assert abs(colorsys.rgb_to_hsv(*turned.tolist())[0] - colorsys.rgb_to_hsv(*red.tolist())[0]) > 0.15


def test_blur_equals_a_plain_gaussian_loop():
    image = torch.rand(2, 3, 9, 10, generator=generator(), dtype=torch.float64)
    sigma = torch.tensor([0.7, 1.9], dtype=torch.float64)
    out = augment.blur(image, sigma)
    for b in range(2):
        weights = np.exp(-0.5 * (np.arange(-6, 7) / float(sigma[b])) ** 2)
        weights /= weights.sum()
        padded = np.pad(image[b].numpy(), ((0, 0), (6, 6), (6, 6)), mode="edge")
        expected = np.zeros((3, 9, 10))
        for i, wy in enumerate(weights):
            for j, wx in enumerate(weights):
                expected += wy * wx * padded[:, i : i + 9, j : j + 10]
        assert np.abs(out[b].numpy() - expected).max() < 1e-9


def test_mix_identity_partner_and_the_same_box_for_everything():
    image = torch.rand(3, 3, 6, 6, generator=generator())
    label = torch.randint(0, 5, (3, 6, 6), generator=generator())
    nothing, everything = torch.zeros(3, 6, 6, dtype=torch.bool), torch.ones(3, 6, 6, dtype=torch.bool)
    assert torch.equal(augment.mix(image, nothing), image)
    assert torch.equal(augment.mix(image, everything), image[[2, 0, 1]])
    box = augment.boxes(3, (6, 6), 1.0, generator(4))
    mixed_image, mixed_label, mixed_keep = (augment.mix(v, box) for v in (image, label, label > 2))
    for b in range(3):
        for y in range(6):
            for x in range(6):
                source = (b - 1) % 3 if box[b, y, x] else b
                assert torch.equal(mixed_image[b, :, y, x], image[source, :, y, x])
                assert mixed_label[b, y, x] == label[source, y, x]
                assert mixed_keep[b, y, x] == (label[source, y, x] > 2)


def test_a_batch_of_one_is_detected():
    with pytest.raises(ValueError, match="batch_unlabelled"):
        augment.mix(torch.zeros(1, 3, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool))


def test_boxes_are_rectangles_of_the_stated_area_and_frequency():
    box = augment.boxes(4000, (40, 60), 0.5, generator(5))
    area = box.flatten(1).sum(1)
    used = area > 0
    assert abs(float(used.float().mean()) - 0.5) < 0.04
    share = area[used] / (40 * 60)
    assert share.min() > 0.01
    assert share.max() < 0.42
    assert abs(float(share.mean()) - 0.21) < 0.02
    for one in box[used][:50]:
        rows, columns = one.any(1), one.any(0)
        assert one.sum() == rows.sum() * columns.sum()
    covered = box.float().mean(0)
    assert covered.min() > 0  # every pixel, corners too, can be inside


def test_padding_never_counts():
    """Whatever stands in the padding of image and teacher output, bar, selection and loss stay the same."""

    method = registry.build(tiny_settings.train(method="s4mc"), n_classes=4, total=10, epoch_steps=1)
    logits = 2 * torch.randn(2, 3, 6, 6, generator=generator(6))
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    valid[:, 4:] = False
    changed = logits.clone()
    changed[:, :, 4:] = 50 * torch.randn(2, 3, 2, 6, generator=generator(7))
    a, b = (selection.select(method, v, valid, 3) for v in (logits, changed))
    assert a.bar == b.bar
    assert torch.equal(a.keep_BHW, b.keep_BHW)
    assert torch.equal(a.score_BHW[valid], b.score_BHW[valid])
    assert not a.keep_BHW[:, 4:].any()
    student = torch.randn(2, 3, 6, 6, generator=generator(8))
    other = student.clone()
    other[:, :, 4:] = -99
    loss = [losses.masked(s, a.label_BHW, a.keep_BHW, valid, "valid").mean() for s in (student, other)]
    assert loss[0] == loss[1]
    label = torch.where(valid, a.label_BHW, 255)
    assert losses.supervised(student, label, 255).mean() == losses.supervised(other, label, 255).mean()
