"""Loss terms against pixel loops, and their sums and counts over micro-batches."""

import numpy as np
import pytest
import torch

from training.methods import losses


@pytest.mark.parametrize("normaliser", ["valid", "kept"])
def test_sums_and_counts_accumulate_exactly_over_micro_batches(normaliser):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, 5, 5, generator=g, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 3, (4, 5, 5), generator=g)
    keep = torch.rand(4, 5, 5, generator=g) < torch.tensor([0.9, 0.1, 0.5, 0.0]).view(4, 1, 1)
    valid = keep | (torch.rand(4, 5, 5, generator=g) < 0.7)
    whole = losses.masked(logits, label, keep, valid, normaliser)
    parts = [
        losses.masked(logits[i : i + 1], label[i : i + 1], keep[i : i + 1], valid[i : i + 1], normaliser)
        for i in range(4)
    ]
    added = losses.Loss(sum(p.total for p in parts), sum(p.count for p in parts))
    assert torch.isclose(added.mean(), whole.mean(), rtol=1e-6)
    (g1,) = torch.autograd.grad(whole.mean(), logits, retain_graph=True)
    (g2,) = torch.autograd.grad(added.mean(), logits)
    assert torch.allclose(g1, g2, rtol=1e-6)


def test_masked_loss_equals_a_pixel_loop_in_every_normalisation():
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 4, 4, generator=g)
    label = torch.randint(0, 3, (2, 4, 4), generator=g)
    valid = torch.rand(2, 4, 4, generator=g) < 0.8
    keep = valid & (torch.rand(2, 4, 4, generator=g) < 0.5)
    log_prob = logits.double().log_softmax(1)
    total = sum(-float(log_prob[b, label[b, y, x], y, x]) for b, y, x in keep.nonzero().tolist())
    kept, n = int(keep.sum()), int(valid.sum())
    for normaliser, expected in {"valid": total / n, "kept": total / kept, "ratio": total / kept * n / kept}.items():
        assert float(losses.masked(logits, label, keep, valid, normaliser).mean()) == pytest.approx(expected, rel=1e-5)


def test_hard_pixels_are_those_below_the_bar_or_the_least_sure():
    g = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(2, 3, 7, 9, generator=g)
    label = torch.randint(0, 3, (2, 7, 9), generator=g)
    label[0, :3] = 255
    p = logits.double().softmax(1).numpy()
    sure = {q: p[q[0], label[q], q[1], q[2]] for q in np.ndindex(2, 7, 9) if label[q] != 255}
    for bar, least in ((0.7, 10), (0.1, 30), (0.0, 5), (0.2, 10_000)):
        limit = max(bar, sorted(sure.values())[min(least, len(sure)) - 1])
        used = [v for v in sure.values() if v <= limit * (1 + 1e-6)]
        loss = losses.hard(logits, label, 255, sure=bar, least=least)
        assert int(loss.count) == len(used)
        assert float(loss.mean()) == pytest.approx(-np.mean(np.log(used)), rel=1e-5)


def test_a_weighted_pixel_counts_its_weight_and_a_dropped_one_nothing():
    """Divided by the valid pixels, not by the weights: a doubtful batch teaches less. NaN where nothing is kept is no harm."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 3, (2, 4, 4), generator=g)
    valid = torch.rand(2, 4, 4, generator=g) < 0.8
    keep = valid & (torch.rand(2, 4, 4, generator=g) < 0.5)
    weight = torch.rand(2, 4, 4, generator=g)
    log_prob = logits.detach().log_softmax(1)
    total = sum(-float(weight[b, y, x] * log_prob[b, label[b, y, x], y, x]) for b, y, x in keep.nonzero().tolist())

    found = losses.masked(logits, label, keep, valid, "valid", weight_BHW=torch.where(keep, weight, torch.nan)).mean()
    assert found.item() == pytest.approx(total / int(valid.sum()), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(1) > 0).equal(keep)
