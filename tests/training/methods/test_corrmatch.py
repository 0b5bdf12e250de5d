"""Invariants of CorrMatch's correlation maps and of correlated neighbours, against plain loops in float64."""

import math

import numpy as np
import pytest
import torch

from tests.support.training.device_sync import Watch
from tests.support.training.feature_maps import embeddings, generator, resize
from training.methods.corrmatch import Head, nearest, nonlocal_union, propagate, rows, sample


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


# Pixel propagation


def test_rows_are_distributions_of_the_map():
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
def test_the_mass_of_every_class_is_conserved(dense):
    one, two, value = embeddings(n=23)
    difference = propagate(one, two, value, block=5, dense=dense).sum(-1) - value.sum(-1)
    assert difference.abs().max() <= 1e-12
    unlike = propagate(one, two, value, block=5, dense=dense, normalise="target").sum(-1) - value.sum(-1)
    assert unlike.abs().max() > 0.1


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("normalise", ["source", "target"])
def test_without_either_embedding_everything_gets_the_mean(normalise, dense):
    one, two, value = embeddings()
    for pair in ((one * 0, two), (one, two * 0)):
        got = propagate(*pair, value, normalise=normalise, dense=dense, block=4)
        assert (got - value.mean(-1, keepdim=True)).abs().max() <= 1e-12


@pytest.mark.parametrize("normalise", ["source", "target"])
def test_a_peaked_map_returns_the_value(normalise):
    peak = 40 * torch.eye(9, dtype=torch.float64)[None]
    value = embeddings(1, 9, 9)[2]
    assert (propagate(peak, peak, value, normalise=normalise, block=4) - value).abs().max() <= 1e-12
    shift = torch.arange(9).roll(2)  # position i hands its value to the place of its match
    moved = propagate(peak, peak[..., shift], value, normalise=normalise, block=4)
    assert (moved - value[..., shift]).abs().max() <= 1e-12


@pytest.mark.parametrize("normalise", ["source", "target"])
def test_no_position_enters(normalise):
    inputs = embeddings()
    order = torch.randperm(11, generator=generator(1))
    expected = propagate(*inputs, normalise=normalise, block=4)[..., order]
    got = propagate(*(t[..., order] for t in inputs), normalise=normalise, block=4)
    assert (got - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("normalise", ["source", "target"])
def test_gradients_reach_the_embeddings_and_not_the_value(normalise, dense):
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
def test_streamed_equals_dense(normalise, block):
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
def test_gradients_of_the_streamed_form_are_the_derivative(normalise):
    one, two, value = embeddings(n=7)

    def function(a, b):
        return propagate(a, b, value, normalise=normalise, block=3)

    assert torch.autograd.gradcheck(function, (one.requires_grad_(), two.requires_grad_()), atol=1e-7, rtol=1e-6)


def test_the_streamed_form_is_the_same_every_time():
    def once():
        one, two, value = embeddings(n=50, dtype=torch.float32)
        out = propagate(one.requires_grad_(), two.requires_grad_(), value, block=16)
        out.square().sum().backward()
        return out.detach(), one.grad, two.grad

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("dense", [False, True])
def test_only_the_target_form_keeps_constants(dense):
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


def test_indices_of_the_drawn_positions():
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
def test_correlated_neighbours_equal_the_plain_loop(k, size):
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


def test_correlated_neighbours_range_and_narrow_input():
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


@pytest.mark.parametrize("normalise", ["source", "target"])
def test_propagation_never_waits_nor_makes_the_map(normalise):
    n, block, batch = 300, 32, 2
    one, two, value = embeddings(batch=batch, n=n, dtype=torch.float32)
    with Watch() as watch:
        propagate(one.requires_grad_(), two.requires_grad_(), value, normalise=normalise, block=block).sum().backward()
    assert watch.largest <= batch * n * block
    with Watch():
        propagate(one, two, value, normalise=normalise, dense=True).sum().backward()


def test_neighbours_never_wait():
    one, two, _ = embeddings(k=4, n=20, dtype=torch.float32)
    with Watch():
        nonlocal_union(torch.full((2, 4, 24, 30), 0.25), one, two, (4, 5))
