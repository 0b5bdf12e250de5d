"""CorrMatch's region masks and region propagation against plain loops."""

import numpy as np
import pytest
import torch

from tests.support.training.device_sync import Watch
from tests.support.training.feature_maps import embeddings, generator, resize
from training.methods import corrmatch_regions
from training.methods.corrmatch import rows, sample

# Region masks


def mask_of(row, grid, size):
    field = resize(np.asarray(row).reshape(grid), size)
    low, high = field.min(), field.max()
    return (field - low) / (high - low) > 0.5 if high > low else np.zeros(size, dtype=bool)


@pytest.mark.parametrize(("grid", "size"), [((3, 4), (13, 11)), ((4, 3), (4, 3)), ((5, 6), (4, 9)), ((1, 5), (6, 10))])
def test_masks_equal_the_plain_loop(grid, size):
    row = torch.rand(2, 7, grid[0] * grid[1], generator=generator(), dtype=torch.float64)
    got = corrmatch_regions.masks(row, grid, size, chunk=3)
    assert got.dtype == torch.bool
    assert got.shape == (2, 7, *size)
    for b, m in np.ndindex(2, 7):
        assert np.array_equal(got[b, m].numpy(), mask_of(row[b, m], grid, size))
    assert torch.equal(got, corrmatch_regions.masks(row, grid, size))
    assert 0.1 < got.double().mean() < 0.9


def test_the_bound_is_strict_and_halfway():
    row = torch.tensor([[[0.0, 0.5, 1.0, 0.25, 0.75, 0.5]]])
    assert corrmatch_regions.masks(row, (1, 6), (1, 6)).flatten().tolist() == [False, False, True, False, True, False]


def test_masks_know_neither_scale_nor_offset():
    row = torch.rand(1, 9, 20, generator=generator(), dtype=torch.float64)
    expected = corrmatch_regions.masks(row, (4, 5), (15, 18))
    for a, b in ((3.0, 0.0), (0.01, 0.0), (1.0, 7.0), (2.5, -1.0)):
        assert torch.equal(corrmatch_regions.masks(a * row + b, (4, 5), (15, 18)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 1 / 3, 1 / 1681, 0.1, 77.7])
def test_a_constant_row_has_no_region(dtype, level):
    row = torch.full((2, 3, 41 * 3), level, dtype=dtype)
    row[0, 1, 5] += 0.5 + level
    got = corrmatch_regions.masks(row, (41, 3), (321, 17))
    assert got.flatten(2).any(-1).tolist() == [[False, True, False], [False] * 3]
    assert not corrmatch_regions.masks(row[..., :1], (1, 1), (5, 5)).any()


def test_the_highest_cell_is_inside():
    row = torch.rand(3, 8, 20, generator=generator(2))
    got = corrmatch_regions.masks(row, (4, 5), (10, 13))  # 3 pixels to a cell: cell (y, x) lies on pixel (3 y, 3 x)
    for b, m in np.ndindex(3, 8):
        y, x = divmod(int(row[b, m].argmax()), 5)
        assert got[b, m, 3 * y, 3 * x]


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


def scene(seed=0, batch=2, size=(12, 15), n_masks=2 * corrmatch_regions.CHUNK + 5, n_classes=4, flips=0.2):
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
def test_propagation_equals_the_plain_loop(mode, seed):
    label, confident, mask = scene(seed)
    label[0, :2] = 255  # no class
    inputs = [t.clone() for t in (label, confident, mask)]
    for bar, purity in ((0.7, 0.7), (0.5, 0.4), (0.0, 0.0), (0.85, 0.85)):
        expected, expected_keep, accepted = LOOPS[mode](label, confident, mask, bar, purity, 4)
        got, keep = corrmatch_regions.propagate(label, confident, mask, bar, purity, mode=mode, n_classes=4)
        assert torch.equal(got, expected)
        assert torch.equal(keep, expected_keep)
        assert got.dtype == label.dtype
        assert bar != 0.7 or 10 < len(accepted) < 2 * mask.shape[1] - 10
    assert all(torch.equal(t, kept) for t, kept in zip((label, confident, mask), inputs, strict=True))
    modes = [corrmatch_regions.propagate(label, confident, mask, 0.5, 0.4, mode=m, n_classes=4)[0] for m in LOOPS]
    assert not torch.equal(*modes)  # these scenes tell the two rules apart


