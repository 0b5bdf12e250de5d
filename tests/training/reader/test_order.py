"""The order of images: each once an epoch, from any position, every order as likely as any other."""

import math
from collections import Counter
from itertools import permutations

import pytest

from training.reader.order import Permutation, order

MILLION = pytest.param(1_000_000, marks=pytest.mark.slow)


@pytest.mark.parametrize("length", [*range(1, 70), 127, 128, 129, 1000, 1023, 1024, 65_536, MILLION])
def test_a_permutation_meets_every_item_once(length):
    permutation = Permutation(length, seed=3, epoch=5)
    met = bytearray(length)
    for position in range(length):
        met[permutation[position]] += 1
    assert met == bytes([1]) * length


def test_order_visits_everything_once_per_epoch_and_from_anywhere():
    stream = order(7, seed=3, start=0, count=35)
    for epoch in range(5):
        assert sorted(stream[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert stream[:7] != stream[7:14]
    assert order(7, seed=3, start=11, count=9) == stream[11:20]
    assert order(7, seed=4, start=0, count=7) != stream[:7]
    assert order(7, seed=3, start=0, count=7, stream=1) != stream[:7]
    assert sorted(order(2, seed=0, start=0, count=6)) == [0, 0, 0, 1, 1, 1]  # fewer images than the batch


def test_any_position_of_a_pool_that_no_list_could_hold():
    far = order(10**12, seed=0, start=10**15 - 16, count=32)
    assert far == order(10**12, 0, 10**15 - 16, 16) + order(10**12, 0, 10**15, 16)
    assert len(set(far[:16])) == len(set(far[16:])) == 16
    assert max(far) < 10**12


def test_an_empty_pool_is_refused():
    assert order(0, seed=0, start=0, count=0) == []
    with pytest.raises(ValueError, match="empty pool"):
        order(0, seed=0, start=0, count=1)
    with pytest.raises(IndexError, match="position 5 of a pool of 5"):
        Permutation(5, 0, 0)[5]


def surprise(found: Counter, cells: list) -> float:
    """How many standard deviations the chi-square statistic of equal shares lies above its mean."""
    expected = found.total() / len(cells)
    statistic = sum((found[cell] - expected) ** 2 / expected for cell in cells)
    degrees = len(cells) - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("over", ["epochs", "seeds"])
def test_every_order_of_a_few_items_is_equally_frequent(length, over):
    draws = 4 * max(1000, math.factorial(length))
    which = [(0, number) if over == "epochs" else (number, 0) for number in range(draws)]
    found = Counter(tuple(order(length, seed, epoch * length, length)) for seed, epoch in which)
    assert surprise(found, list(permutations(range(length)))) < 5


@pytest.mark.parametrize("length", [46, 100, 1000])
def test_positions_and_neighbours_hold_every_item_equally_often(length):
    drawn = [Permutation(length, seed, 0) for seed in range(4000)]
    for position in (0, 1, length // 2, length - 1):
        assert surprise(Counter(p[position] for p in drawn), list(range(length))) < 5
    apart = Counter((p[1] - p[0]) % length for p in drawn)
    assert surprise(apart, list(range(1, length))) < 5
