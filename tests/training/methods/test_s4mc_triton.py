"""The fused S4MC kernel against the tensor form in float64, and the tensor form as its fallback.

The kernel tests run on a CUDA card with Triton, or without a card in Triton's interpreter (a minute or two):
    pip install --target /tmp/tritonlib --no-deps triton
    TRITON_INTERPRET=1 PYTHONPATH=/tmp/tritonlib pytest tests/training/methods/test_s4mc_triton.py
"""

import importlib.util
import os

import pytest
import torch

from training.methods import s4mc, s4mc_triton
from training.methods.s4mc import PRESETS, Refinement

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
kernel = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton and a CUDA card, or Triton with TRITON_INTERPRET=1 (this file's first lines say how)",
)
interpreted_nan = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy announces the NaN of the NaN tests


def inputs(shape=(2, 5, 9, 11), dtype=torch.float32, layout="dense", valid=0.7, seed=0):
    """Logits over a wide range and a mask, both possibly strided; layout: dense, channels_last or strided."""
    generator = torch.Generator().manual_seed(seed)
    n_images, classes, height, width = shape
    if layout == "strided":  # the axes in another order, every other row and a cropped column
        logits = 4 * torch.randn(width + 1, classes, 2 * height, n_images, generator=generator)
        logits = logits.permute(3, 1, 2, 0)[:, :, ::2, 1:]
        valid_BHW = (torch.rand(width, height, n_images, generator=generator) < valid).permute(2, 1, 0)
    else:
        logits = 4 * torch.randn(shape, generator=generator)
        valid_BHW = torch.rand(n_images, height, width, generator=generator) < valid
    logits = logits.to(DEVICE, dtype)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    assert logits.shape == shape
    return logits, valid_BHW.to(DEVICE)


def expected(logits_BKHW, valid_BHW, how, dtype=torch.float64):
    return s4mc.scores(logits_BKHW.to(dtype).softmax(1) * valid_BHW[:, None], how)


def check(logits_BKHW, valid_BHW, how, tolerance=3e-6):
    assert s4mc_triton.supported(logits_BKHW, valid_BHW, how)
    raw, refined, label = s4mc_triton.launch(logits_BKHW, valid_BHW, how)
    want_raw, want_refined, want_label = expected(logits_BKHW, valid_BHW, how)
    assert (raw.dtype, refined.dtype, label.dtype) == (torch.float32, torch.float32, torch.int64)
    for got, want in ((raw, want_raw), (refined, want_refined)):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance, equal_nan=True)
    clear = ~(want_raw < tolerance)  # nearer than that, rounding decides which class is first
    assert torch.equal(label[clear], want_label[clear])
    assert ((label >= 0) & (label < logits_BKHW.shape[1])).all()
    return raw, refined, label


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_is_the_tensor_form(preset, dtype):
    logits, valid = (value.cpu() for value in inputs(dtype=dtype))
    table = torch.linspace(0.5, 0.9, 5, dtype=torch.float64)
    assert not s4mc_triton.available(logits)
    got = s4mc_triton.scores(logits, valid, PRESETS[preset], table)
    want = s4mc.scores(logits.float().softmax(1) * valid[:, None], PRESETS[preset], table)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_the_kernel_does_not_compute_is_refused():
    logits, valid = inputs()
    assert s4mc_triton.supported(logits, valid, PRESETS["paper"])
    others = [
        PRESETS["ref_a"], PRESETS["ref_b"], Refinement(k=2), Refinement(neighbourhood=24), Refinement(beta="decay"),
        Refinement(score="max"), Refinement(label_from="refined"),
    ]  # fmt: skip
    assert not any(s4mc_triton.supported(logits, valid, how) for how in others)
    assert not s4mc_triton.supported(logits.double(), valid, PRESETS["paper"])
    assert not s4mc_triton.supported(logits[:0], valid[:0], PRESETS["paper"])
    assert not s4mc_triton.supported(logits, valid.float(), PRESETS["paper"])
    assert not s4mc_triton.supported(logits, valid[:1], PRESETS["paper"])
    assert not s4mc_triton.supported(torch.zeros(1, 257, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), PRESETS["paper"])