@MODES
def test_bounds_as_tensors_and_labels_of_any_width(mode):
    label, confident, mask = scene(8)
    expected = corrmatch_regions.propagate(label, confident, mask, 0.7, 0.6, mode=mode, n_classes=4)
    bounds = [torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.6)]
    got = corrmatch_regions.propagate(label, confident, mask, *bounds, mode=mode, n_classes=4)
    narrow = corrmatch_regions.propagate(label.to(torch.uint8), confident, mask, 0.7, 0.6, mode=mode, n_classes=4)
    assert narrow[0].dtype == torch.uint8
    for other in (got, narrow):
        assert torch.equal(other[0].long(), expected[0])
        assert torch.equal(other[1], expected[1])


@MODES
def test_images_are_independent(mode):
    inputs = scene(3)
    both = corrmatch_regions.propagate(*inputs, 0.6, 0.6, mode=mode, n_classes=4)
    for b in range(2):
        alone = corrmatch_regions.propagate(*(t[b : b + 1] for t in inputs), 0.6, 0.6, mode=mode, n_classes=4)
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, both, strict=True))


@MODES
@pytest.mark.parametrize("seed", range(3))
def test_cleared_pixels_are_never_touched(mode, seed):
    label, confident, mask = scene(seed)
    box = torch.zeros_like(confident)
    box[:, 3:9, 4:11] = True
    mask &= ~box[:, None]
    confident[:, 5] = False  # invalid pixels are not confident; box pixels may be
    mask[:, :, 5] = False
    got, keep = corrmatch_regions.propagate(label, confident, mask, 0.5, 0.5, mode=mode, n_classes=4)
    box[:, 5] = True
    assert torch.equal(got[box], label[box])
    assert torch.equal(keep[box], confident[box])
    assert not torch.equal(got, label)


@MODES
@pytest.mark.parametrize("seed", range(3))
def test_only_accepted_masks_change_labels_and_selection_grows(mode, seed):
    label, confident, mask = scene(seed)
    got, keep = corrmatch_regions.propagate(label, confident, mask, 0.7, 0.7, mode=mode, n_classes=4)
    union = torch.zeros_like(confident)
    for b, m in LOOPS[mode](label, confident, mask, 0.7, 0.7, 4)[2]:
        union[b] |= mask[b, m]
    assert torch.equal(keep, confident | union)
    assert torch.equal(got[~union], label[~union])
    assert (keep & ~confident).any()


@MODES
def test_a_purity_bound_of_one_accepts_nothing(mode):
    label, _, mask = scene()
    sure = torch.ones_like(label, dtype=torch.bool)
    label[1] = 2
    got, keep = corrmatch_regions.propagate(label, sure, mask, 0.0, 1.0, mode=mode, n_classes=4)
    assert torch.equal(got, label)
    assert torch.equal(keep, sure)


@MODES
def test_bounds_overlap_may_be_met_purity_must_be_passed(mode):
    def accepted(confident_pixels, top_pixels, bar=0.85, purity=0.5):
        label = torch.ones(1, 4, 5, dtype=torch.int64)
        label.view(-1)[:top_pixels] = 3
        confident = (torch.arange(20) < confident_pixels).view(1, 4, 5)
        mask = torch.ones(1, 1, 4, 5, dtype=torch.bool)
        return bool(
            (corrmatch_regions.propagate(label, confident, mask, bar, purity, mode=mode, n_classes=4)[0] == 3).all()
        )

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
def test_a_uniform_confident_region_stays(mode):
    label, _, mask = scene()
    label[:] = 1
    sure = torch.zeros_like(label, dtype=torch.bool)
    sure[:, 2:9, 3:9] = True
    mask[:] = sure[:, None]
    once = corrmatch_regions.propagate(label, sure, mask, 0.85, 0.85, mode=mode, n_classes=4)
    assert torch.equal(once[0], label)
    assert torch.equal(once[1], sure)


@MODES
@pytest.mark.parametrize("n_masks", [0, 3])
def test_empty_masks_are_safe(mode, n_masks):
    label, confident, _ = scene()
    mask = torch.zeros(2, n_masks, 12, 15, dtype=torch.bool)
    got, keep = corrmatch_regions.propagate(label, confident, mask, 0.0, 0.0, mode=mode, n_classes=4)
    assert torch.equal(got, label)
    assert torch.equal(keep, confident)


