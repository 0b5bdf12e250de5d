"""CorrMatch's step against plain loops over the text of the method, and its unions with S4MC."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.training.tiny_network import view
from tests.support.training.tiny_step import build, only, run
from training.methods import augment, corrmatch, corrmatch_regions, losses, selection
from training.methods.step import SemiSupervisedStep, Views
from training.methods.student import Outputs

B, K, H, W = 2, 3, 6, 8


def given(seed=0, grid=(3, 4)):
    """Outputs of an imaginary network, float64 leaves."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=2.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_()

    n = grid[0] * grid[1]
    return Outputs(
        leaf(B, K, H, W), leaf(B, K, H, W), [leaf(B, K, H, W)], leaf(B, K, H, W),
        (leaf(B, K, H, W), leaf(B, K, H, W), [leaf(B, K, H, W)]),
        corrmatch.Embeddings(leaf(B, K, n, scale=1.0).detach(), leaf(B, K, n, scale=1.0).detach(), grid),
    )  # fmt: skip


def softmax(logits):
    shifted = np.exp(logits - logits.max(0))
    return shifted / shifted.sum(0)


def ce(logits, label):
    return -math.log(softmax(logits)[label])


@pytest.mark.parametrize("reference", [False, True])
def test_corrmatch_terms_equal_plain_loops(reference):
    out = given()
    labelled, unlabelled = view(B, 1, (H, W)), view(B, 2, (H, W))
    method = build(method="corrmatch", corrmatch={"variant": "reference" if reference else "corrected", "start": 0.55})
    how = replace(method.correlation, regions="off")  # regions: test_regions
    method = replace(method, correlation=how, partner="batch")
    step = SemiSupervisedStep(method, Fixture(out), nn.Identity(), ignore=255, cutmix=1.0)
    done = step(Views(labelled, unlabelled), 0, 1.0, torch.Generator().manual_seed(3))
    box = augment.boxes(B, (H, W), 1.0, torch.Generator().manual_seed(3)).numpy()
    assert box.any()
    assert not box.all()
    valid, truth = unlabelled.valid_BHW.numpy(), labelled.label_BHW.numpy()
    x, w, s, fp = (v.detach().numpy() for v in (out.labelled, out.weak, out.strong[0], out.perturbed))
    xc, wc, sc = (v.detach().numpy() for v in (out.corr[0], out.corr[1], out.corr[2][0]))
    at = list(np.ndindex(B, H, W))
    conf = {(b, i, j): softmax(w[b, :, i, j]).max() for b, i, j in at}
    label = {(b, i, j): int(w[b, :, i, j].argmax()) for b, i, j in at}

    def source(b, i, j):
        return ((b - 1) % B, i, j) if box[b, i, j] else (b, i, j)

    observed = {p: valid[source(*p)] if reference else valid[p] for p in at}
    assert not reference or any(observed[p] and not valid[p] for p in at)
    best = {}
    for p in at:
        if observed[p]:
            best[label[p]] = max(best.get(label[p], 0.0), conf[p])
    assert len(best) == K
    tau = 0.999 * 0.55 + 0.001 * np.mean(list(best.values()))
    assert float(done.selection.bar) == pytest.approx(tau, abs=1e-6)
    keep = {p: conf[p] >= tau and valid[p] for p in at}
    n_m, n_w = sum(valid[source(*p)] for p in at), int(valid.sum())
    known = [p for p in at if truth[p] != 255]

    def mean(values, n):
        return sum(values) / n

    def kl(p):
        q = source(*p) if not reference else p
        target, ours = softmax(w[q[0], :, q[1], q[2]]), softmax(s[p[0], :, p[1], p[2]])
        return float((target * (np.log(target) - np.log(ours))).sum())

    def on(logits, p, y):
        return ce(logits[p[0], :, p[1], p[2]], y)

    expected = {
        "supervised": mean((on(x, p, truth[p]) for p in known), len(known)),
        "supervised_corr": mean((on(xc, p, truth[p]) for p in known), len(known)),
        "unsupervised": mean((on(s, p, label[source(*p)]) for p in at if keep[source(*p)]), n_m),
        "corr_strong": mean((on(sc, p, label[source(*p)]) for p in at if keep[source(*p)]), n_m),
        "corr_weak": mean((on(wc, p, label[p]) for p in at if keep[p]), n_w),
        "perturbed": mean((on(fp, p, label[p]) for p in at if keep[p]), n_w),
        "divergence": mean((kl(p) for p in at if keep[source(*p)]), n_m),
    }
    for name, value in expected.items():
        assert float(done.losses[name].mean()) == pytest.approx(value, rel=1e-5), name
    weights = {"supervised": 0.25, "supervised_corr": 0.25, "unsupervised": 0.125, "perturbed": 0.125}
    weights |= {"divergence": 0.125, "corr_strong": 0.0625, "corr_weak": 0.0625}
    assert float(done.loss) == pytest.approx(sum(weights[n] * v for n, v in expected.items()), rel=1e-5)


def test_divergence_is_zero_for_equal_inputs_and_positive_otherwise():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 3, generator=g)
    keep = torch.ones(2, 3, 3, dtype=torch.bool)
    assert losses.divergence(logits, logits.softmax(1), keep, keep).mean().abs() < 1e-6
    other = torch.randn(2, 4, 3, 3, generator=g).softmax(1)
    assert losses.divergence(logits, other, keep, keep).mean() > 0
    assert losses.divergence(logits, other, ~keep, keep).mean() == 0


