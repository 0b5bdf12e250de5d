"""Invariants of the S4MC refinement, against plain loops in float64."""

import math

import numpy as np
import pytest
import torch

from training.methods.s4mc import (
    NEIGHBOURHOODS,
    margin,
    max_probability,
    neg_entropy,
    neighbour_table,
    refine,
    top_two,
)


def field(shape=(2, 3, 6, 7), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).mul(4).softmax(1).to(dtype)


def oracle(prob, neighbourhood, k, beta, table=None):
    """Pixel by pixel, class by class: gather neighbours, take the k largest in turn, unite."""
    prob = prob.double().numpy()
    out = np.empty_like(prob)
    for b, c, y, x in np.ndindex(*prob.shape):
        near = []
        for dy, dx in NEIGHBOURHOODS[neighbourhood]:
            inside = 0 <= y + dy < prob.shape[2] and 0 <= x + dx < prob.shape[3]
            distance = abs(dy) + abs(dx)
            weight = math.exp(-distance / 2) if beta == "decay" else beta
            near.append((prob[b, c, y + dy, x + dx] if inside else 0.0, -distance, weight))
        value = prob[b, c, y, x]
        for n, _, weight in sorted(near, reverse=True)[:k]:
            joint = value * n
            if table is not None:
                joint = max(joint, value * float(table[c]))
            value = value + weight * n - weight * joint
        out[b, c, y, x] = value
    return torch.from_numpy(out)


@pytest.mark.parametrize("neighbourhood", [4, 8, 24])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("beta", [1.0, 0.5, "decay"])
@pytest.mark.parametrize("size", [(5, 6), (1, 6), (5, 1)])
def test_scores_equal_the_plain_loop(neighbourhood, k, beta, size):
    prob = field((2, 3, *size))
    expected = oracle(prob, neighbourhood, k, beta)
    assert (refine(prob, neighbourhood=neighbourhood, k=k, beta=beta) - expected).abs().max() <= 1e-12
    single = refine(prob.float(), neighbourhood=neighbourhood, k=k, beta=beta)
    assert (single.double() - expected).abs().max() <= 1e-6


def best_neighbour(prob, neighbourhood=8):
    return oracle(prob, neighbourhood, 1, 1.0).sub(prob).div(1 - prob)  # p~ = p + n (1 - p)


@pytest.mark.parametrize("beta", [0.3, math.exp(-0.5), 1.0])
def test_bounds_of_the_refined_scores(beta):
    prob = field(seed=1)
    n = best_neighbour(prob)
    refined = refine(prob, beta=beta)
    assert refined.min() >= 0
    assert refined.max() <= 1
    assert (refined >= prob - 1e-12).all()
    assert (refined >= beta * n - 1e-12).all()
    assert (refined <= prob + beta * n + 1e-12).all()


@pytest.mark.parametrize(("neighbourhood", "k"), [(4, 1), (8, 2), (24, 3)])
def test_raising_any_probability_lowers_nothing(neighbourhood, k):
    prob = field(seed=2)
    before = refine(prob, neighbourhood=neighbourhood, k=k, beta=0.7)
    for index in [(0, 0, 0, 0), (0, 1, 3, 3), (1, 2, 5, 6)]:
        raised = prob.clone()
        raised[index] = 1.0
        after = refine(raised, neighbourhood=neighbourhood, k=k, beta=0.7)
        assert (after >= before - 1e-12).all()
        assert after[index] > before[index]


def test_beta_zero_is_the_identity():
    prob = field(seed=3)
    assert torch.equal(refine(prob, beta=0.0, k=3), prob)


@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_noisy_or_closed_form(beta):
    prob = field((1, 2, 4, 4), seed=4)
    padded = torch.nn.functional.pad(prob, (1, 1, 1, 1))
    product = 1 - prob
    for dy, dx in NEIGHBOURHOODS[8]:  # all neighbours, so their order cannot matter
        product = product * (1 - beta * padded[..., 1 + dy : 5 + dy, 1 + dx : 5 + dx])
    assert (refine(prob, k=8, beta=beta) - (1 - product)).abs().max() <= 1e-12


def test_constant_fields():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 4, 5)
    for beta in (0.6, 1.0):
        expected = p + beta * p * (1 - p)
        assert (refine(p, beta=beta) - expected).abs().max() <= 1e-12  # borders included
    one_hot = torch.zeros(1, 3, 4, 5, dtype=torch.float64)
    one_hot[:, 1] = 1
    assert torch.equal(refine(one_hot), one_hot)
    corner = refine(p, neighbourhood=4, k=3)[0, :, 0, 0]  # only two neighbours exist there
    assert (corner - (1 - (1 - p[0, :, 0, 0]) ** 3)).abs().max() <= 1e-12


