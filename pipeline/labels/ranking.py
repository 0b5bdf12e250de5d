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

from pipeline.storage.predictions import Floats, Pool

SHORTLIST = 4  # candidates per image asked for
RARITY_CAP = 4.0


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


def doubt(seen: Pool, frequency_K: Floats) -> Floats:
    """Rarity-weighted mean of 1 - refined margin per image: N, >= 0."""
    weighted: Floats = seen.doubt @ rarity(frequency_K)
    return weighted


def _by_doubt(seen: Pool, doubt_N: Floats) -> list[int]:
    """Unlabelled rows, most doubtful first; ties by id, so that the order of files decides nothing."""
    rows = np.flatnonzero(seen.split == "unlabelled")
    return [int(i) for i in sorted(rows, key=lambda i: (-doubt_N[i], str(seen.id[i])))]


def _cap(seen: Pool, rows: Sequence[int], count: int) -> int:
    """Most images one group may give: twice an even share; no limit where there are fewer than two groups."""
    groups = {str(seen.group[i]) for i in rows} - {""}
    return max(1, math.ceil(2 * count / len(groups))) if len(groups) > 1 else count


def shortlist(seen: Pool, frequency_K: Floats, count: int) -> list[int]:
    """The 4 x `count` most doubtful unlabelled rows, at most 4 x the group cap from one group (filled up if that is
    too few).
    """
    ordered = _by_doubt(seen, doubt(seen, frequency_K))
    most = SHORTLIST * _cap(seen, ordered, count)
    taken: Counter[str] = Counter()
    within: list[int] = []
    beyond: list[int] = []
    for i in ordered:
        group = str(seen.group[i])
        (within if not group or taken[group] < most else beyond).append(i)
        taken[group] += 1
    return (within + beyond)[: SHORTLIST * count]


def choose(seen: Pool, frequency_K: Floats, count: int) -> list[Choice]:
    """Up to `count` rows to label, in the order they were taken. Deterministic.

    Distances are Euclidean between embeddings scaled to unit variance per dimension over the pool. The group cap is
    lifted only when every group has reached it and images are still wanted.
    """
    doubt_N = doubt(seen, frequency_K)
    rows = np.array(shortlist(seen, frequency_K, count), dtype=int)
    if not rows.size:
        return []
    spread = seen.embedding.std(0)
    place = seen.embedding / np.where(spread > 0, spread, 1.0)
    known = place[seen.split == "labelled"]
    nearest = np.full(len(rows), np.inf)
    for one in known:
        nearest = np.minimum(nearest, np.linalg.norm(place[rows] - one, axis=1))
    most = _cap(seen, list(rows), count)
    taken: Counter[str] = Counter()
    free = np.ones(len(rows), bool)
    choices: list[Choice] = []
    while len(choices) < min(count, len(rows)):
        open_ = free & np.array([not seen.group[i] or taken[str(seen.group[i])] < most for i in rows])
        if not open_.any():
            open_ = free
        # Without any labelled image the first one is simply the most doubtful.
        gain = doubt_N[rows] * (nearest if np.isfinite(nearest).all() else 1.0)
        best = int(np.argmax(np.where(open_, gain, -1.0)))
        distance = float(nearest[best]) if np.isfinite(nearest[best]) else 0.0
        choices.append(Choice(int(rows[best]), float(doubt_N[rows[best]]), distance))
        free[best] = False
        taken[str(seen.group[rows[best]])] += 1
        nearest = np.minimum(nearest, np.linalg.norm(place[rows] - place[rows[best]], axis=1))
    return choices
