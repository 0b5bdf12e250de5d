"""Methods as one step: equivalences (X8), CorrMatch's losses (Q12), exact micro-batches (X4), nothing awaited (R8)."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from no_waits import Watch
from tiny_network import Featured, view
from torch import nn

from pipeline.config import Train
from training import augment, correlate, ema, engine, losses, methods, regions, student
from training import step as step_module
from training.refine import Refinement
from training.student import Outputs, Student
from training.threshold import ClassMax, Fixed

ALL = ("supervised", "fixmatch", "unimatch", "s4mc", "s4mc+unimatch", "corrmatch", "s4mc+corrmatch")
VARIANTS = [
    *({"method": m} for m in ALL),
    {"method": "s4mc", "preset": "ref_b"},
    {"method": "unimatch", "streams": "v1"},
    {"method": "s4mc+unimatch", "streams": "v1"},
    {"method": "corrmatch", "corrmatch": "reference"},
    {"method": "corrmatch", "teacher": "ema"},
    {"method": "fixmatch", "teacher": "self"},
    {"method": "fixmatch", "supervised_loss": "ohem", "ohem_pixels": 40},
    *({"method": "s4mc+corrmatch", "combine": c} for c in (["j1"], ["j2"], ["j3"], ["j1", "j2", "j3"])),
]


def build(n_classes=3, **changes):
    config = Train(**{"threshold": 0.4, "corrmatch_start": 0.4, **changes})
    return methods.build(config, n_classes=n_classes, total=10, epoch_steps=4)


def run(method, *, model=None, chunks=1, at=3, seed=0, hook=lambda s: s, views=None, cutmix=0.9):
    """One step on a fresh network; returns the step, the student and its gradients by name."""
    torch.manual_seed(7)
    model = model or Featured()
    trained = engine.student_of(model, method, 3).train()
    teacher = ema.teacher_of(model)
    torch.manual_seed(seed)
    labelled, unlabelled = views or (view(4, 1), view(4, 2))
    partner = view(4, 3) if method.partner == "same" else None
    done = step_module.step(
        method, hook(trained), teacher, labelled, unlabelled, ignore=255, at=at, unsup_weight=0.8, cutmix=cutmix,
        generator=torch.Generator().manual_seed(seed), partner=partner, chunks=chunks,
    )  # fmt: skip
    return done, trained, {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_method_gives_a_finite_loss_and_reaches_every_weight(changes):
    method = build(**changes)
    done, trained, grads = run(method)
    assert set(done.losses) == {name for name, weight in method.weights.items() if weight} or method.threshold is None
    assert done.loss.isfinite()
    assert set(grads) == {n for n, _ in trained.named_parameters()}
    assert all(g.isfinite().all() for g in grads.values())
    assert any(g.abs().max() > 0 for n, g in grads.items() if "head" in n)


def assert_same(a, b, names=None):
    one, two = run(a)[2], run(b)[2]
    for name in names or two:
        assert torch.equal(one[name], two[name]), name


def test_x8_s4mc_that_refines_nothing_under_a_fixed_bar_is_fixmatch():
    plain = build(method="fixmatch")
    inert = replace(
        build(method="s4mc"), refinement=Refinement(beta=0.0, score="max"), strict=False, normaliser="valid",
        threshold=Fixed(0.4),
    )  # fmt: skip
    assert_same(inert, plain)


def test_x8_corrmatch_without_its_terms_under_a_fixed_bar_is_fixmatch():
    plain = build(method="fixmatch", teacher="self")
    corr = build(method="corrmatch")
    bare = replace(
        corr, threshold=Fixed(0.4), weights=plain.weights, correlation=replace(corr.correlation, regions="off")
    )  # fmt: skip
    assert_same(bare, plain)
    assert len(run(bare)[2]) == len(run(plain)[2])  # the head, present, gets no gradient


@pytest.mark.parametrize(("streams", "teacher"), [("v1", "self"), ("v2", "ema")])
def test_x8_unimatch_with_one_stream_and_no_dropped_channels_is_fixmatch(streams, teacher):
    plain = build(method="fixmatch", teacher=teacher)
    uni = replace(build(method="unimatch", streams=streams), streams=1, weights=plain.weights)
    assert_same(replace(uni, dropout="none") if streams == "v2" else uni, plain)


def test_x8_the_equivalences_can_fail():
    with pytest.raises(AssertionError):
        assert_same(build(method="s4mc"), build(method="fixmatch"))
    with pytest.raises(AssertionError):
        assert_same(build(method="unimatch"), build(method="fixmatch"))


CUTTABLE = ({"method": "supervised"}, {"method": "fixmatch"}, {"method": "s4mc"}, {"method": "s4mc", "preset": "ref_b"})


@pytest.mark.parametrize("changes", CUTTABLE, ids=str)
@pytest.mark.parametrize("chunks", [2, 4])
def test_x4_micro_batches_have_the_gradient_of_the_whole_batch(changes, chunks):
    """Counts differ between the chunks (ignored corners, an empty selection); no BatchNorm, which sees its batch only."""
    views = view(4, 1), view(4, 2)
    views[0].label_BHW[2] = 255
    method = build(**changes)

    def once(chunks):
        torch.manual_seed(5)
        return run(method, model=Double(dropout=0.0, norm=False).double(), views=views, chunks=chunks)

    (whole, _, expected), (parts, _, gradients) = once(1), once(chunks)
    assert torch.isclose(whole.loss, parts.loss, rtol=1e-6)
    for name, term in parts.losses.items():
        assert torch.isclose(term.mean(), whole.losses[name].mean(), rtol=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-8), name


class Double(Featured):
    """Float64 inside, so that only the arithmetic of the losses differs between one batch and its parts."""

    def encode(self, image_BCHW):
        return super().encode(image_BCHW.double())


@pytest.mark.parametrize("changes", [{"method": "corrmatch"}, {"method": "unimatch", "streams": "v1"}], ids=str)
def test_micro_batches_are_refused_where_they_cannot_be_exact(changes):
    with pytest.raises(ValueError, match="accumulate"):
        Train(**changes, accumulate=2)
    with pytest.raises(ValueError, match=r"train\.accumulate"):
        run(build(**changes), chunks=2)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"method": "s4mc", "accumulate": 4, "batch_labelled": 4, "batch_unlabelled": 8}, "one image a micro-batch"),
        ({"method": "s4mc", "accumulate": 3, "batch_labelled": 8}, "does not divide"),
        ({"method": "fixmatch", "accumulate": 2, "supervised_loss": "ohem"}, "ohem"),
        ({"method": "s4mc+corrmatch", "corrmatch": "reference", "combine": ["j3"]}, "j3"),
    ],
)
def test_settings_that_cannot_work_together_are_refused_before_any_work(changes, names):
    with pytest.raises(ValueError, match=names):
        Train(**changes)


@pytest.mark.parametrize(
    "wait", [lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: t.__setitem__(t > 0, 1.0)]
)
def test_the_watch_sees_waits(wait):
    with pytest.raises(AssertionError, match="waits for the device"), Watch():
        wait(torch.ones(3))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_r8_a_step_never_asks_for_a_value(changes, monkeypatch):
    method = build(**changes)
    forbidden = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")

    def guard(trained):
        for name in forbidden:
            monkeypatch.setattr(torch.Tensor, name, _refuse(name))
        return trained

    with Watch():
        try:
            run(method, hook=guard)
        finally:
            monkeypatch.undo()


def _refuse(name):
    def refused(self, *args, **kwargs):
        raise AssertionError(f"Tensor.{name} inside a step")

    return refused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card: torch's own synchronisation alarm")
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_r8_no_synchronisation_on_a_card(changes):
    method = build(**changes)
    model = Featured().cuda()
    trained, teacher = engine.student_of(model, method, 3).cuda().train(), ema.teacher_of(model)
    views = [view(4, seed) for seed in (1, 2, 3)]
    views = [augment.View(*(x.cuda() for x in (v.image_BCHW, v.label_BHW, v.valid_BHW))) for v in views]
    for attempt in range(3):  # the first ones may allocate and load kernels
        torch.cuda.set_sync_debug_mode("error" if attempt == 2 else "default")
        try:
            step_module.step(
                method, trained, teacher, views[0], views[1], ignore=255, at=3, unsup_weight=0.8, cutmix=0.9,
                generator=torch.Generator().manual_seed(0), partner=views[2] if method.partner == "same" else None,
            )  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Plain(nn.Module):
    """A user's own network: logits and nothing else."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 3, 1)

    def forward(self, image_BCHW):
        return self.head(image_BCHW / 255)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_network_of_logits_runs_every_method_that_needs_no_features(changes):
    method = build(**changes)
    if "unimatch" in changes["method"] or "corrmatch" in changes["method"]:
        with pytest.raises(student.NoFeatures, match=r"Plain gives logits only.*encode"):
            run(method, model=Plain())
    else:
        assert run(method, model=Plain())[0].loss.isfinite()


