"""Which images to label next: those the student doubts where it matters, no two alike, no group favoured.

Per image, doubt = sum over predicted classes of w_c * (1 - refined margin) over all its pixels, w_c = min(4,
sqrt(f_max / f_c)) with f_c the class's share of labelled pixels: a doubtful pixel of a rare class counts up to four
times. From a shortlist by doubt, images are taken greedily by doubt x distance to the nearest labelled or already
taken image in feature space (k-centre, weighted), with at most twice an even share from one group.
Pre-labels come from predict, and `pipeline.labels.label_next` packs what was chosen.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.storage.predictions import Floats, PredictionPool

SHORTLIST = 4  # candidates per image asked for
RARITY_CAP = 4.0
BLOCK = 1 << 22  # distances at once: 32 MiB


@dataclass(frozen=True)
class Choice:
    """Row in the pool, its doubt, and its distance to the nearest labelled or earlier chosen image when it was
    taken.
    """

    index: int
    doubt: float
    distance: float


def label_frequency(summary: Mapping[str, Any], classes: Sequence[str]) -> Floats:
    """Share of labelled pixels per class from data/split/summary.json; all zero when nothing is labelled."""
    pixels = summary.get("pixels", {}).get("labelled", {})
    ids = {c["name"]: str(c["id"]) for c in summary["classes"]}
    counts = np.array([float(pixels.get(name, pixels.get(ids[name], 0))) for name in classes])
    share: Floats = counts / max(counts.sum(), 1.0)
    return share


def rarity(frequency_K: Floats) -> Floats:
    """w_c of the module's docstring; a class without labels has the cap, and all are 1 when nothing is labelled."""
    if not frequency_K.any():
        return np.ones_like(frequency_K)
    with np.errstate(divide="ignore"):
        weight: Floats = np.minimum(RARITY_CAP, np.sqrt(frequency_K.max() / frequency_K))
    return weight


def doubt(pool: PredictionPool, frequency_K: Floats) -> Floats:
    """Rarity-weighted mean of 1 - refined margin per image: N, >= 0."""
    weighted: Floats = pool.doubt @ rarity(frequency_K)
    return weighted


def _by_doubt(pool: PredictionPool, doubt_N: Floats) -> list[int]:
    """Unlabelled rows, most doubtful first; ties by id, so that the order of files decides nothing."""
    rows = np.flatnonzero(pool.split == "unlabelled")
    return [int(i) for i in sorted(rows, key=lambda i: (-doubt_N[i], str(pool.id[i])))]


def _cap(pool: PredictionPool, rows: Sequence[int], count: int) -> int:
    """Most images one group may give: twice an even share; no limit where there are fewer than two groups."""
    groups = {str(pool.group[i]) for i in rows} - {""}
    return max(1, math.ceil(2 * count / len(groups))) if len(groups) > 1 else count


def shortlist(pool: PredictionPool, frequency_K: Floats, count: int) -> list[int]:
    """The 4 x `count` most doubtful unlabelled rows, at most 4 x the group cap from one group (filled up if that is
    too few).
    """
    ordered = _by_doubt(pool, doubt(pool, frequency_K))
    most = SHORTLIST * _cap(pool, ordered, count)
    taken: Counter[str] = Counter()
    within: list[int] = []
    beyond: list[int] = []
    for i in ordered:
        group = str(pool.group[i])
        (within if not group or taken[group] < most else beyond).append(i)
        taken[group] += 1
    return (within + beyond)[: SHORTLIST * count]


def choose(pool: PredictionPool, frequency_K: Floats, count: int) -> list[Choice]:
    """Up to `count` rows to label, in the order they were taken. Deterministic.

    Distances are Euclidean between embeddings scaled to unit variance per dimension over the pool. The group cap is
    lifted only when every group has reached it and images are still wanted.
    """
    doubt_N = doubt(pool, frequency_K)
    rows = np.array(shortlist(pool, frequency_K, count), dtype=int)
    if not rows.size:
        return []

    spread = pool.embedding.std(0)
    scale = np.where(spread > 0, spread, 1.0)
    candidates_MD = pool.embedding[rows] / scale
    labelled_LD = pool.embedding[pool.split == "labelled"] / scale

    greedy = GreedyCentres(
        candidates_MD,
        doubt_N[rows],
        distance_M=nearest_distance(candidates_MD, labelled_LD),
        group_M=[str(pool.group[i]) for i in rows],
        most=_cap(pool, list(rows), count),
    )
    taken = [greedy.take() for _ in range(min(count, len(rows)))]
    return [Choice(int(rows[place]), float(doubt_N[rows[place]]), distance) for place, distance in taken]