def test_a_contested_pixel_goes_to_the_larger_share_then_the_lower_index():
    label = torch.tensor([[[0, 0, 0, 1, 1, 1, 1, 0, 2, 2]]])
    sure = torch.ones_like(label, dtype=torch.bool)
    mask = torch.zeros(1, 3, 1, 10, dtype=torch.bool)
    mask[0, 0, 0, :4] = True  # class 0, 3 of 4
    mask[0, 1, 0, 3:8] = True  # class 1, 4 of 5: wins pixel 3
    mask[0, 2, 0, 7:9] = True  # 1 of 2: the lowest of equal classes, and not above 0.6
    got = corrmatch_regions.propagate(label, sure, mask, 0.5, 0.6, n_classes=3)[0]
    assert got.flatten().tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    mask[0, 0, 0, 3:5] = torch.tensor([True, False])
    mask[0, 1, 0] = torch.tensor([False] * 3 + [True] * 4 + [False] * 3)
    mask[0, 1, 0, 2] = True  # class 1, 4 of 5, against class 0, 3 of 4
    label[0, 0, 0] = 1
    label[0, 0, 4] = 2  # now 2 of 4 each in their own way: 0 has 2 of 4, 1 has 3 of 5
    got = corrmatch_regions.propagate(label, sure, mask, 0.5, 0.4, n_classes=3)[0]
    assert got.flatten().tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 2]
    equal = torch.tensor([[[0, 0, 1, 1]]])
    mask = torch.tensor([[[[True, True, True, False]], [[False, True, True, True]]]])
    sure = torch.ones_like(equal, dtype=torch.bool)
    for order, expected in (([0, 1], [0, 0, 0, 1]), ([1, 0], [0, 1, 1, 1])):
        assert (
            corrmatch_regions.propagate(equal, sure, mask[:, order], 0.5, 0.6, n_classes=2)[0].flatten().tolist()
            == expected
        )


@pytest.mark.parametrize("seed", range(3))
def test_both_rules_agree_on_disjoint_masks(seed):
    label, confident, _ = scene(seed)
    cells = torch.zeros(2, 20, 12, 15, dtype=torch.bool)
    for m in range(20):
        y, x = divmod(m, 5)
        cells[:, m, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3] = True
    parallel, sequential = (
        corrmatch_regions.propagate(label, confident, cells, 0.6, 0.6, mode=m, n_classes=4) for m in LOOPS
    )
    assert torch.equal(parallel[0], sequential[0])
    assert torch.equal(parallel[1], sequential[1])
    assert 0 < (parallel[1] & ~confident).sum() < (~confident).sum()


def test_both_rules_agree_on_masks_of_one_class():
    label, confident, mask = scene(flips=0.0)
    label[:] = torch.tensor([1, 3])[:, None, None]
    parallel, sequential = (
        corrmatch_regions.propagate(label, confident, mask, 0.7, 0.7, mode=m, n_classes=4) for m in LOOPS
    )
    assert torch.equal(parallel[0], sequential[0])
    assert torch.equal(parallel[1], sequential[1])


@MODES
def test_counts_are_exact_under_autocast(mode):
    label = torch.zeros(1, 20, 20, dtype=torch.int64)
    sure = (torch.arange(400) < 339).view(1, 20, 20)  # 0.8475: bfloat16 would count 340, which meets the bar
    with torch.autocast("cpu", torch.bfloat16):
        keep = corrmatch_regions.propagate(
            label, sure, torch.ones(1, 1, 20, 20, dtype=torch.bool), 0.85, 0.5, mode=mode, n_classes=2
        )[1]
    assert torch.equal(keep, sure)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode"):
        corrmatch_regions.propagate(*scene(), 0.5, 0.5, mode="random", n_classes=4)


@MODES
def test_regions_never_wait(mode):
    batch, n_masks, size = 2, 128, (24, 30)
    one, two, _ = embeddings(batch=batch, k=4, n=20, dtype=torch.float32)
    label, confident, _ = scene(size=(12, 15), batch=batch)
    label, confident = (t.repeat_interleave(2, 1).repeat_interleave(2, 2) for t in (label, confident))
    random = generator()
    bar = torch.tensor(0.7)
    with Watch() as watch:
        sampled = rows(one, two, sample(20, n_masks, random))
        found = corrmatch_regions.masks(sampled, (4, 5), size)
        corrmatch_regions.propagate(label, confident, found, bar, bar, mode=mode, n_classes=4)
    assert watch.largest <= batch * corrmatch_regions.CHUNK * size[0] * size[1]