def test_v2_masks_are_complementary_and_half_of_the_samples_keep_everything():
    torch.manual_seed(0)
    rows = student.Rows(2, 0, 6, 2)
    features = [torch.ones(14, 40, 3, 3), torch.ones(14, 8, 2, 2)]
    whole_per_level = []
    for before, after in zip(features, student.complementary(features, rows), strict=True):
        labelled, weak, (one, two) = rows.split(after)
        assert torch.equal(labelled, before[:2])
        assert len(weak) == 0
        assert torch.equal(one + two, torch.full_like(one, 2.0))
        whole = (one == 1).all(dim=(1, 2, 3))
        assert whole.sum() == 3
        assert set(one[~whole].unique().tolist()) == {0.0, 2.0}
        assert torch.equal(one.amax((2, 3)), one.amin((2, 3)))  # whole channels
        whole_per_level.append(whole)
    assert torch.equal(*whole_per_level)


def test_v1_drops_channels_of_the_weak_views_alone_and_decodes_everything_once():
    calls = []

    class Spy(Featured):
        def decode(self, features, size):
            calls.append([f.clone() for f in features])
            return super().decode(features, size)

    run(build(method="unimatch", streams="v1"), model=Spy())
    (features,) = calls
    images = 4 + 4 + 2 * 4
    for level in features[1:]:
        clean, dropped = level[4:8], level[images:]
        assert len(level) == images + 4
        alive = dropped.abs().amax((2, 3)) > 0
        assert torch.allclose(dropped, torch.where(alive[:, :, None, None], 2 * clean, torch.zeros(())))
        assert 0.2 < 1 - alive[clean.abs().amax((2, 3)) > 0].double().mean() < 0.8