def nearest_distance(points_MD: Floats, known_LD: Floats) -> Floats:
    """Euclidean distance of each point to the nearest known one: M; infinite where nothing is known.

    The nearest is found by matrix products over blocks of at most `BLOCK` distances, |a - b|^2 = |a|^2 + |b|^2 - 2ab;
    its distance is then computed from the difference, because the products cancel between near copies.
    """
    if not len(known_LD):
        return np.full(len(points_MD), np.inf)

    middle_D = known_LD.mean(0)  # smaller norms cancel less
    centred_LD = known_LD - middle_D
    half_norm_L = 0.5 * np.einsum("ld,ld->l", centred_LD, centred_LD)

    step = max(1, BLOCK // len(known_LD))
    nearest_M = np.empty(len(points_MD))
    for begin in range(0, len(points_MD), step):
        block_BD = points_MD[begin : begin + step]
        closest_B = np.argmin(half_norm_L - (block_BD - middle_D) @ centred_LD.T, axis=1)
        nearest_M[begin : begin + step] = np.linalg.norm(block_BD - known_LD[closest_B], axis=1)
    return nearest_M


class GreedyCentres:
    """Weighted k-centre: takes the candidate with the largest doubt x distance to everything known or taken.

    Distances only shrink as candidates are taken, so what is stored is an upper bound, brought up to date only for the
    candidate that leads. Which candidates are taken, and in which order, is as if all were brought up to date each time.
    """

    def __init__(
        self, candidates_MD: Floats, doubt_M: Floats, distance_M: Floats, group_M: Sequence[str], most: int
    ) -> None:
        """`distance_M`: to what is known, infinite where nothing is; `most`: candidates of one named group."""
        self._candidates_MD = candidates_MD
        self._doubt_M = doubt_M
        self._distance_M = distance_M
        self._group_M = np.array(group_M)
        self._most = most

        self._taken: list[int] = []
        self._taken_of: Counter[str] = Counter()
        self._compared_M = np.zeros(len(doubt_M), int)  # with how many of the taken ones
        self._free_M = np.ones(len(doubt_M), bool)
        self._open_M = self._free_M.copy()  # free and below its group's cap

    def take(self) -> tuple[int, float]:
        """The next candidate and its distance when taken, 0 where there was nothing to be far from."""
        if not self._open_M.any():
            self._open_M = self._free_M.copy()
            self._most = len(self._free_M)

        # Without any labelled image the first one is simply the most doubtful.
        anything_known = bool(self._taken) or bool(np.isfinite(self._distance_M).all())
        best = self._leader() if anything_known else int(np.argmax(np.where(self._open_M, self._doubt_M, -1.0)))
        distance = float(self._distance_M[best]) if anything_known else 0.0

        self._remove(best)
        return best, distance

    def _leader(self) -> int:
        """The open candidate with the largest gain, the first of equals."""
        gain_M = np.where(self._open_M, self._doubt_M * self._distance_M, -1.0)
        while True:
            best = int(np.argmax(gain_M))
            if self._compared_M[best] == len(self._taken):
                return best
            self._compare(best)
            gain_M[best] = self._doubt_M[best] * self._distance_M[best]

    def _compare(self, candidate: int) -> None:
        """Bring one candidate's distance up to date."""
        later = self._taken[self._compared_M[candidate] :]
        distances = np.linalg.norm(self._candidates_MD[candidate] - self._candidates_MD[later], axis=1)
        self._distance_M[candidate] = min(self._distance_M[candidate], distances.min())
        self._compared_M[candidate] = len(self._taken)

    def _remove(self, candidate: int) -> None:
        group = str(self._group_M[candidate])
        self._taken.append(candidate)
        self._taken_of[group] += 1
        self._free_M[candidate] = False
        self._open_M[candidate] = False
        if group and self._taken_of[group] >= self._most:
            self._open_M[self._group_M == group] = False
