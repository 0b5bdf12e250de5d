"""What the teacher looks at: the weak view, or the whole image with its answer cut like the weak view."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline import config
from tests.support import tiny_settings
from tests.support.training.tiny_network import Featured
from tests.support.training.tiny_samples import Memory
from training import inference
from training.engine import ema, trainer, views
from training.engine.data import Batches, Sample
from training.methods import augment, registry
from training.methods.step import SemiSupervisedStep, teacher_logits


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def samples(*sizes, seed=0):
    g = generator(seed)
    return [
        Sample(
            torch.randint(0, 256, (*s, 3), generator=g, dtype=torch.uint8),
            torch.randint(0, 4, s, generator=g, dtype=torch.int32),
        )
        for s in sizes
    ]


def cropped(some, size, scale, seed=0, *, flip=True):
    stacked = augment.stack([s.image_HWC for s in some], [s.label_HW for s in some], 255)
    return augment.crop(*stacked, size, scale, 255, generator(seed), flip=flip)


def pixelwise(k=5, seed=1):
    """A 1x1 convolution with whole weights: its sums are exact in float32 whatever their order."""
    net = nn.Conv2d(3, k, 1)
    g = generator(seed)
    with torch.no_grad():
        net.weight.copy_(torch.randint(-9, 10, net.weight.shape, generator=g))
        net.bias.copy_(torch.randint(-500, 500, net.bias.shape, generator=g))
    return net.eval().requires_grad_(False)


def before(image_BCHW, label_BHW, sizes_B2, size, scale, ignore, generator, *, flip=True):
    """`augment.crop` as it was before a view knew its window (commit e2e0add)."""
    n, (out_h, out_w) = len(image_BCHW), size
    factor = scale[0] + (scale[1] - scale[0]) * torch.rand(n, generator=generator)
    room = (sizes_B2 * factor[:, None] - torch.tensor(size)).clamp_min(0)
    start = torch.rand(n, 2, generator=generator) * room
    if scale[0] == scale[1] == 1.0:
        start = start.round()
    mirrored = (torch.rand(n, generator=generator) < 0.5) & flip
    rows = (torch.arange(out_h) + 0.5 + start[:, :1]) / factor[:, None]
    columns = torch.arange(out_w) + 0.5
    columns = torch.where(mirrored[:, None], out_w - columns, columns)
    columns = (columns + start[:, 1:]) / factor[:, None]
    height, width = sizes_B2.float().split(1, dim=1)
    valid = ((rows < height)[:, :, None]) & ((columns < width)[:, None, :])

    def sample(value, y, x, mode):
        grid = torch.stack(
            [
                (2 * x / value.shape[-1] - 1)[:, None, :].expand(n, out_h, out_w),
                (2 * y / value.shape[-2] - 1)[:, :, None].expand(n, out_h, out_w),
            ],
            dim=-1,
        )
        return F.grid_sample(value, grid, mode=mode, padding_mode="border", align_corners=False)

    y, x = rows.minimum(height - 0.5), columns.minimum(width - 0.5)
    image = sample(image_BCHW.float(), y, x, "bilinear") * valid[:, None]
    label = sample(label_BHW.float()[:, None], y, x, "nearest")[:, 0].long()
    return image, torch.where(valid, label, ignore), valid


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 1.5)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_is_bit_for_bit_what_it_was(scale, flip):
    some = samples((23, 31), (9, 14), (40, 22))
    stacked = augment.stack([s.image_HWC for s in some], [s.label_HW for s in some], 255)
    for seed in range(10):
        old, new = generator(seed), generator(seed)
        expected = before(*stacked, (16, 20), scale, 255, old, flip=flip)
        view = augment.crop(*stacked, (16, 20), scale, 255, new, flip=flip)
        for one, two in zip(expected, (view.image_BCHW, view.label_BHW, view.valid_BHW), strict=True):
            assert torch.equal(one, two)
        assert torch.equal(old.get_state(), new.get_state())


def test_under_an_identity_view_whole_is_crop():
    """Sides are powers of two: the sampling grid is exact."""
    some, net = samples((16, 32), (16, 32)), pixelwise()
    view = cropped(some, (16, 32), (1.0, 1.0), flip=False)
    assert view.valid_BHW.all()
    assert torch.equal(teacher_logits(net, view, views.uncut(net, some, 16)), teacher_logits(net, view, None))


def test_logits_are_cut_as_the_view_was_cut_and_flipped():
    """At scale 1 a pixelwise network answers for a window of the image what the image's answer says there."""
    some, net = samples((23, 31), (9, 14), (40, 22)), pixelwise()
    uncut = views.uncut(net, some, 8)
    assert uncut.shape == (3, 5, 40, 31)
    flips = set()
    for seed in range(20):
        view = cropped(some, (16, 20), (1.0, 1.0), seed)
        got = teacher_logits(net, view, uncut)
        for i, sample in enumerate(some):
            h, w = sample.label_HW.shape
            seen = view.valid_BHW[i].nonzero().tolist()
            assert len(seen) == min(h, 16) * min(w, 20)
            ours = view.window.x_BW[i]
            flips.add(bool(ours[0] > ours[-1]))
            for y, x in seen:
                there = int(view.window.y_BH[i, y]), int(ours[x])
                pixel = sample.image_HWC[there].float()
                assert torch.allclose(view.image_BCHW[i, :, y, x], pixel, atol=1e-2)
                assert torch.allclose(got[i, :, y, x], net(pixel[:, None, None])[:, 0, 0], atol=0.5)
            assert (got[i][:, ~view.valid_BHW[i]] == 0).all()
        inside = view.valid_BHW[:, None].expand_as(got)
        assert torch.allclose(got[inside], net(view.image_BCHW)[inside], atol=0.5)  # of logits in the thousands
    assert flips == {False, True}