# CorrMatch's step against plain loops over the text of ALGORITHMS.md 3.3 to 3.5.

B, K, H, W = 2, 3, 6, 8


def given(seed=0, grid=(3, 4)):
    """Outputs of an imaginary network, float64 leaves."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=2.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_()

    n = grid[0] * grid[1]
    return Outputs(
        leaf(B, K, H, W), leaf(B, K, H, W), [leaf(B, K, H, W)], leaf(B, K, H, W),
        (leaf(B, K, H, W), leaf(B, K, H, W), [leaf(B, K, H, W)]), leaf(B, K, n, scale=1.0).detach(),
        leaf(B, K, n, scale=1.0).detach(), grid,
    )  # fmt: skip


def softmax(logits):
    shifted = np.exp(logits - logits.max(0))
    return shifted / shifted.sum(0)


def ce(logits, label):
    return -math.log(softmax(logits)[label])


@pytest.mark.parametrize("reference", [False, True])
def test_q12_corrmatch_terms_equal_plain_loops(reference):
    out = given()
    labelled, unlabelled = view(B, 1, (H, W)), view(B, 2, (H, W))
    method = build(method="corrmatch", corrmatch="reference" if reference else "mended", corrmatch_start=0.55)
    how = replace(method.correlation, regions="off")  # regions: test_regions
    method = replace(method, correlation=how, partner="batch")
    done = step_module.step(
        method, lambda *_: out, nn.Identity(), labelled, unlabelled, ignore=255, at=0, unsup_weight=1.0, cutmix=1.0,
        generator=torch.Generator().manual_seed(3), backward=lambda loss: None,
    )  # fmt: skip
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


def test_q12_divergence_is_zero_for_equal_inputs_and_positive_otherwise():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 3, generator=g)
    keep = torch.ones(2, 3, 3, dtype=torch.bool)
    assert losses.divergence(logits, logits.softmax(1), keep, keep).mean().abs() < 1e-6
    other = torch.randn(2, 4, 3, 3, generator=g).softmax(1)
    assert losses.divergence(logits, other, keep, keep).mean() > 0
    assert losses.divergence(logits, other, ~keep, keep).mean() == 0


def test_q12_a_box_swapped_between_two_images_swaps_what_they_contribute():
    """With the target mixed like the image (K1 mended), pasting a's box into b moves a's divergence there."""
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


def test_hard_pixels_are_those_below_the_bar_or_the_least_sure():
    g = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(2, K, 7, 9, generator=g)
    label = torch.randint(0, K, (2, 7, 9), generator=g)
    label[0, :3] = 255
    p = logits.double().softmax(1).numpy()
    sure = {q: p[q[0], label[q], q[1], q[2]] for q in np.ndindex(2, 7, 9) if label[q] != 255}
    for bar, least in ((0.7, 10), (0.1, 30), (0.0, 5), (0.2, 10_000)):
        limit = max(bar, sorted(sure.values())[min(least, len(sure)) - 1])
        used = [v for v in sure.values() if v <= limit * (1 + 1e-6)]
        loss = losses.hard(logits, label, 255, sure=bar, least=least)
        assert int(loss.count) == len(used)
        assert float(loss.mean()) == pytest.approx(-np.mean(np.log(used)), rel=1e-5)


def test_t7_class_maxima_bar_follows_the_loop_and_stays_in_its_range():
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


def test_j1_feeds_raw_scores_to_the_slow_bar_and_j2_gives_regions_their_own():
    j1, j2 = (build(method="s4mc+corrmatch", combine=c) for c in (["j1"], ["j1", "j2"]))
    logits = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    chosen = step_module.select(j1, logits, valid, 0)
    plain = step_module.select(build(method="corrmatch"), logits, valid, 0)
    assert chosen.bar == plain.bar
    assert chosen.keep_BHW.sum() > plain.keep_BHW.sum()
    assert (j1.correlation.bar, j2.correlation.bar) == (None, 0.4)
    assert (j1.refinement.score, j2.refinement.score) == ("max", "margin")
    assert j2.strict


def test_the_students_wrapper_is_only_a_wrapper():
    torch.manual_seed(0)
    model = Featured().eval()
    image = view(3, 1).image_BCHW
    assert torch.equal(Student(model)(image, student.Rows(3)).labelled, model(image))


def corr_step(method, monkeypatch, partner=None):
    """One CorrMatch step on imaginary outputs; returns it, the outputs, the box, and the arguments of `regions.propagate`."""
    out, seen = given(seed=5), []
    index, real = torch.arange(12).repeat(2), regions.propagate

    def propagate(*args, **kwargs):
        seen.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(correlate, "sample", lambda *args, **kwargs: index)
    monkeypatch.setattr(regions, "propagate", propagate)
    done = step_module.step(
        method, Fixture(out), nn.Identity(), view(B, 1, (H, W)), view(B, 2, (H, W)), ignore=255, at=5,
        unsup_weight=1.0, cutmix=1.0, generator=torch.Generator().manual_seed(3), partner=partner,
        backward=lambda loss: None,
    )  # fmt: skip
    return done, out, augment.boxes(B, (H, W), 1.0, torch.Generator().manual_seed(3)), index, seen


class Fixture(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, *args):
        return self.out


def test_regions_grow_the_mixed_selection_outside_the_box_and_leave_the_soft_loss_alone(monkeypatch):
    method = build(method="corrmatch", corrmatch_start=0.45)
    done, out, box, index, _ = corr_step(method, monkeypatch)
    valid = view(B, 2, (H, W)).valid_BHW
    label, sure, ok = (augment.mix(v, box) for v in (done.selection.label_BHW, done.selection.keep_BHW, valid))
    mask = regions.masks(correlate.rows(out.one, out.two, index), out.grid, (H, W))
    bar = done.selection.bar
    grown = [
        regions.propagate(label, sure, mask & cleared[:, None], bar, bar, n_classes=K) for cleared in (ok & ~box, ok)
    ]
    (y, keep), (other_y, other_keep) = grown
    assert (keep & ~sure).any()
    assert not (torch.equal(keep, other_keep) and torch.equal(y, other_y))  # the box matters here
    expected = losses.masked(out.strong[0], y, keep, ok, "valid").mean()
    assert torch.isclose(done.losses["unsupervised"].mean(), expected)
    soft = augment.mix(out.weak.detach().float().softmax(1), box)
    assert torch.isclose(done.losses["divergence"].mean(), losses.divergence(out.strong[0], soft, sure, ok).mean())


def test_regions_are_judged_by_the_slow_bar_or_under_j2_by_their_own(monkeypatch):
    done, *_, seen = corr_step(build(method="corrmatch", corrmatch_start=0.45), monkeypatch)
    assert [tuple(args[3:5]) for args in seen] == [(done.selection.bar, done.selection.bar)]
    *_, seen = corr_step(build(method="s4mc+corrmatch", combine=["j1", "j2"], corrmatch_start=0.3), monkeypatch)
    assert [tuple(args[3:5]) for args in seen] == [(0.3, 0.3)]


def test_a_partner_of_the_same_image_does_not_move_the_slow_bar_again(monkeypatch):
    method = build(method="corrmatch", corrmatch="reference", corrmatch_momentum=0.5)
    method = replace(method, correlation=replace(method.correlation, mixed_valid=False))
    done, *_ = corr_step(method, monkeypatch, partner=view(B, 9, (H, W)))
    assert done.selection.bar != 0.4
    assert method.threshold.tau == done.selection.bar
