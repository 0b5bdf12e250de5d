"""Methods as one step: equivalences, exact micro-batches, nothing awaited, dropped channels."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support import tiny_settings
from tests.support.training.device_sync import Watch
from tests.support.training.tiny_network import Featured, view
from tests.support.training.tiny_step import PARTS, build, only, run
from training.engine import ema
from training.engine.distributed import Group, Ranks
from training.methods import augment, student
from training.methods.s4mc import Refinement
from training.methods.selection import Labels, mixed
from training.methods.step import SemiSupervisedStep, Views
from training.methods.student import Student, student_of
from training.methods.threshold import Fixed

ALL = ("supervised", "fixmatch", "unimatch", "s4mc", "s4mc+unimatch", "corrmatch", "s4mc+corrmatch")
VARIANTS = [
    *({"method": m} for m in ALL),
    {"method": "s4mc", "s4mc": {"preset": "ref_b"}},
    {"method": "s4mc", "s4mc": {"preset": "weighted"}},
    {"method": "unimatch", "unimatch": {"streams": "v1"}},
    {"method": "s4mc+unimatch", "unimatch": {"streams": "v1"}},
    {"method": "corrmatch", "corrmatch": {"variant": "reference"}},
    {"method": "corrmatch", "teacher": "ema"},
    {"method": "s4mc+corrmatch", "teacher": "ema", "s4mc": {"preset": "weighted"}},
    {"method": "fixmatch", "teacher": "self"},
    {"method": "fixmatch", "supervised_loss": "ohem", "ohem": {"pixels": 40}},
    *({"method": "s4mc+corrmatch", "s4mc_corrmatch": only(*parts)} for parts in (*zip(PARTS, strict=True), PARTS)),
]


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


def test_s4mc_that_refines_nothing_under_a_fixed_bar_is_fixmatch():
    plain = build(method="fixmatch")
    inert = replace(
        build(method="s4mc"), refinement=Refinement(beta=0.0, score="max"), strict=False, normaliser="valid",
        threshold=Fixed(0.4),
    )  # fmt: skip
    assert_same(inert, plain)


def test_weighted_s4mc_that_weighs_alike_is_the_unweighted():
    """What is new in the preset, taken out, leaves S4MC; left in, it changes the gradient."""
    weighted = build(method="s4mc", s4mc={"preset": "weighted"})
    how = weighted.refinement
    plain = replace(build(method="s4mc"), normaliser="valid")

    assert_same(replace(weighted, refinement=replace(how, weight="equal", label_from="raw")), plain)
    with pytest.raises(AssertionError):
        assert_same(replace(weighted, refinement=replace(how, label_from="raw")), plain)


def test_weights_reach_every_unlabelled_term_of_corrmatch():
    """Pixels that count nothing leave the gradient of the labels alone, whichever term they are in."""
    both = build(method="s4mc+corrmatch", teacher="ema", s4mc={"preset": "weighted"})
    done, _, _ = run(both)
    assert both.refinement.weight == "score"

    plain, _, _ = run(replace(both, refinement=replace(both.refinement, weight="equal")))
    terms = {"unsupervised", "perturbed", "divergence", "corr_strong", "corr_weak"}
    lighter = {name for name in done.losses if done.losses[name].total < plain.losses[name].total}
    assert lighter == terms


def test_corrmatch_without_its_terms_under_a_fixed_bar_is_fixmatch():
    plain = build(method="fixmatch", teacher="self")
    corr = build(method="corrmatch")
    bare = replace(
        corr, threshold=Fixed(0.4), weights=plain.weights, correlation=replace(corr.correlation, regions="off")
    )  # fmt: skip
    assert_same(bare, plain)
    assert len(run(bare)[2]) == len(run(plain)[2])  # the head, present, gets no gradient


@pytest.mark.parametrize(("streams", "teacher"), [("v1", "self"), ("v2", "ema")])
def test_unimatch_with_one_stream_and_no_dropped_channels_is_fixmatch(streams, teacher):
    plain = build(method="fixmatch", teacher=teacher)
    uni = replace(build(method="unimatch", unimatch={"streams": streams}), streams=1, weights=plain.weights)
    assert_same(replace(uni, dropout="none") if streams == "v2" else uni, plain)


def test_the_equivalences_can_fail():
    with pytest.raises(AssertionError):
        assert_same(build(method="s4mc"), build(method="fixmatch"))
    with pytest.raises(AssertionError):
        assert_same(build(method="unimatch"), build(method="fixmatch"))


CUTTABLE = (
    {"method": "supervised"},
    {"method": "fixmatch"},
    {"method": "s4mc"},
    {"method": "s4mc", "s4mc": {"preset": "ref_b"}},
    {"method": "s4mc", "s4mc": {"preset": "weighted"}},
)


@pytest.mark.parametrize("changes", CUTTABLE, ids=str)
@pytest.mark.parametrize("chunks", [2, 4])
def test_micro_batches_have_the_gradient_of_the_whole_batch(changes, chunks):
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


@pytest.mark.parametrize(
    ("changes", "chunks"),
    [
        *((c, 1) for c in VARIANTS if "s4mc" not in c["method"] and "ohem" not in c.values()),
        *((c, 2) for c in CUTTABLE[:2]),
    ],
    ids=str,
)
def test_two_ranks_with_the_same_images_find_what_one_finds_and_add_up_twice(changes, chunks):
    """Not for quantiles, whose bar may fall between an image's pixel and its twin's."""
    said = []

    def add(value):
        said.append(value)
        return 2 * value

    one, _, expected = run(build(**changes), chunks=chunks)
    two, _, gradients = run(build(**changes), chunks=chunks, group=Group(Ranks(0, 2, add)))
    assert len(said) == 2  # what divides the terms, and what the log says of them
    for name, term in one.losses.items():
        assert torch.equal(two.losses[name].count, 2 * term.count)
        assert torch.equal(two.losses[name].total, 2 * term.total)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


class Double(Featured):
    """Float64 inside, so that only the arithmetic of the losses differs between one batch and its parts."""

    def encode(self, image_BCHW):
        return super().encode(image_BCHW.double())


@pytest.mark.parametrize(
    "changes", [{"method": "corrmatch"}, {"method": "unimatch", "unimatch": {"streams": "v1"}}], ids=str
)
def test_micro_batches_are_refused_where_they_cannot_be_exact(changes):
    with pytest.raises(ValueError, match="accumulate"):
        tiny_settings.train(**changes, accumulate=2)
    with pytest.raises(ValueError, match=r"train\.accumulate"):
        run(build(**changes), chunks=2)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"method": "s4mc", "accumulate": 4, "batch_labelled": 4, "batch_unlabelled": 8}, "one image a micro-batch"),
        ({"method": "s4mc", "accumulate": 3, "batch_labelled": 8}, "does not divide"),
        ({"method": "fixmatch", "accumulate": 2, "supervised_loss": "ohem"}, "ohem"),
        (
            {
                "method": "s4mc+corrmatch",
                "corrmatch": {"variant": "reference"},
                "s4mc_corrmatch": only("correlated_neighbours"),
            },
            "correlated_n",
        ),
    ],
)
def test_settings_that_cannot_work_together_are_refused_before_any_work(changes, names):
    with pytest.raises(ValueError, match=names):
        tiny_settings.train(**changes)


@pytest.mark.parametrize(
    "wait", [lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: t.__setitem__(t > 0, 1.0)]
)
def test_the_watch_sees_waits(wait):
    with pytest.raises(AssertionError, match="waits for the device"), Watch():
        wait(torch.ones(3))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_step_never_asks_for_a_value(changes, monkeypatch):
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
def test_no_synchronisation_on_a_card(changes):
    method = build(**changes)
    model = Featured().cuda()
    trained, teacher = student_of(model, method, 3).cuda().train(), ema.teacher_of(model)
    views = [view(4, seed) for seed in (1, 2, 3)]
    views = [augment.View(*(x.cuda() for x in (v.image_BCHW, v.label_BHW, v.valid_BHW))) for v in views]
    for attempt in range(3):  # the first ones may allocate and load kernels
        torch.cuda.set_sync_debug_mode("error" if attempt == 2 else "default")
        try:
            partner = views[2] if method.partner == "same" else None
            step = SemiSupervisedStep(method, trained, teacher, ignore=255, cutmix=0.9)
            step(Views(views[0], views[1], partner), 3, 0.8, torch.Generator().manual_seed(0))
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


def test_masks_are_complementary_and_half_of_the_samples_keep_everything():
    torch.manual_seed(0)
    rows = student.Rows(2, 0, 6, 2)
    features = [torch.ones(14, 40, 3, 3), torch.ones(14, 8, 2, 2)]
    whole_per_level = []
    spared = student.spared(6, torch.Generator().manual_seed(0))
    for before, after in zip(features, student.complementary(features, rows, spared), strict=True):
        labelled, weak, (one, two) = rows.split(after)
        assert torch.equal(labelled, before[:2])
        assert len(weak) == 0
        assert torch.equal(one + two, torch.full_like(one, 2.0))
        whole = (one == 1).all(dim=(1, 2, 3))
        assert torch.equal(whole, spared)
        assert whole.sum() == 3
        assert set(one[~whole].unique().tolist()) == {0.0, 2.0}
        assert torch.equal(one.amax((2, 3)), one.amin((2, 3)))  # whole channels
        whole_per_level.append(whole)
    assert torch.equal(*whole_per_level)


def test_spares_half_of_the_batch_however_it_falls_into_micro_batches(monkeypatch):
    """Half of every micro-batch, as drawn within it, is another rule: four images in pairs never spare one pair whole."""
    real, seen, shares = student.complementary, [], set()

    def complementary(features, rows, spared):
        seen.append(spared)
        return real(features, rows, spared)

    monkeypatch.setattr(student, "complementary", complementary)
    for seed in range(6):
        seen.clear()
        for chunks in (1, 2):
            run(build(method="unimatch"), chunks=chunks, seed=seed)
        whole, *parts = seen
        assert [len(part) for part in parts] == [2, 2]
        assert torch.equal(torch.cat(parts), whole)
        assert whole.sum() == 2
        shares.add(int(parts[0].sum()))
    assert shares != {1}


def test_drops_channels_of_the_weak_views_alone_and_decodes_everything_once():
    calls = []

    class Spy(Featured):
        def decode(self, features, size):
            calls.append([f.clone() for f in features])
            return super().decode(features, size)

    run(build(method="unimatch", unimatch={"streams": "v1"}), model=Spy())
    (features,) = calls
    images = 4 + 4 + 2 * 4
    for level in features[1:]:
        clean, dropped = level[4:8], level[images:]
        assert len(level) == images + 4
        alive = dropped.abs().amax((2, 3)) > 0
        assert torch.allclose(dropped, torch.where(alive[:, :, None, None], 2 * clean, torch.zeros(())))
        assert 0.2 < 1 - alive[clean.abs().amax((2, 3)) > 0].double().mean() < 0.8


def test_the_students_wrapper_is_only_a_wrapper():
    torch.manual_seed(0)
    model = Featured().eval()
    image = view(3, 1).image_BCHW
    assert torch.equal(Student(model)(image, student.Rows(3)).labelled, model(image))


def test_cutmix_moves_weights_with_their_labels():
    box = torch.zeros(2, 4, 4, dtype=torch.bool)
    box[0, 1:3, 1:3] = True
    weight = torch.stack([torch.full((4, 4), 0.25), torch.full((4, 4), 0.75)])
    label = (weight * 4).long()
    everywhere = torch.ones(2, 4, 4, dtype=torch.bool)
    target = mixed(Labels(label, everywhere, everywhere, weight), box, None)
    assert torch.equal(target.label_BHW.float() / 4, target.weight_BHW)
    assert target.weight_BHW[0, 1, 1] == 0.75
    assert [part.weight_BHW.shape for part in target.chunk(2)] == [(1, 4, 4)] * 2
