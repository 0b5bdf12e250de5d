"""Gains over labels alone, and the share of the headroom that they close."""

from fractions import Fraction

import numpy as np
import pytest

from training import gains

# MSRC-21 with 35 labels, as measured with two seeds.
MEASURED = {
    "supervised": {0: 53.5, 1: 56.2},
    "ceiling": {0: 72.6, 1: 73.2},
    "fixmatch": {0: 58.5, 1: 60.4},
    "corrmatch": {0: 51.7},
}


def row(comparison, method):
    return next(r for r in comparison.rows if r.method == method)


def oracle(scores):
    """The definitions in exact fractions, with plain loops; scatter squared, so that no root is needed."""
    exact = {m: {s: Fraction(str(v)) for s, v in by.items()} for m, by in scores.items()}
    squares, degrees = Fraction(0), 0
    for by in exact.values():
        mean = sum(by.values()) / len(by)
        for value in by.values():
            squares += (value - mean) ** 2
        degrees += len(by) - 1
    found = {}
    for method, by in exact.items():
        both = [s for s in by if s in exact["supervised"]]
        found[method] = sum(by[s] - exact["supervised"][s] for s in both) / len(both)
    return found, squares / degrees


def test_gains_shares_and_scatter_agree_with_exact_arithmetic():
    generator = np.random.default_rng(3)
    for _ in range(50):
        seeds = [int(s) for s in generator.permutation(5)[: generator.integers(2, 6)]]
        scores = {
            method: {s: round(float(generator.normal(mean, 1.5)), 3) for s in seeds}
            for method, mean in (("supervised", 50), ("fixmatch", 53), ("s4mc", 49), ("ceiling", 70))
        }
        expected, variance = oracle(scores)
        found = gains.compare(scores)
        assert found.scatter is not None
        assert found.scatter**2 == pytest.approx(float(variance))
        assert found.headroom == pytest.approx(float(expected["ceiling"]))
        for r in found.rows:
            assert r.gain == pytest.approx(float(expected[r.method]), abs=1e-9)
            assert r.gain_to_scatter == pytest.approx(float(expected[r.method]) / float(variance) ** 0.5, abs=1e-9)
            assert r.share == pytest.approx(float(expected[r.method] / expected["ceiling"]), abs=1e-9)


def test_a_method_with_fewer_seeds_is_held_against_the_same_seeds_of_labels_alone():
    found = gains.compare(MEASURED)
    assert row(found, "corrmatch").gain == pytest.approx(-1.8)
    assert row(found, "corrmatch").scatter is None
    assert row(found, "fixmatch").gain == pytest.approx(4.6)
    assert row(found, "fixmatch").share == pytest.approx(4.6 / 18.05)
    assert row(found, "ceiling").share == pytest.approx(1.0)
    assert row(found, "supervised").share == 0
    assert found.has_headroom
    assert found.verdict.startswith("headroom 18.05")


@pytest.mark.parametrize(("ceiling", "room"), [(51.99, False), (52.01, True), (49.0, False)])
def test_a_ceiling_under_twice_the_scatter_above_labels_alone_is_no_headroom(ceiling, room):
    spread = 1 / 2**0.5  # two seeds this far from their mean have a standard deviation of 1
    scores = {
        "supervised": {0: 50 - spread, 1: 50 + spread},
        "ceiling": {0: ceiling - spread, 1: ceiling + spread},
        "s4mc": {0: 51 - spread, 1: 51 + spread},
    }
    found = gains.compare(scores)
    assert found.scatter == pytest.approx(1.0)
    assert found.has_headroom is room
    assert ("no headroom here" in found.verdict) is not room
    assert (row(found, "s4mc").share is not None) is room
    assert row(found, "s4mc").gain == pytest.approx(1.0)


def test_one_seed_has_a_gain_and_a_share_but_no_scatter():
    found = gains.compare({"supervised": {0: 50.0}, "ceiling": {0: 60.0}, "s4mc": {0: 54.0}})
    assert (found.scatter, found.has_headroom) == (None, None)
    assert row(found, "s4mc").gain_to_scatter is None
    assert row(found, "s4mc").share == pytest.approx(0.4)
    assert "one seed" in found.verdict


def test_without_a_ceiling_the_share_is_not_known():
    found = gains.compare({"supervised": {0: 50.0, 1: 51.0}, "s4mc": {0: 54.0, 1: 55.0}})
    assert found.headroom is None
    assert row(found, "s4mc").share is None
    assert row(found, "s4mc").gain == pytest.approx(4.0)
    assert "no ceiling was run" in found.verdict


def test_a_comparison_without_labels_alone_says_what_to_add():
    with pytest.raises(ValueError, match="supervised, which was not run"):
        gains.compare({"s4mc": {0: 54.0}})
    with pytest.raises(ValueError, match="no scores of s4mc"):
        gains.compare({"supervised": {0: 54.0}, "s4mc": {}})