def test_divergence_is_divided_by_the_valid_pixels_whatever_the_normaliser():
    plain = build(method="corrmatch", corrmatch={"start": 0.45})
    one, two = (run(method)[0].losses for method in (plain, replace(plain, normaliser="kept")))
    assert two["divergence"].count == one["divergence"].count
    assert 0 < two["corr_weak"].count < one["corr_weak"].count


def test_a_box_swapped_between_two_images_swaps_what_they_contribute():
    """With the target mixed like the image (the published form does not), pasting a's box into b moves a's divergence there."""
    g = torch.Generator().manual_seed(1)
    target, logits = torch.randn(2, K, H, W, generator=g).softmax(1), torch.randn(2, K, H, W, generator=g)
    box = torch.zeros(2, H, W, dtype=torch.bool)
    box[:, 1:4, 2:6] = True
    keep = torch.ones(2, H, W, dtype=torch.bool)

    def inside(ours, theirs, b):
        return losses.divergence(ours, theirs, keep & box & (torch.arange(2) == b)[:, None, None], keep).total

    swapped = inside(augment.mix(logits, box), augment.mix(target, box), 1)
    assert torch.isclose(swapped, inside(logits, target, 0))
    assert not torch.isclose(inside(augment.mix(logits, box), target, 1), inside(logits, target, 0))  # as published


def test_the_slow_threshold_is_fed_raw_scores_and_the_falling_quantile_gives_regions_their_own():
    parts = (["refined_selection"], ["refined_selection", "falling_quantile"])
    slow, falling = (build(method="s4mc+corrmatch", s4mc_corrmatch=only(*names)) for names in parts)
    logits = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    chosen = selection.select(slow, logits, valid, 0)
    plain = selection.select(build(method="corrmatch"), logits, valid, 0)
    assert chosen.bar == plain.bar
    assert chosen.keep_BHW.sum() > plain.keep_BHW.sum()
    assert (slow.correlation.bar, falling.correlation.bar) == (None, 0.4)
    assert (slow.refinement.score, falling.refinement.score) == ("max", "margin")
    assert falling.strict


def corr_step(method, monkeypatch, partner=None):
    """One CorrMatch step on imaginary outputs: it, the outputs, the box, and what `corrmatch_regions.propagate` was given."""
    out, seen = given(seed=5), []
    index, real = torch.arange(12).repeat(2), corrmatch_regions.propagate

    def propagate(*args, **kwargs):
        seen.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(corrmatch, "sample", lambda *args, **kwargs: index)
    monkeypatch.setattr(corrmatch_regions, "propagate", propagate)
    step = SemiSupervisedStep(method, Fixture(out), nn.Identity(), ignore=255, cutmix=1.0)
    views = Views(view(B, 1, (H, W)), view(B, 2, (H, W)), partner)
    done = step(views, 5, 1.0, torch.Generator().manual_seed(3))
    return done, out, augment.boxes(B, (H, W), 1.0, torch.Generator().manual_seed(3)), index, seen


class Fixture(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, *args):
        return self.out


def test_regions_grow_the_mixed_selection_outside_the_box_and_leave_the_soft_loss_alone(monkeypatch):
    method = build(method="corrmatch", corrmatch={"start": 0.45})
    done, out, box, index, _ = corr_step(method, monkeypatch)
    valid = view(B, 2, (H, W)).valid_BHW
    label, sure, ok = (augment.mix(v, box) for v in (done.selection.label_BHW, done.selection.keep_BHW, valid))
    mask = corrmatch_regions.masks(
        corrmatch.rows(out.embeddings.one_BKN, out.embeddings.two_BKN, index), out.embeddings.grid, (H, W)
    )
    bar = done.selection.bar
    grown = [
        corrmatch_regions.propagate(label, sure, mask & cleared[:, None], bar, bar, n_classes=K)
        for cleared in (ok & ~box, ok)
    ]
    (y, keep), (other_y, other_keep) = grown
    assert (keep & ~sure).any()
    assert not (torch.equal(keep, other_keep) and torch.equal(y, other_y))  # the box matters here
    expected = losses.masked(out.strong[0], y, keep, ok, "valid").mean()
    assert torch.isclose(done.losses["unsupervised"].mean(), expected)
    soft = augment.mix(out.weak.detach().float().softmax(1), box)
    assert torch.isclose(done.losses["divergence"].mean(), losses.divergence(out.strong[0], soft, sure, ok).mean())


def test_regions_are_judged_by_the_slow_bar_or_under_j2_by_their_own(monkeypatch):
    done, *_, seen = corr_step(build(method="corrmatch", corrmatch={"start": 0.45}), monkeypatch)
    assert [tuple(args[3:5]) for args in seen] == [(done.selection.bar, done.selection.bar)]
    *_, seen = corr_step(
        build(
            method="s4mc+corrmatch",
            s4mc_corrmatch=only("refined_selection", "falling_quantile"),
            corrmatch={"start": 0.3},
        ),
        monkeypatch,
    )
    assert [tuple(args[3:5]) for args in seen] == [(0.3, 0.3)]


def test_a_partner_of_the_same_image_does_not_move_the_slow_bar_again(monkeypatch):
    method = build(method="corrmatch", corrmatch={"variant": "reference", "momentum": 0.5})
    method = replace(method, correlation=replace(method.correlation, mixed_valid=False))
    done, *_ = corr_step(method, monkeypatch, partner=view(B, 9, (H, W)))
    assert done.selection.bar != 0.4
    assert method.threshold.tau == done.selection.bar
