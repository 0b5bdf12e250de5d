"""Precision at equal coverage, the risk over coverages, borders and far neighbours: each against a slow loop."""

import numpy as np
import pytest
import torch

from benchmarks import ranking
from benchmarks.ranking import Ranked


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    score_N = rng.random(200).astype(np.float32)
    return score_N, rng.random(200) < 0.3 + 0.6 * score_N


def test_precision_and_risk_equal_a_loop(scored: tuple[np.ndarray, np.ndarray]) -> None:
    score_N, right_N = scored
    surest = sorted(range(len(score_N)), key=lambda i: -score_N[i])
    errors, risks = 0, []
    for count, i in enumerate(surest, 1):
        errors += not right_N[i]
        risks.append(errors / count)
        if count == 120:
            assert ranking.precision_at(score_N, right_N, 0.6) == pytest.approx(100 * (1 - errors / count))
    assert ranking.risk(score_N, right_N) == pytest.approx(100 * sum(risks) / len(risks))


def test_a_score_that_knows_the_errors_has_the_least_risk(scored: tuple[np.ndarray, np.ndarray]) -> None:
    score_N, right_N = scored
    best = ranking.risk(right_N.astype(np.float32), right_N)
    assert best < ranking.risk(score_N, right_N) < ranking.risk(-score_N, right_N)


def test_borders_equal_a_loop() -> None:
    rng = np.random.default_rng(4)
    label_HW = np.kron(rng.choice([0, 1, 2, 255], (4, 5)), np.ones((5, 5), int))
    expected = np.zeros(label_HW.shape, bool)
    for y, x in np.ndindex(label_HW.shape):
        around = label_HW[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        classes = set(around[around != 255].tolist())
        expected[y, x] = label_HW[y, x] != 255 and classes != {int(label_HW[y, x])}
    assert np.array_equal(ranking.borders(torch.from_numpy(label_HW), 255).numpy(), expected)


def test_far_neighbours_equal_a_loop() -> None:
    prob = torch.rand(1, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    found = ranking.at_distance(prob, 2)
    for k, y, x in np.ndindex(2, 7, 6):
        places = [(y - 2, x), (y + 2, x), (y, x - 2), (y, x + 2)]
        seen = [float(prob[0, k, a, b]) for a, b in places if 0 <= a < 7 and 0 <= b < 6]
        own, most = float(prob[0, k, y, x]), max([0.0, *seen])
        assert float(found[0, k, y, x]) == pytest.approx(own + most - own * most, abs=1e-6)


def test_a_rules_row_counts_labels_and_borders() -> None:
    ranked = Ranked(
        np.array([0.9, 0.8, 0.7, 0.6], np.float32), np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]),
        np.array([False, False, True, False]),
    )  # fmt: skip
    row = ranking.told(ranked, 2)
    assert row["at 100%"] == 75
    assert row["at 80%, inside"] == 100
    assert row["mIoU"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
