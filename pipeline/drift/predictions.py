"""How a model's own answers move from the reference to a dump: areas of classes, confidence, refined margins.

A second look beside the features: it sees what the network makes of the images. The points of its two-sample test are,
for each image, the roots of its class areas and of its histogram of refined margins (so that distances are Hellinger's)
and its mean confidence.
"""

import numpy as np

from pipeline import config
from pipeline.drift import energy_distance, two_sample
from pipeline.drift.records import AnswerShifts, AreaShift, MarginHistograms, MeanShift
from pipeline.drift.two_sample import Cloud
from pipeline.storage.predictions import Floats, Names, PredictionPool


def answers(pool: PredictionPool) -> Cloud:
    """The points of the module's docstring."""
    parts = [np.sqrt(pool.area), np.sqrt(pool.margins), pool.confidence[:, None]]
    return Cloud(np.concatenate(parts, axis=1), pool.dump, pool.group, pool.split)


def areas(points: Cloud, area_NK: Floats, classes: Names, dump: str, settings: config.Pool) -> dict[str, AreaShift]:
    """By class name. p counts for all classes together.

    It is of the same kind as the dump's own: by groups where there are many, else by images, when it only says which
    classes differ most.
    """
    rng = np.random.default_rng(two_sample.SEED)
    those = two_sample.sides(points, dump, settings.drift_p, rng)
    value_NK = area_NK[those.rows]
    p_K = energy_distance.moved(value_NK, those.drawn(settings.permutations, rng), those.member)
    ours, theirs = value_NK[~those.member].mean(0), value_NK[those.member].mean(0)
    return {
        str(name): AreaShift(reference=float(a), dump=float(b), p=float(p), moved=bool(p < settings.drift_p))
        for name, a, b, p in zip(classes, ours, theirs, p_K, strict=True)
    }


def describe(pool: PredictionPool, dump: str, settings: config.Pool) -> AnswerShifts:
    """How the answers on a dump differ from those on the reference."""
    points = answers(pool)
    reference = points.reference
    there = (pool.dump == dump) & ~reference

    def means(values: Floats) -> MeanShift:
        ours, theirs = values[reference], values[there]
        deviation = float(ours.std())
        change = float(theirs.mean() - ours.mean())
        return MeanShift(
            reference=float(ours.mean()),
            dump=float(theirs.mean()),
            deviations=change / deviation if deviation else 0.0,
        )

    return AnswerShifts(
        confidence=means(pool.confidence),
        margin=means(pool.margin),
        entropy=means(pool.entropy),
        margins=MarginHistograms(
            reference=pool.margins[reference].mean(0).tolist(), dump=pool.margins[there].mean(0).tolist()
        ),
        area=areas(points, pool.area, pool.classes, dump, settings),
    )
