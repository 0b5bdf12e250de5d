"""Invariants Q1 to Q11 of CorrMatch's correlation maps, and J3, against plain loops in float64."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training.correlate import CHUNK, Head, masks, nearest, nonlocal_union, propagate, regions, rows, sample


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def embeddings(batch=2, k=3, n=11, seed=0, dtype=torch.float64, scale=1.5):
    random = generator(seed)
    return [(torch.randn(batch, k, n, generator=random, dtype=torch.float64) * scale).to(dtype) for _ in range(3)]


def log_map(one, two):
    """log P_ij of one image, entry by entry; rows over j sum to 1."""
    one, two = one.double().numpy(), two.double().numpy()
    k, n = one.shape
    out = np.empty((n, n))
    for i in range(n):
        score = [sum(one[c, i] * two[c, j] for c in range(k)) / math.sqrt(k) for j in range(n)]
        top = max(score)
        total = math.fsum(math.exp(s - top) for s in score)
        out[i] = [s - top - math.log(total) for s in score]
    return out


def spread(one, two, value, normalise="source"):
    """Z_cj = sum_i value_ci P_ij by loops; "target" turns the roles in the softmax round."""
    out = torch.empty_like(value, dtype=torch.float64)
    for b in range(len(one)):
        P = np.exp(log_map(one[b], two[b])) if normalise == "source" else np.exp(log_map(two[b], one[b])).T
        v = value[b].double().numpy()
        for c, j in np.ndindex(*v.shape):
            out[b, c, j] = sum(v[c, i] * P[i, j] for i in range(v.shape[1]))
    return out


def resize(field, size):
    """Bilinear with the corners of both grids on each other, pixel by pixel."""
    field = np.asarray(field, dtype=np.float64)
    h, w = field.shape
    out = np.empty(size)
    for y, x in np.ndindex(*size):
        v = y * (h - 1) / (size[0] - 1) if size[0] > 1 else 0.0
        u = x * (w - 1) / (size[1] - 1) if size[1] > 1 else 0.0
        y0, x0 = min(int(v), h - 1), min(int(u), w - 1)
        y1, x1, dy, dx = min(y0 + 1, h - 1), min(x0 + 1, w - 1), v - y0, u - x0
        upper, lower = (field[r, x0] * (1 - dx) + field[r, x1] * dx for r in (y0, y1))
        out[y, x] = upper * (1 - dy) + lower * dy
    return out


# Pixel propagation


def test_q1_rows_are_distributions_of_the_map():
    one, two, _ = embeddings()
    index = torch.tensor([3, 0, 10, 3])
    got = rows(one.requires_grad_(), two, index)
    assert got.shape == (2, 4, 11)
    assert not got.requires_grad
    assert got.min() >= 0
    assert (got.sum(-1) - 1).abs().max() <= 1e-12
    for b in range(2):
        P = np.exp(log_map(one[b].detach(), two[b]))
        assert np.abs(got[b].numpy() - P[index]).max() <= 1e-12


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("normalise", ["source", "target"])
def test_propagation_equals_the_plain_loop(normalise, dense):
    one, two, value = embeddings()
    value = torch.cat([value, 4 + value[:, :1]], 1)  # a value may have more channels than the embeddings
    expected = spread(one, two, value, normalise)
    assert (propagate(one, two, value, normalise=normalise, block=4, dense=dense) - expected).abs().max() <= 1e-12
    single = propagate(one.float(), two.float(), value, normalise=normalise, block=4, dense=dense)
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() <= 1e-5


def test_unknown_normalisation():
    with pytest.raises(ValueError, match="normalise"):
        propagate(*embeddings(), normalise="both")


@pytest.mark.parametrize("dense", [False, True])
def test_q2_the_mass_of_every_class_is_conserved(dense):
    one, two, value = embeddings(n=23)
    difference = propagate(one, two, value, block=5, dense=dense).sum(-1) - value.sum(-1)
    assert difference.abs().max() <= 1e-12
    unlike = propagate(one, two, value, block=5, dense=dense, normalise="target").sum(-1) - value.sum(-1)
    assert unlike.abs().max() > 0.1


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("normalise", ["source", "target"])
def test_q3_without_either_embedding_everything_gets_the_mean(normalise, dense):
    one, two, value = embeddings()
    for pair in ((one * 0, two), (one, two * 0)):
        got = propagate(*pair, value, normalise=normalise, dense=dense, block=4)
        assert (got - value.mean(-1, keepdim=True)).abs().max() <= 1e-12


@pytest.mark.parametrize("normalise", ["source", "target"])
def test_q4_a_peaked_map_returns_the_value(normalise):
    peak = 40 * torch.eye(9, dtype=torch.float64)[None]
    value = embeddings(1, 9, 9)[2]
    assert (propagate(peak, peak, value, normalise=normalise, block=4) - value).abs().max() <= 1e-12
    shift = torch.arange(9).roll(2)  # position i hands its value to the place of its match
    moved = propagate(peak, peak[..., shift], value, normalise=normalise, block=4)
    assert (moved - value[..., shift]).abs().max() <= 1e-12


@pytest.mark.parametrize("normalise", ["source", "target"])
def test_q5_no_position_enters(normalise):
    inputs = embeddings()
    order = torch.randperm(11, generator=generator(1))
    expected = propagate(*inputs, normalise=normalise, block=4)[..., order]
    got = propagate(*(t[..., order] for t in inputs), normalise=normalise, block=4)
    assert (got - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("normalise", ["source", "target"])
def test_q6_gradients_reach_the_embeddings_and_not_the_value(normalise, dense):
    torch.manual_seed(0)
    head = Head(5, 3, width=8).double().train()
    feature = torch.randn(2, 5, 4, 5, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    kept = value.detach().clone()
    one, two = head(feature)
    propagate(one, two, value, normalise=normalise, dense=dense, block=6).square().sum().backward()
    assert value.grad is None
    assert torch.equal(value, kept)
    for weight in (head.conv1.weight, head.conv2.weight, head.proj[0].weight, feature):
        assert weight.grad.abs().max() > 1e-6


def test_head_shapes_layers_and_shared_dropout():
    torch.manual_seed(0)
    head = Head(5, 3, width=32, dropout=0.5)
    assert Head(5, 3).proj[0].weight.shape == (256, 5, 3, 3)
    assert [type(layer).__name__ for layer in head.proj] == ["Conv2d", "BatchNorm2d", "ReLU", "Dropout2d"]
    assert head.proj[0].bias is not None
    assert head.conv1.weight.shape == head.conv2.weight.shape == (3, 32, 1, 1)
    feature = torch.randn(2, 5, 4, 6)
    with torch.no_grad():
        head.conv2.load_state_dict(head.conv1.state_dict())
        one, two = head.train()(feature)
        assert torch.equal(one, two)
        again = head(feature)[0]
        assert not torch.equal(one, again)  # the dropout is on
        head.eval()
        one = head(feature)[0]
        assert one.shape == (2, 3, 24)
        hidden = head.proj(feature)
        y, x = 2, 3  # row-major positions
        assert torch.allclose(
            one[:, :, y * 6 + x], head.conv1(hidden[:, :, y : y + 1, x : x + 1])[..., 0, 0], atol=1e-6
        )


@pytest.mark.parametrize("normalise", ["source", "target"])
@pytest.mark.parametrize("block", [1, 7, 32, 96, 97, 1000])
def test_q7_streamed_equals_dense(normalise, block):
    results = []
    for dense in (True, False):
        one, two, value = embeddings(k=5, n=97, dtype=torch.float32)
        one.requires_grad_()
        two.requires_grad_()
        out = propagate(one, two, value, normalise=normalise, block=block, dense=dense)
        out.sin().sum().backward()
        results.append((out.detach(), one.grad, two.grad))
    (dense_out, *dense_grads), (out, *grads) = results
    assert (out - dense_out).abs().max() <= 1e-5
    for grad, dense_grad in zip(grads, dense_grads, strict=True):
        assert (grad - dense_grad).norm() <= 1e-4 * dense_grad.norm()


@pytest.mark.parametrize("normalise", ["source", "target"])
def test_q7_gradients_are_the_derivative(normalise):
    one, two, value = embeddings(n=7)

    def function(a, b):
        return propagate(a, b, value, normalise=normalise, block=3)

    assert torch.autograd.gradcheck(function, (one.requires_grad_(), two.requires_grad_()), atol=1e-7, rtol=1e-6)


def test_q7_is_the_same_every_time():
    def once():
        one, two, value = embeddings(n=50, dtype=torch.float32)
        out = propagate(one.requires_grad_(), two.requires_grad_(), value, block=16)
        out.square().sum().backward()
        return out.detach(), one.grad, two.grad

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("dense", [False, True])
def test_q8_only_the_target_form_keeps_constants(dense):
    one, two, value = embeddings()
    constant = value[..., :1].expand(-1, -1, 11)
    kept = propagate(one, two, constant, normalise="target", dense=dense, block=4)
    assert (kept - constant).abs().max() <= 1e-12
    assert (propagate(one, two, constant, dense=dense, block=4) - constant).abs().max() > 0.1


def test_autocast_changes_nothing_but_the_head():
    torch.manual_seed(0)
    head = Head(5, 6, width=8)
    feature = torch.randn(2, 5, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = head(feature)
        assert one.dtype == torch.bfloat16
        one, two = ((8 * t).detach().requires_grad_() for t in (one, two))
        value = torch.randn(2, 6, 42).bfloat16()
        inside = {dense: propagate(one, two, value, dense=dense, block=16) for dense in (False, True)}
        assert all(out.dtype == torch.float32 and out.isfinite().all() for out in inside.values())
        got = torch.autograd.grad(inside[False].sum(0).square().sum(), (one, two))
        sampled = rows(one, two, torch.arange(9))
        near = nearest(one, two, 3, block=16)
    wide = [t.detach().float().requires_grad_() for t in (one, two)]
    outside = propagate(*wide, value.float(), block=16)
    assert all((out - outside).abs().max() <= 1e-5 for out in inside.values())
    expected = torch.autograd.grad(outside.sum(0).square().sum(), wide)
    for grad, wanted in zip(got, expected, strict=True):
        assert grad.isfinite().all()
        assert (grad.float() - wanted).norm() <= 4e-3 * wanted.norm()  # rounded to bf16 once, at the end
    assert (sampled - rows(*wide, torch.arange(9))).abs().max() <= 1e-7
    assert torch.equal(near, nearest(*wide, 3))


# Region masks


def mask_of(row, grid, size):
    field = resize(np.asarray(row).reshape(grid), size)
    low, high = field.min(), field.max()
    return (field - low) / (high - low) > 0.5 if high > low else np.zeros(size, dtype=bool)


@pytest.mark.parametrize(("grid", "size"), [((3, 4), (13, 11)), ((4, 3), (4, 3)), ((5, 6), (4, 9)), ((1, 5), (6, 10))])
def test_q9_masks_equal_the_plain_loop(grid, size):
    row = torch.rand(2, 7, grid[0] * grid[1], generator=generator(), dtype=torch.float64)
    got = masks(row, grid, size, chunk=3)
    assert got.dtype == torch.bool
    assert got.shape == (2, 7, *size)
    for b, m in np.ndindex(2, 7):
        assert np.array_equal(got[b, m].numpy(), mask_of(row[b, m], grid, size))
    assert torch.equal(got, masks(row, grid, size))
    assert 0.1 < got.double().mean() < 0.9


def test_q9_the_bound_is_strict_and_halfway():
    row = torch.tensor([[[0.0, 0.5, 1.0, 0.25, 0.75, 0.5]]])
    assert masks(row, (1, 6), (1, 6)).flatten().tolist() == [False, False, True, False, True, False]


def test_q9_masks_know_neither_scale_nor_offset():
    row = torch.rand(1, 9, 20, generator=generator(), dtype=torch.float64)
    expected = masks(row, (4, 5), (15, 18))
    for a, b in ((3.0, 0.0), (0.01, 0.0), (1.0, 7.0), (2.5, -1.0)):
        assert torch.equal(masks(a * row + b, (4, 5), (15, 18)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 1 / 3, 1 / 1681, 0.1, 77.7])
def test_q9_a_constant_row_has_no_region(dtype, level):
    row = torch.full((2, 3, 41 * 3), level, dtype=dtype)
    row[0, 1, 5] += 0.5 + level
    got = masks(row, (41, 3), (321, 17))
    assert got.flatten(2).any(-1).tolist() == [[False, True, False], [False] * 3]
    assert not masks(row[..., :1], (1, 1), (5, 5)).any()


def test_q9_the_highest_cell_is_inside():
    row = torch.rand(3, 8, 20, generator=generator(2))
    got = masks(row, (4, 5), (10, 13))  # 3 pixels to a cell: cell (y, x) lies on pixel (3 y, 3 x)
    for b, m in np.ndindex(3, 8):
        y, x = divmod(int(row[b, m].argmax()), 5)
        assert got[b, m, 3 * y, 3 * x]


def test_q10_indices():
    n = 6
    every = sample(n, 4000, generator())
    assert every.shape == (4000,)
    assert every.dtype == torch.int64
    counts = torch.bincount(every, minlength=n)
    assert len(counts) == n
    assert (counts - 4000 / n).abs().max() < 5 * math.sqrt(4000 / n)
    reference = torch.bincount(sample(n, 4000, generator(), reference=True), minlength=n)
    assert len(reference) == n
    assert reference[-1] == 0
    assert (reference[:-1] - 4000 / (n - 1)).abs().max() < 5 * math.sqrt(4000 / (n - 1))
    assert torch.equal(sample(n, 50, generator(3)), sample(n, 50, generator(3)))
    assert sample(1, 5, generator(), reference=True).tolist() == [0] * 5


# Region propagation


def judged(label, seg, mask, bar, purity, n_classes):
    """(class, share) of one accepted mask, else None: pixel lists and exact integers."""
    inside = [int(c) for c in label[seg]]
    if not inside or len(inside) / int(mask.sum()) < bar:
        return None
    counts = [inside.count(c) for c in range(n_classes)]
    share = max(counts) / len(inside)
    return (counts.index(max(counts)), share) if share > purity else None


def in_order(label, confident, mask, bar, purity, n_classes):
    """The published loop: each mask sees what earlier ones wrote."""
    label, keep, accepted = label.numpy().copy(), confident.numpy().copy(), []
    for b in range(len(label)):
        for m in range(mask.shape[1]):
            inside = mask[b, m].numpy()
            verdict = judged(label[b], inside & confident[b].numpy(), inside, bar, purity, n_classes)
            if verdict is not None:
                label[b][inside] = verdict[0]
                keep[b] |= inside
                accepted.append((b, m))
    return torch.from_numpy(label), torch.from_numpy(keep), accepted


def at_once(label, confident, mask, bar, purity, n_classes):
    """All masks judged on the labels given; then, pixel by pixel, the claim with the largest share, then lowest index."""
    new, keep, accepted = label.clone(), confident.clone(), []
    for b in range(len(label)):
        verdicts = []
        for m in range(mask.shape[1]):
            inside = mask[b, m].numpy()
            seg = inside & confident[b].numpy()
            verdicts.append(judged(label[b].numpy(), seg, inside, bar, purity, n_classes))
            accepted += [] if verdicts[-1] is None else [(b, m)]
        for y, x in np.ndindex(*label.shape[1:]):
            claims = [(-v[1], m, v[0]) for m, v in enumerate(verdicts) if v is not None and mask[b, m, y, x]]
            if claims:
                new[b, y, x] = min(claims)[2]
                keep[b, y, x] = True
    return new, keep, accepted


LOOPS = {"parallel": at_once, "sequential": in_order}
MODES = pytest.mark.parametrize("mode", LOOPS)


def scene(seed=0, batch=2, size=(12, 15), n_masks=2 * CHUNK + 5, n_classes=4, flips=0.2):
    """Quadrants of different classes with wrong pixels, mostly confident, and rectangles as masks."""
    random = np.random.default_rng(seed)
    label = np.empty((batch, *size), dtype=np.int64)
    for b in range(batch):
        corners = random.integers(0, n_classes, (2, 2))
        label[b] = np.kron(corners, np.ones((8, 8), dtype=int))[: size[0], : size[1]]
    wrong = random.random(label.shape) < flips
    label[wrong] = random.integers(0, n_classes, wrong.sum())
    mask = np.zeros((batch, n_masks, *size), dtype=bool)
    for b, m in np.ndindex(batch, n_masks):
        y, x = random.integers(0, size[0] - 2), random.integers(0, size[1] - 2)
        mask[b, m, y : y + random.integers(1, 7), x : x + random.integers(1, 7)] = True
    confident = random.random(label.shape) < 0.8
    return torch.from_numpy(label), torch.from_numpy(confident), torch.from_numpy(mask)


@MODES
@pytest.mark.parametrize("seed", range(6))
def test_q11_equals_the_plain_loop(mode, seed):
    label, confident, mask = scene(seed)
    label[0, :2] = 255  # no class
    inputs = [t.clone() for t in (label, confident, mask)]
    for bar, purity in ((0.7, 0.7), (0.5, 0.4), (0.0, 0.0), (0.85, 0.85)):
        expected, expected_keep, accepted = LOOPS[mode](label, confident, mask, bar, purity, 4)
        got, keep = regions(label, confident, mask, bar, purity, mode=mode, n_classes=4)
        assert torch.equal(got, expected)
        assert torch.equal(keep, expected_keep)
        assert got.dtype == label.dtype
        assert bar != 0.7 or 10 < len(accepted) < 2 * mask.shape[1] - 10
    assert all(torch.equal(t, kept) for t, kept in zip((label, confident, mask), inputs, strict=True))
    modes = [regions(label, confident, mask, 0.5, 0.4, mode=m, n_classes=4)[0] for m in LOOPS]
    assert not torch.equal(*modes)  # these scenes tell the two rules apart


@MODES
def test_q11_bounds_as_tensors_and_labels_of_any_width(mode):
    label, confident, mask = scene(8)
    expected = regions(label, confident, mask, 0.7, 0.6, mode=mode, n_classes=4)
    bounds = [torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.6)]
    got = regions(label, confident, mask, *bounds, mode=mode, n_classes=4)
    narrow = regions(label.to(torch.uint8), confident, mask, 0.7, 0.6, mode=mode, n_classes=4)
    assert narrow[0].dtype == torch.uint8
    for other in (got, narrow):
        assert torch.equal(other[0].long(), expected[0])
        assert torch.equal(other[1], expected[1])


@MODES
def test_q11_images_are_independent(mode):
    inputs = scene(3)
    both = regions(*inputs, 0.6, 0.6, mode=mode, n_classes=4)
    for b in range(2):
        alone = regions(*(t[b : b + 1] for t in inputs), 0.6, 0.6, mode=mode, n_classes=4)
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, both, strict=True))


@MODES
@pytest.mark.parametrize("seed", range(3))
def test_q11_cleared_pixels_are_never_touched(mode, seed):
    label, confident, mask = scene(seed)
    box = torch.zeros_like(confident)
    box[:, 3:9, 4:11] = True
    mask &= ~box[:, None]
    confident[:, 5] = False  # invalid pixels are not confident; box pixels may be
    mask[:, :, 5] = False
    got, keep = regions(label, confident, mask, 0.5, 0.5, mode=mode, n_classes=4)
    box[:, 5] = True
    assert torch.equal(got[box], label[box])
    assert torch.equal(keep[box], confident[box])
    assert not torch.equal(got, label)


@MODES
@pytest.mark.parametrize("seed", range(3))
def test_q11_only_accepted_masks_change_labels_and_selection_grows(mode, seed):
    label, confident, mask = scene(seed)
    got, keep = regions(label, confident, mask, 0.7, 0.7, mode=mode, n_classes=4)
    union = torch.zeros_like(confident)
    for b, m in LOOPS[mode](label, confident, mask, 0.7, 0.7, 4)[2]:
        union[b] |= mask[b, m]
    assert torch.equal(keep, confident | union)
    assert torch.equal(got[~union], label[~union])
    assert (keep & ~confident).any()


@MODES
def test_q11_a_purity_bound_of_one_accepts_nothing(mode):
    label, _, mask = scene()
    sure = torch.ones_like(label, dtype=torch.bool)
    label[1] = 2
    got, keep = regions(label, sure, mask, 0.0, 1.0, mode=mode, n_classes=4)
    assert torch.equal(got, label)
    assert torch.equal(keep, sure)


@MODES
def test_q11_bounds_overlap_may_be_met_purity_must_be_passed(mode):
    def accepted(confident_pixels, top_pixels, bar=0.85, purity=0.5):
        label = torch.ones(1, 4, 5, dtype=torch.int64)
        label.view(-1)[:top_pixels] = 3
        confident = (torch.arange(20) < confident_pixels).view(1, 4, 5)
        mask = torch.ones(1, 1, 4, 5, dtype=torch.bool)
        return bool((regions(label, confident, mask, bar, purity, mode=mode, n_classes=4)[0] == 3).all())

    assert accepted(17, 17)
    assert not accepted(16, 16)
    assert accepted(20, 18, purity=0.85)
    assert not accepted(20, 17, purity=0.85)
    assert accepted(20, 17, purity=torch.tensor(0.8499))
    assert accepted(20, 17, purity=0.85 - 1e-9)  # finer than float32
    assert not accepted(17, 17, bar=0.85 + 1e-9)
    assert not accepted(17, 17, bar=torch.tensor(0.8501))
    assert accepted(1, 1, bar=0.0)
    assert not accepted(0, 1, bar=0.0, purity=0.0)  # no confident pixel: skipped whatever the bar


@MODES
def test_q11_a_uniform_confident_region_stays(mode):
    label, _, mask = scene()
    label[:] = 1
    sure = torch.zeros_like(label, dtype=torch.bool)
    sure[:, 2:9, 3:9] = True
    mask[:] = sure[:, None]
    once = regions(label, sure, mask, 0.85, 0.85, mode=mode, n_classes=4)
    assert torch.equal(once[0], label)
    assert torch.equal(once[1], sure)


@MODES
@pytest.mark.parametrize("n_masks", [0, 3])
def test_q11_empty_masks_are_safe(mode, n_masks):
    label, confident, _ = scene()
    mask = torch.zeros(2, n_masks, 12, 15, dtype=torch.bool)
    got, keep = regions(label, confident, mask, 0.0, 0.0, mode=mode, n_classes=4)
    assert torch.equal(got, label)
    assert torch.equal(keep, confident)


def test_q11_a_contested_pixel_goes_to_the_larger_share_then_the_lower_index():
    label = torch.tensor([[[0, 0, 0, 1, 1, 1, 1, 0, 2, 2]]])
    sure = torch.ones_like(label, dtype=torch.bool)
    mask = torch.zeros(1, 3, 1, 10, dtype=torch.bool)
    mask[0, 0, 0, :4] = True  # class 0, 3 of 4
    mask[0, 1, 0, 3:8] = True  # class 1, 4 of 5: wins pixel 3
    mask[0, 2, 0, 7:9] = True  # 1 of 2: the lowest of equal classes, and not above 0.6
    got = regions(label, sure, mask, 0.5, 0.6, n_classes=3)[0]
    assert got.flatten().tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    mask[0, 0, 0, 3:5] = torch.tensor([True, False])
    mask[0, 1, 0] = torch.tensor([False] * 3 + [True] * 4 + [False] * 3)
    mask[0, 1, 0, 2] = True  # class 1, 4 of 5, against class 0, 3 of 4
    label[0, 0, 0] = 1
    label[0, 0, 4] = 2  # now 2 of 4 each in their own way: 0 has 2 of 4, 1 has 3 of 5
    got = regions(label, sure, mask, 0.5, 0.4, n_classes=3)[0]
    assert got.flatten().tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 2]
    equal = torch.tensor([[[0, 0, 1, 1]]])
    mask = torch.tensor([[[[True, True, True, False]], [[False, True, True, True]]]])
    sure = torch.ones_like(equal, dtype=torch.bool)
    for order, expected in (([0, 1], [0, 0, 0, 1]), ([1, 0], [0, 1, 1, 1])):
        assert regions(equal, sure, mask[:, order], 0.5, 0.6, n_classes=2)[0].flatten().tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_q11_both_rules_agree_on_disjoint_masks(seed):
    label, confident, _ = scene(seed)
    cells = torch.zeros(2, 20, 12, 15, dtype=torch.bool)
    for m in range(20):
        y, x = divmod(m, 5)
        cells[:, m, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3] = True
    parallel, sequential = (regions(label, confident, cells, 0.6, 0.6, mode=m, n_classes=4) for m in LOOPS)
    assert torch.equal(parallel[0], sequential[0])
    assert torch.equal(parallel[1], sequential[1])
    assert 0 < (parallel[1] & ~confident).sum() < (~confident).sum()


def test_q11_both_rules_agree_on_masks_of_one_class():
    label, confident, mask = scene(flips=0.0)
    label[:] = torch.tensor([1, 3])[:, None, None]
    parallel, sequential = (regions(label, confident, mask, 0.7, 0.7, mode=m, n_classes=4) for m in LOOPS)
    assert torch.equal(parallel[0], sequential[0])
    assert torch.equal(parallel[1], sequential[1])


@MODES
def test_q11_counts_are_exact_under_autocast(mode):
    label = torch.zeros(1, 20, 20, dtype=torch.int64)
    sure = (torch.arange(400) < 339).view(1, 20, 20)  # 0.8475: bfloat16 would count 340, which meets the bar
    with torch.autocast("cpu", torch.bfloat16):
        keep = regions(label, sure, torch.ones(1, 1, 20, 20, dtype=torch.bool), 0.85, 0.5, mode=mode, n_classes=2)[1]
    assert torch.equal(keep, sure)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode"):
        regions(*scene(), 0.5, 0.5, mode="random", n_classes=4)


# Neighbours by correlation


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("far", [False, True])
def test_nearest_equals_the_plain_loop(block, far):
    one, two, _ = embeddings(n=13)
    if far:  # position 2 is so unlike all others that its P_ij are 0 in float64
        one[:, 0], two[:, 0, 2] = one[:, 0].abs() + 1, -3000.0
        assert rows(one, two, torch.arange(13))[:, :, 2].max() == 0
    for k in (1, 4, 12):
        got = nearest(one, two, k, block=block)
        assert got.shape == (2, k, 13)
        assert got.dtype == torch.int64
        for b in range(2):
            P = log_map(one[b], two[b])
            for j in range(13):
                expected = sorted((i for i in range(13) if i != j), key=lambda i: -P[i, j])[:k]
                assert got[b, :, j].tolist() == expected


@pytest.mark.parametrize("k", [0, 11])
def test_nearest_needs_that_many_others(k):
    with pytest.raises(ValueError, match="1 to 10"):
        nearest(*embeddings()[:2], k)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("size", [(9, 7), (3, 4), (2, 9)])
def test_j3_equals_the_plain_loop(k, size):
    one, two, _ = embeddings(n=12)
    prob = torch.rand(2, 3, *size, generator=generator(), dtype=torch.float64).mul(4).softmax(1)
    kept = prob.clone()
    got = nonlocal_union(prob.requires_grad_(), one.requires_grad_(), two, (3, 4), k=k)
    assert not got.requires_grad
    assert torch.equal(prob, kept)
    for b in range(2):
        P = log_map(one[b].detach(), two[b])
        for c in range(3):
            p = kept[b, c].numpy()
            coarse = resize(p, (3, 4)).flatten()
            n = np.empty(12)
            for j in range(12):
                n[j] = max(coarse[i] for i in sorted((i for i in range(12) if i != j), key=lambda i: -P[i, j])[:k])
            n = resize(n.reshape(3, 4), size)
            assert np.abs(got[b, c].numpy() - (p + n - p * n)).max() <= 1e-12
    assert (got >= kept).all()
    assert got.max() <= 1


def test_j3_range_and_narrow_input():
    one, two, _ = embeddings(n=20, dtype=torch.float32)
    prob = torch.nn.functional.one_hot(torch.randint(3, (2, 17, 11), generator=generator())).movedim(-1, 1)
    got = nonlocal_union(prob.bfloat16(), one.bfloat16(), two.bfloat16(), (4, 5))
    assert got.dtype == torch.float32
    assert got.min() >= 0
    assert got.max() <= 1
    assert torch.equal(got[prob == 1], torch.ones_like(got[prob == 1]))
    certain = nonlocal_union(torch.ones(2, 1, 17, 11), one, two, (4, 5))
    assert torch.equal(certain, torch.ones_like(certain))
    for step in (3, 5, 7, 11):  # sure on every grid position, not between: upsampling n = 1 can round to above 1
        prob = torch.rand(2, 3, 3 * step + 1, 4 * step + 1, generator=generator(step)) / 2
        prob[..., ::step, ::step] = 1
        assert nonlocal_union(prob, one, two, (4, 5)).max() == 1


# Cost


class Watch(TorchDispatchMode):
    """Fails on operations that wait for the device, and records the largest float tensor made."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal.default", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(wait in name for wait in self.WAITS):
            raise AssertionError(f"{name} waits for the device")
        if "aten.index" in name and any(i is not None and i.dtype == torch.bool for i in self.listed(args[1:2])):
            raise AssertionError(f"{name} with a boolean index waits for the device")
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and "expand" not in name:
                self.largest = max(self.largest, tensor.numel())
        return out

    @staticmethod
    def listed(args):
        return [i for arg in args if isinstance(arg, (tuple, list)) for i in arg]