def test_a_kernel_that_cannot_be_built_costs_one_warning(monkeypatch):
    tried = []

    def launch(*_):
        tried.append(1)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(s4mc_triton, "_broken", False)
    monkeypatch.setattr(s4mc_triton, "available", lambda _: not s4mc_triton._broken)
    monkeypatch.setattr(s4mc_triton, "launch", launch)
    logits, valid = inputs()
    with pytest.warns(UserWarning, match="C compiler"):
        first = s4mc_triton.scores(logits, valid, PRESETS["paper"])
    second = s4mc_triton.scores(logits, valid, PRESETS["paper"])
    assert tried == [1]
    want = expected(logits, valid, PRESETS["paper"], torch.float32)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, want, strict=True))


@kernel
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((2, 2, 1, 9), torch.float32, "dense"),
        ((1, 6, 19, 1), torch.bfloat16, "channels_last"),
        ((1, 21, 1, 1), torch.float32, "strided"),
        ((2, 21, 17, 35), torch.float32, "channels_last"),  # 17 rows: one more than a program finishes
        ((2, 21, 18, 70), torch.bfloat16, "channels_last"),  # wider than a program's strip
        ((1, 6, 34, 20), torch.float16, "strided"),
        ((1, 2, 5, 300), torch.float32, "dense"),
        ((1, 150, 6, 20), torch.float32, "dense"),
        ((1, 1, 4, 6), torch.float32, "dense"),
    ],
)
@pytest.mark.parametrize("how", [Refinement(), Refinement(neighbourhood=4, beta=0.5)], ids=["paper", "cross"])
def test_the_kernel_equals_the_tensor_form(shape, dtype, layout, how):
    check(*inputs(shape, dtype, layout), how)


@kernel
@pytest.mark.parametrize("valid", [0.0, 0.3, 1.1])
def test_masks(valid):
    raw, refined, label = check(*inputs(valid=valid), Refinement())
    if valid == 0:
        assert not raw.any()
        assert not refined.any()
        assert not label.any()


@kernel
def test_ties_go_to_the_lowest_class():
    logits, valid = torch.zeros(1, 6, 3, 4, device=DEVICE), torch.ones(1, 3, 4, dtype=torch.bool, device=DEVICE)
    raw, refined, label = check(logits, valid, Refinement())
    assert not raw.any()
    assert not refined.any()
    assert not label.any()
    logits[:, 2] = logits[:, 4] = 3.0
    raw, _, label = check(logits, valid, Refinement())
    assert (label == 2).all()
    assert not raw.any()


@kernel
def test_large_logits_and_classes_ruled_out():
    logits, valid = inputs()
    check(logits * 1000, valid, Refinement())
    logits[:, 1::2] = -torch.inf
    check(logits, valid, Refinement())


@kernel
@interpreted_nan
@pytest.mark.parametrize("how", [Refinement(), Refinement(neighbourhood=4)], ids=["paper", "cross"])
def test_nan_stays_with_its_neighbours(how):
    logits, valid = inputs((3, 5, 20, 11), valid=1.1)
    clean = s4mc_triton.launch(logits, valid, how)
    logits[1, 2, 16, 5] = torch.nan  # last row of a program's strip: also seen by the next
    logits[1, 0, 3, 0] = torch.inf
    logits[1, :, 8, 8] = -torch.inf
    logits[1, 1, 12, 3] = torch.nan
    valid[1, 12, 3] = False
    raw, refined, label = check(logits, valid, how)
    assert int(raw.isnan().sum()) == 4
    assert not label[raw.isnan()].any()
    for image in (0, 2):
        assert all(torch.equal(a[image], b[image]) for a, b in zip((raw, refined, label), clean, strict=True))


@kernel
def test_the_call_leaves_its_inputs_alone_and_takes_the_kernel_on_a_card():
    logits, valid = inputs(layout="channels_last")
    before = logits.clone(), valid.clone()
    got = s4mc_triton.scores(logits.requires_grad_(), valid, Refinement())
    assert torch.equal(logits, before[0])
    assert torch.equal(valid, before[1])
    assert not any(value.requires_grad for value in got)
    if DEVICE == "cuda":
        assert s4mc_triton.available(logits)
        assert not s4mc_triton._broken