def test_margin_of_constant_fields():
    two = torch.tensor([0.8, 0.2], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    assert (margin(refine(two)) - margin(two)).abs().max() <= 1e-12
    a, b, beta = 0.5, 0.3, 0.7
    three = torch.tensor([a, b, 0.2], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 3, 3)
    growth = margin(refine(three, beta=beta)) - margin(three)
    assert (growth - beta * (a - b) * (1 - a - b)).abs().max() <= 1e-12


@pytest.mark.parametrize("beta", [1.0, "decay"])
@pytest.mark.parametrize("neighbourhood", [4, 8, 24])
def test_equivariances(neighbourhood, beta):
    def f(p):
        return refine(p, neighbourhood=neighbourhood, k=2, beta=beta)

    prob = field((2, 3, 8, 9), seed=5)
    assert (f(prob.flip(-1)) - f(prob).flip(-1)).abs().max() <= 1e-12
    assert (f(prob.rot90(1, (2, 3))) - f(prob).rot90(1, (2, 3))).abs().max() <= 1e-12
    order = [2, 0, 1]
    assert (f(prob[:, order]) - f(prob)[:, order]).abs().max() <= 1e-12
    r = 2 if neighbourhood == 24 else 1  # a shift moves the answer with it, away from the borders
    shifted = f(prob[..., 1:, 2:])
    assert (shifted[..., r:, r:] - f(prob)[..., 1 + r :, 2 + r :]).abs().max() <= 1e-12
    with_empty = torch.cat([prob, torch.zeros_like(prob[:, :1])], 1)
    assert (f(with_empty)[:, :3] - f(prob)).abs().max() <= 1e-12
    assert f(with_empty)[:, 3].abs().max() == 0
    other = field((1, 3, 8, 9), seed=6)
    together = f(torch.cat([prob, other]))
    assert torch.equal(together, torch.cat([f(prob), f(other)]))


def test_table_mode():
    prob = field(seed=7)
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    beta = math.exp(-0.5)
    assert torch.equal(refine(prob, beta=beta, table_K=zero), refine(prob, beta=beta))
    n = best_neighbour(prob)
    assert (refine(prob, beta=beta, table_K=one) - (prob + beta * (n - prob))).abs().max() <= 1e-12
    table = torch.tensor([0.83, 0.95, 0.998], dtype=torch.float64)
    refined = refine(prob, neighbourhood=4, beta=beta, table_K=table)
    assert (refined - oracle(prob, 4, 1, beta, table)).abs().max() <= 1e-12
    assert refined.min() >= 0
    assert refined.max() <= 1
    assert (refined < prob - 1e-6).any()  # the reference's smoothing may lower a class


def test_no_gradient_no_side_effect_finite_and_isolated():
    prob = field(seed=8).requires_grad_()
    before = prob.detach().clone()
    refined = refine(prob)
    assert not refined.requires_grad
    assert torch.equal(prob, before)
    for dtype in (torch.float16, torch.bfloat16):
        low = refine(before.to(dtype))
        assert low.dtype == torch.float32
        assert low.isfinite().all()
    broken = before.clone()
    broken[0, 0, 2, 2] = torch.nan
    assert torch.equal(refine(broken)[1], refine(before)[1])


def test_scores_against_sorting():
    prob = field((2, 5, 4, 4), seed=9)
    ordered = prob.sort(1, descending=True).values
    first, second = top_two(prob)
    assert torch.equal(first, ordered[:, 0])
    assert torch.equal(second, ordered[:, 1])
    assert torch.equal(margin(prob), ordered[:, 0] - ordered[:, 1])
    assert torch.equal(max_probability(prob), ordered[:, 0])
    expected = 1 + (prob * prob.log()).sum(1) / math.log(5)
    assert (neg_entropy(prob) - expected).abs().max() <= 1e-12
    uniform = torch.full((1, 5, 1, 1), 0.2, dtype=torch.float64)
    assert neg_entropy(uniform).abs().max() <= 1e-12


def test_neighbour_table_pools_all_masks_as_a_loop_does_and_covers_absent_classes():
    g = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 3, (5, 6), generator=g), torch.zeros(4, 7, dtype=torch.long)]  # sizes may differ
    labels[0][1, 1] = 255
    same, total = np.zeros(4), np.zeros(4)
    for label in labels:
        height, width = label.shape
        for y, x in np.ndindex(height, width):
            for dy, dx in NEIGHBOURHOODS[4]:
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    here, there = int(label[y, x]), int(label[y + dy, x + dx])
                    if here != 255 and there != 255:
                        total[here] += 1
                        same[here] += here == there
    mean = same.sum() / total.sum()
    expected = (same + 8 * mean) / (total + 8)
    assert np.allclose(neighbour_table(labels, 4).numpy(), expected, atol=1e-12)
    assert expected[3] == pytest.approx(mean)


@pytest.mark.parametrize(("options", "word"), [({"neighbourhood": 6}, "neighbourhood"), ({"k": 9}, "k must be")])
def test_bad_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        refine(field(), **options)
