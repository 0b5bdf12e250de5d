"""Confident disagreement by slow loops; corrupted masks come first, given probabilities."""

from collections import deque

import numpy as np
import pytest

from training import confident_learning

IGNORE = 255


def softmax(logits_KHW: np.ndarray) -> np.ndarray:
    high = np.exp(logits_KHW - logits_KHW.max(0))
    return high / high.sum(0)


def world(rng: np.random.Generator, k: int = 5, size: tuple[int, int] = (40, 52)) -> tuple[np.ndarray, np.ndarray]:
    """(probability_KHW, mask_HW): bands and a block, a network that is right but for noise, and is timid about class 3."""
    mask = np.zeros(size, np.uint8)
    edges = np.sort(rng.integers(4, size[0] - 4, 2))
    mask[edges[0] :], mask[edges[1] :] = 1, 2
    y, x = rng.integers(0, size[0] - 14), rng.integers(0, size[1] - 14)
    mask[y : y + 14, x : x + 14] = rng.integers(3, k)
    sure = np.where(np.arange(k) == 3, 1.5, 4.0)
    logits = rng.normal(0, 0.6, (k, *size)) + np.where(np.arange(k)[:, None, None] == mask, sure[:, None, None], 0)
    probability = softmax(logits)
    mask[:, :3] = IGNORE
    return probability, mask


def slow(
    probability: np.ndarray, mask: np.ndarray, threshold: np.ndarray, distance: int
) -> tuple[np.ndarray, np.ndarray]:
    k, height, width = probability.shape
    suggested, gain = np.full((height, width), IGNORE, np.uint8), np.zeros((height, width))
    for y in range(distance, height - distance):
        for x in range(distance, width - distance):
            window = mask[y - distance : y + distance + 1, x - distance : x + distance + 1]
            if mask[y, x] == IGNORE or (window != mask[y, x]).any():
                continue
            able = [c for c in range(k) if probability[c, y, x] >= threshold[c]]
            if not able:
                continue
            best = max(able, key=lambda c: (probability[c, y, x], -c))
            more = probability[best, y, x] - probability[mask[y, x], y, x]
            if best != mask[y, x] and more > 0:
                suggested[y, x], gain[y, x] = best, more
    return suggested, gain


def flooded(value: np.ndarray) -> list[set[tuple[int, int]]]:
    seen, found = set(), []
    for start in np.ndindex(value.shape):
        if start in seen:
            continue
        todo, part = deque([start]), {start}
        while todo:
            y, x = todo.popleft()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= near[0] < value.shape[0] and 0 <= near[1] < value.shape[1]
                if inside and near not in part and value[near] == value[start]:
                    part.add(near)
                    todo.append(near)
        seen |= part
        found.append(part)
    return found


def test_thresholds_are_mean_self_confidences() -> None:
    rng = np.random.default_rng(0)
    probability, mask = world(rng)
    total, count = confident_learning.self_confidence(probability, mask)
    for c in range(5):
        own = [probability[c][at] for at in zip(*np.nonzero(mask == c), strict=True)]
        assert count[c] == len(own)
        assert total[c] == pytest.approx(sum(own))
    threshold = confident_learning.thresholds(total, count)
    assert np.isinf(threshold[count == 0]).all()
    assert threshold[0] == pytest.approx(probability[0][mask == 0].mean())


@pytest.mark.parametrize("seed", range(4))
def test_suggestions_are_the_slow_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability, mask = world(rng)
    mask[20:34, 10:40] = rng.integers(0, 5)  # a wrong patch
    threshold = np.array([0.5, 0.7, 0.3, 0.2, np.inf])
    expected = slow(probability, mask, threshold, 2)
    found = confident_learning.suggestions(probability, mask, threshold, ignore=IGNORE, distance=2)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1])
    assert (expected[0] != IGNORE).any()


def test_components_are_the_flooded_ones() -> None:
    rng = np.random.default_rng(1)
    for shape in ((1, 1), (1, 9), (9, 1), (17, 23)):
        value = rng.integers(0, 2, shape)
        number = confident_learning.components(value)
        parts = flooded(value)
        assert int(number.max()) + 1 == len(parts)
        for part in parts:
            assert len({int(number[at]) for at in part}) == 1
    spiral = np.array([[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]])
    assert int(confident_learning.components(spiral).max()) == 1


def test_regions_are_of_one_pair_and_specks_do_not_count() -> None:
    mask, suggested, gain = np.zeros((60, 80), np.uint8), np.full((60, 80), IGNORE, np.uint8), np.zeros((60, 80))
    mask[:, 40:] = 1
    for box, to, more in (((10, 20, 30, 50), 2, 0.5), ((40, 5, 50, 15), 3, 0.9), ((55, 70, 56, 71), 2, 1.0)):
        part = (slice(box[0], box[2]), slice(box[1], box[3]))
        suggested[part], gain[part] = to, more
    found = confident_learning.regions(mask, suggested, gain, ignore=IGNORE)
    assert [(r.given, r.suggested, r.pixels, r.box) for r in found] == [
        (0, 2, 400, (20, 10, 40, 30)), (1, 2, 200, (40, 10, 50, 30)), (0, 3, 100, (5, 40, 15, 50)),
    ]  # fmt: skip
    assert [r.weight for r in found] == pytest.approx([200.0, 100.0, 90.0])
    assert confident_learning.score(found, mask, ignore=IGNORE) == pytest.approx(390 / 4800)
    nothing = np.full_like(suggested, IGNORE)
    assert confident_learning.regions(mask, nothing, gain, ignore=IGNORE) == []


def test_five_corrupted_masks_of_forty_come_first() -> None:
    """Swapped classes in a region, and masks of other images. The thresholds are taken with the errors in."""
    rng = np.random.default_rng(2)
    worlds = [world(rng) for _ in range(40)]
    masks = [mask.copy() for _, mask in worlds]
    for i in (3, 11, 19):  # two classes swapped in half the image
        left = masks[i][:, 26:]
        left[:] = np.where(left == 0, 1, np.where(left == 1, 0, left))
    masks[27], masks[33] = worlds[28][1], worlds[34][1]
    sums = [confident_learning.self_confidence(p, m) for (p, _), m in zip(worlds, masks, strict=True)]
    threshold = confident_learning.thresholds(sum(s[0] for s in sums), sum(s[1] for s in sums))
    scores = []
    for (probability, _), mask in zip(worlds, masks, strict=True):
        judged = confident_learning.suggestions(probability, mask, threshold, ignore=IGNORE, distance=2)
        found = confident_learning.regions(mask, *judged, ignore=IGNORE)
        scores.append(confident_learning.score(found, mask, ignore=IGNORE))
    assert set(np.argsort(scores)[-5:].tolist()) == {3, 11, 19, 27, 33}
    assert sorted(scores)[-6] < 0.3 * sorted(scores)[-5]


def test_a_mask_shifted_by_a_pixel_is_no_suspect() -> None:
    probability, mask = world(np.random.default_rng(3))
    shifted = np.roll(mask, 1, axis=0)
    shifted[0] = mask[0]
    judged = confident_learning.suggestions(probability, shifted, np.full(5, 0.2), ignore=IGNORE, distance=2)
    assert confident_learning.regions(shifted, *judged, ignore=IGNORE) == []
    near = confident_learning.suggestions(probability, shifted, np.full(5, 0.2), ignore=IGNORE, distance=1)
    assert (near[0] != IGNORE).sum() >= (judged[0] != IGNORE).sum()
