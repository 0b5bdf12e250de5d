"""Counts against slow oracles: sets, loops, closed forms; absent classes have no score."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.champions import metrics as scores
from training import metrics

K = 5


def maps(seed: int, shape: tuple[int, ...] = (23, 31), k: int = K, void: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, k, shape).astype(np.uint8), rng.integers(0, k, shape).astype(np.uint8)
    truth[rng.random(shape) < void] = 255
    return truth, predicted


def blobs(seed: int, shape: tuple[int, int] = (24, 30)) -> tuple[np.ndarray, np.ndarray]:
    """Maps with regions, so that boundaries and insides both exist."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(2):
        image = np.zeros(shape, np.uint8)
        for _ in range(6):
            y, x = rng.integers(0, shape[0] - 4), rng.integers(0, shape[1] - 4)
            image[y : y + rng.integers(4, 14), x : x + rng.integers(4, 14)] = rng.integers(0, K)
        out.append(image)
    out[0][3:7, 5:12] = 255
    return out[0], out[1]


def loop_confusion(truth: np.ndarray, predicted: np.ndarray, k: int) -> np.ndarray:
    table = np.zeros((k, k), np.int64)
    for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
        if t != 255:
            table[t, p] += 1
    return table


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255), st.sampled_from([np.uint8, np.uint16, np.int64]))
def test_confusion_is_the_pixel_loop(seed: int, k: int, kind: type) -> None:
    truth, predicted = maps(seed, (7, 9), k)
    want = loop_confusion(truth, predicted, k)
    np.testing.assert_array_equal(metrics.confusion(truth.astype(kind), predicted.astype(kind), k, 255), want)
    got = metrics.confusion(torch.from_numpy(truth), torch.from_numpy(predicted), k, 255)
    assert got.dtype == torch.int64
    np.testing.assert_array_equal(got.numpy(), want)


def test_sixteen_bit_ids_and_their_ignore() -> None:
    truth = np.array([[0, 299, 65535], [7, 299, 0]], np.uint16)
    predicted = np.array([[0, 299, 3], [299, 7, 0]], np.uint16)
    conf = metrics.confusion(truth, predicted, 300, 65535)
    assert conf.sum() == 5
    assert (conf[0, 0], conf[299, 299], conf[7, 299], conf[299, 7]) == (2, 1, 1, 1)


def test_row_sums_are_label_counts_and_order_of_images_changes_nothing() -> None:
    pairs = [maps(s) for s in range(4)]
    parts = [metrics.confusion(t, p, K, 255) for t, p in pairs]
    truth = np.stack([t for t, _ in pairs])
    np.testing.assert_array_equal(sum(parts).sum(1), [(truth == c).sum() for c in range(K)])
    np.testing.assert_array_equal(sum(parts), sum(parts[::-1]))
    np.testing.assert_array_equal(sum(parts), metrics.confusion(truth, np.stack([p for _, p in pairs]), K, 255))


@pytest.mark.parametrize("which", ["truth", "predicted"])
@pytest.mark.parametrize("torch_in", [False, True])
@pytest.mark.parametrize("bad", [K, 200, 254])
def test_ids_outside_the_classes_are_refused_not_miscounted(which: str, torch_in: bool, bad: int) -> None:
    truth, predicted = maps(1)
    (truth if which == "truth" else predicted)[4, 4] = bad
    pair = (torch.from_numpy(truth), torch.from_numpy(predicted)) if torch_in else (truth, predicted)
    with pytest.raises(metrics.LabelError, match=r"outside 0\.\.4"):
        metrics.confusion(*pair, K, 255)


def test_predicted_ignore_is_refused() -> None:
    truth, predicted = maps(1)
    predicted[0, 0] = 255
    with pytest.raises(metrics.LabelError):
        metrics.confusion(truth, predicted, K, 255)


def test_iou_is_the_set_definition() -> None:
    truth, predicted = maps(3)
    conf = metrics.confusion(truth, predicted, K, 255)
    known = truth != 255
    for c in range(K):
        a = {tuple(i) for i in np.argwhere((truth == c) & known)}
        b = {tuple(i) for i in np.argwhere((predicted == c) & known)}
        assert scores.iou(conf)[c] == len(a & b) / len(a | b)


def test_absent_class_is_skipped_in_miou_and_zero_in_miou_all() -> None:
    conf = np.zeros((4, 4), np.int64)
    conf[0, 0], conf[0, 1], conf[1, 1] = 6, 2, 2  # class 2 and 3 occur nowhere
    assert np.isnan(scores.iou(conf)[2:]).all()
    assert scores.miou(conf) == pytest.approx(100 * (6 / 8 + 2 / 4) / 2)
    assert scores.miou_all(conf) == pytest.approx(100 * (6 / 8 + 2 / 4) / 4)
    conf[0, 2] = 1  # predicted though absent from the ground truth: counts as 0, not skipped
    assert scores.iou(conf)[2] == 0
    assert scores.miou(conf) == pytest.approx(100 * (6 / 9 + 2 / 4 + 0) / 3)
    assert np.isnan(scores.miou(np.zeros((3, 3), np.int64)))