def test_scaled_views_of_a_linear_network_agree_and_padding_stays_out():
    """Bilinear sampling and a 1x1 convolution commute at every scale; images of other sizes never bleed in."""
    some, net = samples((23, 31), (9, 14), seed=3), pixelwise()
    uncut = views.uncut(net, some, 8)
    uncut[1, :, 9:], uncut[1, :, :, 14:] = 1e6, 1e6
    for seed in range(20):
        view = cropped(some, (16, 20), (0.5, 1.5), seed)
        got, inside = teacher_logits(net, view, uncut), view.valid_BHW[:, None]
        assert ((got - net(view.image_BCHW)) * inside).abs().max() < 0.5
        assert (got * ~inside == 0).all()


def test_the_whole_image_is_answered_for_as_at_test_time():
    some, teacher = samples((18, 21), (30, 17)), ema.teacher_of(Featured())
    uncut = views.uncut(teacher, some, 8)
    for logits, sample in zip(uncut, some, strict=True):
        h, w = sample.label_HW.shape
        assert torch.equal(logits[:, :h, :w], inference.logits_of(teacher, sample.image_HWC, 8))
        assert (logits[:, h:] == 0).all()
        assert (logits[:, :, w:] == 0).all()


def fit(tmp_path, **changes):
    base = {
        "steps": 4, "warmup_steps": 1, "batch_labelled": 2, "batch_unlabelled": 2, "crop": (16, 16),
        "optimizer": {"lr_warmup": 2},
        "fixmatch": {"threshold": 0.35}, "val_every": 4,
    }  # fmt: skip
    settings = tiny_settings.train(**config.merge(base, changes))
    method = registry.build(settings, n_classes=3, total=3, epoch_steps=4)
    torch.manual_seed(0)
    batches = Batches(Memory(4, 1), Memory(7, 2), (2, 2), 0)
    task = trainer.Task(
        Featured(), method, batches, n_classes=3, ignore=255, identity={"run": str(changes)}, stride=8,
        validate=lambda _: 1.0,
    )  # fmt: skip
    return trainer.Trainer(task, settings, work=tmp_path / str(len(list(tmp_path.iterdir())))).train()


EMA = (
    {"method": "fixmatch"}, {"method": "s4mc"}, {"method": "unimatch"}, {"method": "s4mc+unimatch"},
    {"method": "corrmatch", "teacher": "ema"}, {"method": "corrmatch", "corrmatch": {"variant": "reference"}, "teacher": "ema"},
    {"method": "unimatch", "unimatch": {"streams": "v1"}, "teacher": "ema"}, {"method": "fixmatch", "precision": "bf16"},
)  # fmt: skip


@pytest.mark.parametrize("changes", EMA, ids=str)
def test_training_uses_the_whole_images_when_told_to_and_only_then(changes, tmp_path, monkeypatch):
    given, scores = [], []

    real = SemiSupervisedStep.__call__

    def spy(step, seen, *rest):
        given.append(None if seen.uncut_BCHW is None else tuple(seen.uncut_BCHW.shape))
        done = real(step, seen, *rest)
        if done.selection is not None:
            scores.append(done.selection.score_BHW)
        return done

    monkeypatch.setattr(SemiSupervisedStep, "__call__", spy)
    for view in ("crop", "whole"):
        result = fit(tmp_path, **changes, teacher_view=view)
        assert all(v.isfinite().all() for v in result.student.values())
    assert given == [None] * 5 + [(2, 3, 18, 20)] * 3  # none in the warm-up
    assert not torch.equal(scores[0], scores[3])  # of the first step with unlabelled images: same networks, same views


ITS_OWN_TEACHER = (
    {"method": "corrmatch"}, {"method": "unimatch", "unimatch": {"streams": "v1"}},
    {"method": "fixmatch", "teacher": "self"}, {"method": "s4mc+corrmatch"},
)  # fmt: skip


@pytest.mark.parametrize("changes", ITS_OWN_TEACHER, ids=str)
def test_it_is_refused_where_the_student_is_its_own_teacher(changes):
    assert tiny_settings.train(**changes).teacher_view == "crop"
    with pytest.raises(ValueError, match=r"teacher_view whole: \S+ is its own teacher here .* or teacher: ema"):
        tiny_settings.train(**changes, teacher_view="whole")


@pytest.mark.parametrize("changes", [{"method": "supervised"}, *EMA], ids=str)
def test_it_is_taken_where_there_is_an_ema_teacher_or_none(changes):
    assert tiny_settings.train(**changes, teacher_view="whole").teacher_view == "whole"
