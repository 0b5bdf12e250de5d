"""The energy distance of two samples and what it may be by chance, as plain arithmetic on arrays.

Source: Szekely and Rizzo, "Testing for equal distributions in high dimension" (InterStat 2004); p = (1 + #{E* >= E})
/ (1 + B).
"""

import math
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.predictions import Floats

LISTED = 20_000  # labelings up to which all are written down
Units = NDArray[np.int64]
Members = NDArray[np.bool_]


def distances(point_ND: Floats) -> Floats:
    """Euclidean N x N, exactly 0 on the diagonal."""
    length = (point_ND**2).sum(1)
    square: Floats = length[:, None] + length[None] - 2 * point_ND @ point_ND.T
    np.fill_diagonal(square, 0.0)  # rounding would leave noise that the root makes large
    np.maximum(square, 0.0, out=square)
    np.sqrt(square, out=square)
    return square


def energies(distance_NN: Floats, member_BN: Members) -> Floats:
    """Energy distance between the members and the others, for each of B labelings: 2 E|X-Y| - E|X-X'| - E|Y-Y'|.

    Every labeling needs a member and an other. Means inside a side are over distinct pairs (0 for a single image), so
    that sides of different size can be compared: equal distributions give about 0, sometimes below.
    """
    z = member_BN.astype(np.float64)
    n = z.sum(1)
    m = z.shape[1] - n
    within = ((z @ distance_NN) * z).sum(1)
    reach = z @ distance_NN.sum(1)
    between = reach - within
    rest = distance_NN.sum() - 2 * reach + within
    pairs = (np.maximum(side * (side - 1), 1.0) for side in (n, m))
    energy: Floats = 2 * between / (n * m) - within / next(pairs) - rest / next(pairs)
    return energy


def permuted(unit_N: Units, member_N: Members, count: int, rng: np.random.Generator) -> Members:
    """At most `count` random labelings that move whole units and keep how many units are members.

    Where there are not many such labelings they are drawn without repetition, and never the given one, which counts
    once for itself: repeated, it would keep p from being small however far apart the sides are.
    """
    units = np.unique(unit_N)
    chosen = np.unique(unit_N[member_N])
    inside = len(chosen)
    if math.comb(len(units), inside) <= LISTED:
        every_C = np.array(list(combinations(range(len(units)), inside)))
        own = np.searchsorted(units, chosen)
        others = np.flatnonzero((every_C != own).any(1))
        drawn_B = every_C[others if len(others) <= count else rng.choice(others, count, replace=False)]
        label = np.zeros((len(drawn_B), len(units)), np.bool_)
        label[np.arange(len(drawn_B))[:, None], drawn_B] = True
    else:
        label = np.argsort(rng.random((count, len(units))), axis=1) < inside
    return label[:, np.searchsorted(units, unit_N)]


def moved(value_NK: Floats, drawn_BN: Members, member_N: Members) -> Floats:
    """For each column, how likely chance alone moves any column's mean as far: p (K,).

    Differences of means are divided by the column's standard deviation, and each is held against the largest one of
    every drawn labeling, so that the K columns together err no more often than one (Westfall and Young,
    "Resampling-based multiple testing", 1993).
    """
    spread = value_NK.std(0)
    scaled = (value_NK - value_NK.mean(0)) / np.where(spread > 0, spread, 1.0)

    def shift(member_BN: Members) -> Floats:
        z = member_BN.astype(np.float64)
        n = z.sum(1, keepdims=True)
        inside = z @ scaled
        difference: Floats = np.abs(inside / n - (scaled.sum(0) - inside) / (z.shape[1] - n))
        return difference

    largest_B = shift(drawn_BN).max(1)
    observed_K = shift(member_N[None])[0]
    p_K: Floats = (1 + (largest_B[:, None] >= observed_K - 1e-12).sum(0)) / (1 + len(drawn_BN))
    return p_K


def next_bound(energy_G: Floats, p: float) -> float:
    """What the energy of one more group exceeds with probability `p`, from those of G >= 3 like it.

    The upper end of the prediction interval of a normal sample, for roots of energies: an energy is the square of a
    distance.
    """
    root = np.sqrt(np.maximum(energy_G, 0.0))
    count = len(root)
    reach = _student(count - 1, p) * float(root.std(ddof=1)) * math.sqrt(1 + 1 / count)
    return (float(root.mean()) + reach) ** 2


@cache
def _student(freedom: int, p: float) -> float:
    """What a number of Student's distribution exceeds with probability `p`; drawn, to a few in a hundred."""
    return float(np.quantile(np.random.default_rng(0).standard_t(freedom, 400_000), 1 - p))


def fewest(p: float) -> int:
    """Smallest count of permutations whose 1 / (1 + count) is below `p`."""
    count = max(1, math.floor(1 / p) - 2)
    while 1 / (1 + count) >= p:
        count += 1
    return count
