"""Images as points, and whether the points of one dump lie where those of the reference do.

Reference = labelled images and unlabelled ones of the first dump, `base`. A dump is drifted if p < `drift_p`, where

- "groups": with known groups on both sides and enough of them that p could get that small, whole groups are
  permuted, since frames of one video are not independent draws;
- "images above group spread": with too few groups for that, images are permuted, and the distance must also exceed
  what one more group like those of the reference (each of at least 5 images, against the rest) exceeds with
  probability `drift_p`, or each new site would raise the alarm;
- "images above two groups": the reference has two such groups, whose distance from each other is all that is known of
  groups: images are permuted, and the dump must be farther away than that. No error rate is promised;
- "images": without groups, or with one group alone in the reference, images are permuted. If that one is a video, any
  other video is likely to be flagged.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import numpy as np

from pipeline import config
from pipeline.drift import energy_distance
from pipeline.drift.energy_distance import Members, Units
from pipeline.drift.records import Finding
from pipeline.storage.predictions import Floats, Names, PoolError

BASE = "base"
SIDE = 600  # images of one side that enter the test; more cost time squared and change little
SMALLEST_GROUP = 5
SEED = 0


@dataclass(frozen=True)
class Cloud:
    """Points of images: feature_ND, dump, group ("" where unknown), split."""

    feature_ND: Floats
    dump: Names
    group: Names
    split: Names

    @property
    def reference(self) -> Members:
        """What the model was trained on."""
        here: Members = (self.split == "labelled") | (self.dump == BASE)
        return here

    def later_dumps(self) -> list[str]:
        """Those with an image that is not labelled, in order of arrival."""
        there = ~self.reference
        return [dump for dump in dict.fromkeys(map(str, self.dump)) if (there & (self.dump == dump)).any()]


class Sides(NamedTuple):
    """Rows of the cloud that enter a test, which of them are the dump's, their groups, and whether groups move whole."""

    rows: Units
    member: Members
    group: Units
    grouped: bool
    many: bool

    def drawn(self, count: int, rng: np.random.Generator) -> Members:
        """`count` labelings, by groups if there are many, else by images."""
        units = self.group if self.many else np.arange(len(self.rows), dtype=np.int64)
        return energy_distance.permuted(units, self.member, count, rng)


def take(rows: Units, rng: np.random.Generator) -> Units:
    """At most `SIDE` of the rows, in their order."""
    return rows if len(rows) <= SIDE else np.sort(rng.choice(rows, SIDE, replace=False))


def sides(cloud: Cloud, dump: str, drift_p: float, rng: np.random.Generator) -> Sides:
    """Raises PoolError when a side has no image."""
    here = (cloud.dump == dump) & ~cloud.reference
    ours, theirs = (take(np.flatnonzero(mask), rng) for mask in (cloud.reference, here))
    if not len(ours) or not len(theirs):
        raise PoolError(f"dump {dump!r}: {len(theirs)} images against {len(ours)} of the reference; nothing to compare")
    rows = np.concatenate([ours, theirs])
    member = np.arange(len(rows)) >= len(ours)
    names = np.array([f"{cloud.dump[i]}\0{cloud.group[i]}" for i in rows])
    group = np.unique(names, return_inverse=True)[1].astype(np.int64)
    grouped = bool((cloud.group[rows] != "").all())
    ways = math.comb(len(np.unique(group)), len(np.unique(group[member])))
    return Sides(rows, member, group, grouped, grouped and ways >= 2 / drift_p)


def compare(cloud: Cloud, dump: str, settings: config.Pool) -> Finding:
    """The rule of the module's docstring for one dump; seeded.

    Raises:
        PoolError: a side has no image, or too few permutations for any p below `drift_p`.
    """
    if 1 / (1 + settings.permutations) >= settings.drift_p:
        raise PoolError(
            f"pool.permutations {settings.permutations} can flag nothing: the smallest p is 1 / (1 + permutations), "
            f"which is not below pool.drift_p {settings.drift_p:g}; "
            f"set it to {energy_distance.fewest(settings.drift_p)} or more"
        )
    # Each dump has draws of its own: with the same ones for all, an unlucky set of them would err week after week.
    rng = np.random.default_rng([SEED, crc32(dump.encode())])
    those = sides(cloud, dump, settings.drift_p, rng)

    # One scale for all dimensions keeps the features' own weighting; a dead dimension does not matter.
    deviation = cloud.feature_ND[those.rows[~those.member]].std(0)
    scale = float(np.sqrt((deviation**2).sum())) or 1.0
    distance = energy_distance.distances(cloud.feature_ND[those.rows] / scale)

    observed = float(energy_distance.energies(distance, those.member[None])[0])
    drawn = energy_distance.energies(distance, those.drawn(settings.permutations, rng))
    p = float((1 + (drawn >= observed - 1e-12).sum()) / (1 + len(drawn)))

    bound = None if those.many or not those.grouped else _bound(distance, those, settings.drift_p)
    if those.many or bound is None:
        rule = "groups" if those.many else "images"
    else:
        rule = "images above two groups" if bound[1] == 2 else "images above group spread"
    spread = bound[0] if bound else None
    images = int(those.member.sum())
    return Finding(
        energy=observed,
        p=p,
        rule=rule,
        spread=spread,
        drifted=p < settings.drift_p and (spread is None or observed > spread),
        images=images,
        reference=len(those.rows) - images,
    )


def _bound(distance_NN: Floats, those: Sides, drift_p: float) -> tuple[float, int] | None:
    """(what the dump's energy must exceed, how many groups say so), from each reference group of `SMALLEST_GROUP` images
    against the rest of the reference; None with fewer than two of them.
    """
    ours = ~those.member
    inside, own = distance_NN[np.ix_(ours, ours)], those.group[ours]
    groups = [u for u in np.unique(own) if (own == u).sum() >= SMALLEST_GROUP]
    if len(groups) < 2:
        return None
    found = energy_distance.energies(inside, np.stack([own == u for u in groups]))
    # Of two groups each is the other's rest: one number, from which no spread can be told.
    return (float(found.max()) if len(groups) == 2 else energy_distance.next_bound(found, drift_p)), len(groups)