def loop_boundary(label: np.ndarray, distance: int) -> np.ndarray:
    """Cheng et al.'s own steps: for each class pad its mask with 0, erode with a square, boundary = mask - eroded."""
    out = np.zeros(label.shape, bool)
    for c in np.unique(label):
        padded = np.pad(label == c, distance)
        for y, x in np.argwhere(label == c):
            out[y, x] = not padded[y : y + 2 * distance + 1, x : x + 2 * distance + 1].all()
    return out


@pytest.mark.parametrize("distance", [1, 2, 4, 40])
def test_boundary_is_mask_minus_erosion(distance: int) -> None:
    for seed in range(3):
        label, _ = blobs(seed)
        np.testing.assert_array_equal(metrics.boundary(label, distance), loop_boundary(label, distance))


def test_boundary_iou_against_the_loop_and_perfect_beside_void() -> None:
    truth, predicted = blobs(5)
    got = metrics.boundary_counts(truth, predicted, K, 255, 2)
    answer = np.where(truth == 255, 255, predicted).astype(np.uint8)
    edges = loop_boundary(truth, 2), loop_boundary(answer, 2)
    for c in range(K):
        a, b = (truth == c) & edges[0], (answer == c) & edges[1]
        assert got[:, c].tolist() == [(a & b).sum(), a.sum(), b.sum()]
    perfect = metrics.boundary_counts(truth, np.where(truth == 255, 3, truth).astype(np.uint8), K, 255, 2)
    np.testing.assert_array_equal(perfect[0], perfect[1])
    np.testing.assert_array_equal(perfect[0], perfect[2])


def test_ece_against_the_loop() -> None:
    truth, predicted = maps(8, (40, 40))
    confidence = np.random.default_rng(1).integers(0, 256, truth.shape).astype(np.uint8)
    counts = metrics.calibration_counts(truth, predicted, confidence, 255)
    assert counts.sum() == (truth != 255).sum()
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for t, p, c in zip(truth.ravel().tolist(), predicted.ravel().tolist(), confidence.ravel().tolist(), strict=True):
        if t != 255:
            place = next(b for b in range(15) if c * 15 <= (b + 1) * 255)
            bins[place].append((c / 255, t == p))
    n = sum(map(len, bins))
    assert metrics.reliability(counts)[:, 0].tolist() == [len(b) for b in bins]  # the edges of the bins too
    want = sum(abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins) / n
    assert metrics.ece(counts) == pytest.approx(want, abs=1e-12)


def test_ece_closed_forms() -> None:
    counts = np.zeros((256, 2), np.int64)
    counts[255] = [25, 75]  # always sure, right three times of four
    assert metrics.ece(counts) == pytest.approx(0.25)
    counts[255] = [0, 100]
    assert metrics.ece(counts) == 0
    assert metrics.ece(np.zeros((256, 2), np.int64)) == 0


def test_tallies_join_exactly_in_any_order() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for seed in range(5):
        truth, predicted = blobs(seed)
        sure = rng.integers(0, 256, truth.shape).astype(np.uint8)
        parts.append(metrics.tally(truth, predicted, sure, k=K, ignore=255, distance=2))
    forward, backward = parts[0], parts[-1]
    for part in parts[1:]:
        forward = forward + part
    for part in parts[-2::-1]:
        backward = backward + part
    assert metrics.summary(forward) == metrics.summary(backward)
    assert metrics.summary(forward).pixel_accuracy == np.trace(forward.confusion_KK) / forward.confusion_KK.sum()


def test_bootstrap_is_the_resampled_sum() -> None:
    conf = np.stack([metrics.confusion(*maps(s), K, 255) for s in range(6)])
    drawn = scores.bootstrap(conf, samples=50, seed=4)
    weights = np.random.default_rng(4).multinomial(6, np.full(6, 1 / 6), size=50)
    for b in range(50):
        table = sum(conf[i] for i in range(6) for _ in range(weights[b, i]))
        np.testing.assert_allclose(drawn[b], scores.iou(table), rtol=1e-12)
    np.testing.assert_array_equal(drawn, scores.bootstrap(conf, samples=50, seed=4))
    assert (drawn != scores.bootstrap(conf, samples=50, seed=5)).any()


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Pixels are right at a rate drawn per image: coverage of the 90 % interval over 200 test sets."""
    rng = np.random.default_rng(0)
    many = np.zeros((20000, 2, 2), np.int64)
    right = rng.binomial(100, rng.beta(16, 4, 20000))
    many[:, 0, 0], many[:, 0, 1] = right, 100 - right
    many[:, 1, 1] = 50
    true = scores.miou(many.sum(0))
    hits = 0
    for t in range(200):
        sample = many[rng.choice(20000, 40, replace=False)]
        drawn = 100 * scores.mean_present(scores.bootstrap(sample, samples=300, seed=t))
        ci = scores.interval(drawn, 0.9)
        assert ci is not None
        hits += ci.low <= true <= ci.high
    assert 165 <= hits <= 195


def test_interval_leaves_nan_out() -> None:
    assert scores.interval(np.array([np.nan, np.nan]), 0.95) is None
    ci = scores.interval(np.array([np.nan, 1.0, 3.0]), 0.95)
    assert ci is not None
    assert 1 <= ci.low < ci.high <= 3
    with pytest.raises(ValueError, match="empty"):
        scores.bootstrap(np.zeros((0, 2, 2), np.int64), samples=3, seed=0)
