"""The threshold's schedule, its quantile, the selection."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.support import tiny_settings
from training.methods import losses, registry, selection
from training.methods.s4mc import Refinement, margin, max_probability, refine
from training.methods.threshold import ClassMax, Fixed, Partition, alpha, quantile


def test_alpha_is_linear_from_start_to_zero_and_needs_only_the_step():
    assert alpha(0, 100) == 0.4
    assert alpha(100, 100) == 0.0
    assert alpha(25, 100) == pytest.approx(0.3)
    assert alpha(170, 100) == 0.0
    by_epoch = Partition(0.4, 0.0, 100, every=10)
    assert by_epoch.alpha(19) == by_epoch.alpha(10) == pytest.approx(0.36)
    assert Partition(0.4, 0.0, 100).alpha(37) == Partition(0.4, 0.0, 100).alpha(37) == pytest.approx(0.252)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.4, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_kept_share_validity_and_permutation(share, n):
    generator = torch.Generator().manual_seed(n)
    score = torch.rand(n, generator=generator, dtype=torch.float64)
    valid = torch.ones(n, dtype=torch.bool)
    bar = quantile(score, valid, share)
    assert abs((score > bar).double().mean() - (1 - share)) <= 1 / n + 1e-12
    mixed = torch.cat(
        [score, torch.full((5,), 9.0, dtype=torch.float64), torch.full((2,), torch.nan, dtype=torch.float64)]
    )
    ok = torch.cat([valid, torch.zeros(5, dtype=torch.bool), torch.ones(2, dtype=torch.bool)])
    assert quantile(mixed, ok, share) == bar
    order = torch.randperm(len(mixed), generator=generator)
    assert quantile(mixed[order], ok[order], share) == bar


def test_the_threshold_is_the_exact_order_statistic():
    score = torch.arange(10.0).flip(0)
    for below in range(1, 11):
        assert quantile(score, torch.ones(10, dtype=torch.bool), below / 10) == below - 1


def test_maximum_keeps_a_superset_margin_does_not():
    generator = torch.Generator().manual_seed(0)
    prob = (3 * torch.rand(4, 5, 12, 12, generator=generator, dtype=torch.float64)).softmax(1)
    refined = refine(prob)
    for bar in (0.2, 0.4, 0.6):
        assert not ((max_probability(prob) > bar) & ~(max_probability(refined) > bar)).any()
    # A boundary pixel: its neighbour is sure of the second class, so the refined margin falls. Not a bug: S4MC
    # suppresses boundaries.
    edge = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    edge[0, :, 0, 0] = torch.tensor([0.7, 0.3])
    edge[0, :, 0, 1] = torch.tensor([0.05, 0.95])
    assert margin(edge)[0, 0, 0] > 0.3
    assert margin(refine(edge))[0, 0, 0] < 0.0 + 0.3


@pytest.mark.parametrize("case", ["saturated", "nothing valid"])
def test_zero_kept_gives_zero_loss_and_zero_gradient(case):
    method = registry.Method(Refinement(), Partition(0.4, 0.0, 100), "kept", strict=True)
    logits = torch.zeros(2, 3, 4, 4)
    logits[:, 1] = 200.0 if case == "saturated" else 1.0
    valid = torch.full((2, 4, 4), case == "saturated")
    chosen = selection.select(method, logits, valid, 0)
    assert not chosen.keep_BHW.any()
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    for normaliser in ("valid", "kept", "ratio"):
        student.grad = None
        loss = losses.masked(student, chosen.label_BHW, chosen.keep_BHW, valid, normaliser).mean()
        assert loss == 0
        loss.backward()
        assert student.grad is not None
        assert student.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [0.0, -0.5])
def test_the_quantile_by_histograms_is_the_sorted_one(dtype, low):
    """Bit for bit: with ties, tiny and negative scores, and crowds near 1 that equal bins would not tell apart."""
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(50_000, generator=generator, dtype=dtype) ** 3 + low
    score[:20_000] = 1 - score[:20_000].abs() * 1e-4
    score[40_000:42_000] = 0.25
    score[42_000:42_010] = torch.tensor(-0.0)
    valid = torch.rand(50_000, generator=generator) < 0.8
    ordered = score[valid].sort().values
    for share in (1e-3, 0.05, 0.4, 0.5, 0.77, 0.99, 1.0):
        below = int(np.floor(share * len(ordered) + 1e-9))
        assert quantile(score, valid, share) == ordered[below - 1]
    assert quantile(score, valid, 0.0) == -torch.inf


def test_ranks_that_add_up_their_counts_find_the_quantile_of_all():
    score = torch.rand(9_000, generator=torch.Generator().manual_seed(5))
    valid = torch.rand(9_000, generator=torch.Generator().manual_seed(6)) < 0.7
    sizes = [1_000, 3_500, 4_500]
    shared, barrier = [torch.zeros(())] * len(sizes), threading.Barrier(len(sizes))

    def work(rank):
        def reduce(counts):
            shared[rank] = counts.clone()
            barrier.wait()
            total = sum(shared)
            barrier.wait()
            return total

        return quantile(score.split(sizes)[rank], valid.split(sizes)[rank], 0.4, reduce)

    with ThreadPoolExecutor(len(sizes)) as pool:
        found = list(pool.map(work, range(len(sizes))))
    assert found == [quantile(score, valid, 0.4)] * len(sizes)


def test_selection_equals_a_pixel_loop():
    """Preset `paper` end to end: softmax, union with the best neighbour per class, margin, raw quantile, strict bar."""
    generator = torch.Generator().manual_seed(11)
    logits = 2 * torch.randn(2, 4, 5, 6, generator=generator)
    valid = torch.rand(2, 5, 6, generator=generator) < 0.85
    method = registry.build(tiny_settings.train(method="s4mc", steps=100), n_classes=4, total=100, epoch_steps=10)
    chosen = selection.select(method, logits, valid, 50)
    prob = logits.double().softmax(1).numpy()
    raw = np.sort(prob, 1)[:, -1] - np.sort(prob, 1)[:, -2]
    scores = np.sort(raw[valid.numpy()])
    bar = scores[int(np.floor(0.2 * len(scores))) - 1]
    assert float(chosen.bar) == pytest.approx(bar, abs=1e-6)
    for b, y, x in np.ndindex(2, 5, 6):
        union = prob[b, :, y, x].copy()
        for c in range(4):
            near = [
                prob[b, c, yy, xx]
                for yy in range(max(0, y - 1), min(5, y + 2))
                for xx in range(max(0, x - 1), min(6, x + 2))
                if (yy, xx) != (y, x) and valid[b, yy, xx]
            ]
            best = max(near, default=0.0)
            union[c] += best - union[c] * best
        top = np.sort(union)
        assert bool(chosen.keep_BHW[b, y, x]) == bool(valid[b, y, x] and top[-1] - top[-2] > bar)
        if valid[b, y, x]:
            assert int(chosen.label_BHW[b, y, x]) == int(prob[b, :, y, x].argmax())


def test_fixmatch_keeps_confident_pixels_at_or_above_the_bar():
    logits = torch.tensor([[[[2.0, 0.1]], [[0.0, 0.0]]]])
    confidence = float(logits.softmax(1)[0, 0, 0, 0])
    method = registry.fixed(
        registry.build(tiny_settings.train(method="fixmatch"), n_classes=4, total=1, epoch_steps=1), confidence
    )
    chosen = selection.select(method, logits, torch.ones(1, 1, 2, dtype=torch.bool), 0)
    assert chosen.keep_BHW.tolist() == [[[True, False]]]
    assert isinstance(method.threshold, Fixed)


def test_s4mc_without_refinement_and_with_a_fixed_bar_is_fixmatch():
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(2, 4, 6, 6, generator=generator)
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    plain = registry.Method(threshold=Fixed(0.6))
    inert = registry.Method(Refinement(beta=0.0, score="max"), Fixed(0.6), "valid", strict=False)
    a, b = (selection.select(m, logits, valid, 5) for m in (plain, inert))
    assert torch.equal(a.keep_BHW, b.keep_BHW)
    assert torch.equal(a.label_BHW, b.label_BHW)
    assert a.keep_BHW.any()


@pytest.mark.parametrize("method", ["fixmatch", "unimatch", "s4mc", "corrmatch", "s4mc+corrmatch"])
def test_any_method_takes_any_bar(method):
    """The ablation {fixed, quantile, class maxima}: the bar changes, the rest of the method does not."""
    given = {
        "fixmatch": {"threshold": 0.7}, "s4mc": {"alpha": 0.3, "alpha_end": 0.1},
        "corrmatch": {"start": 0.8, "momentum": 0.5},
    }  # fmt: skip

    def built(rule):
        return registry.build(
            tiny_settings.train(method=method, threshold_rule=rule, **given), n_classes=4, total=10, epoch_steps=1
        )

    published, fixed, quantile, maxima = map(built, ("auto", "fixed", "quantile", "class_max"))
    assert fixed.threshold == Fixed(0.7)
    assert quantile.threshold == Partition(0.3, 0.1, 10)
    assert isinstance(maxima.threshold, ClassMax)
    assert (float(maxima.threshold.tau), maxima.threshold.momentum) == (0.8, 0.5)
    for other in (fixed, quantile, maxima):
        assert (other.refinement, other.weights, other.strict) == (
            published.refinement, published.weights, published.strict
        )  # fmt: skip
    if "corrmatch" in method:
        assert quantile.correlation.bar == 0.8  # a quantile of scores is no overlap ratio
    assert (
        registry.build(
            tiny_settings.train(method="supervised", threshold_rule="fixed"), n_classes=4, total=10, epoch_steps=1
        ).threshold
        is None
    )


def test_presets_differ_as_specified():
    table = torch.full((3,), 0.9)
    a = registry.build(
        tiny_settings.train(method="s4mc", s4mc={"preset": "ref_a"}),
        n_classes=3,
        total=100,
        epoch_steps=10,
        table_K=table,
    )
    b = registry.build(
        tiny_settings.train(method="s4mc", s4mc={"preset": "ref_b"}), n_classes=4, total=100, epoch_steps=10
    )
    assert (a.refinement.neighbourhood, a.refinement.joint, a.normaliser, a.strict) == (4, "table", "ratio", True)
    assert (b.refinement.quantity, b.refinement.score, b.strict, b.normaliser) == ("confidence", "max", False, "valid")
    assert b.threshold.alpha(0) == 0.25
    assert b.threshold.alpha(100) == pytest.approx(0.15)
    assert a.threshold.alpha(0) == 0.4
    assert a.threshold.alpha(100) == 0.0
    ours = registry.build(
        tiny_settings.train(method="s4mc", s4mc={"alpha": 0.5, "alpha_end": 0.2}),
        n_classes=4,
        total=100,
        epoch_steps=10,
    )
    assert [ours.threshold.alpha(t) for t in (0, 50, 100)] == pytest.approx([0.5, 0.35, 0.2])


def test_class_maxima_bar_follows_the_loop_and_stays_in_its_range():
    g = torch.Generator().manual_seed(2)
    bar, tau = ClassMax(4, start=0.6, momentum=0.9), 0.6
    for _ in range(8):
        raw, label = torch.rand(2, 5, 6, generator=g), torch.randint(0, 3, (2, 5, 6), generator=g)
        valid = torch.rand(2, 5, 6, generator=g) < 0.6
        best = [float(raw[valid & (label == k)].max()) for k in range(4) if (valid & (label == k)).any()]
        assert len(best) == 3  # class 3 never occurs: it does not count
        tau = 0.9 * tau + 0.1 * sum(best) / len(best)
        assert float(bar.value(raw, label, valid, 0)) == pytest.approx(tau, rel=1e-6)
        assert 0.25 <= tau <= 1
    before = bar.tau.clone()
    assert bar.value(raw, label, torch.zeros_like(valid), 0) == before
    level = torch.full_like(raw, float(before))
    assert torch.isclose(bar.value(level, label, valid, 0), before)  # the fixed point