@pytest.mark.parametrize(
    "wait", [lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: t.__setitem__(t > 0, 1.0)]
)
def test_the_watch_sees_waits(wait):
    with pytest.raises(AssertionError, match="waits for the device"), Watch():
        wait(torch.ones(3))


@pytest.mark.parametrize("normalise", ["source", "target"])
def test_propagation_never_waits_nor_makes_the_map(normalise):
    n, block, batch = 300, 32, 2
    one, two, value = embeddings(batch=batch, n=n, dtype=torch.float32)
    with Watch() as watch:
        propagate(one.requires_grad_(), two.requires_grad_(), value, normalise=normalise, block=block).sum().backward()
    assert watch.largest <= batch * n * block
    with Watch():
        propagate(one, two, value, normalise=normalise, dense=True).sum().backward()


@MODES
def test_regions_and_neighbours_never_wait(mode):
    batch, n_masks, size = 2, 128, (24, 30)
    one, two, _ = embeddings(batch=batch, k=4, n=20, dtype=torch.float32)
    label, confident, _ = scene(size=(12, 15), batch=batch)
    label, confident = (t.repeat_interleave(2, 1).repeat_interleave(2, 2) for t in (label, confident))
    random = generator()
    bar = torch.tensor(0.7)
    with Watch() as watch:
        sampled = rows(one, two, sample(20, n_masks, random))
        found = masks(sampled, (4, 5), size)
        regions(label, confident, found, bar, bar, mode=mode, n_classes=4)
    assert watch.largest <= batch * CHUNK * size[0] * size[1]
    with Watch():
        nonlocal_union(torch.full((batch, 4, *size), 0.25), one, two, (4, 5))
