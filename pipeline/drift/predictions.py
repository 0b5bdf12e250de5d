"""How a model's own answers move from the reference to a dump: areas of classes, confidence, refined margins.

A second look beside the features: it sees what the network makes of the images. The points of its two-sample test are,
for each image, the roots of its class areas and of its histogram of refined margins (so that distances are Hellinger's)
and its mean confidence.
"""

from typing import Any

import numpy as np

from pipeline import config
from pipeline.drift import energy_distance, two_sample
from pipeline.drift.two_sample import Cloud
from pipeline.storage.predictions import Floats, Names, Pool


def answers(seen: Pool) -> Cloud:
    """The points of the module's docstring."""
    parts = [np.sqrt(seen.area), np.sqrt(seen.margins), seen.confidence[:, None]]
    return Cloud(np.concatenate(parts, axis=1), seen.dump, seen.group, seen.split)


def areas(
    points: Cloud, area_NK: Floats, classes: Names, dump: str, settings: config.Pool
) -> dict[str, dict[str, Any]]:
    """Class name -> mean area of both sides, p that chance moves any class as far, and whether it moved.

    p counts for all classes together. It is of the same kind as the dump's own: by groups where there are many, else
    by images, when it only says which classes differ most.
    """
    rng = np.random.default_rng(two_sample.SEED)
    those = two_sample.sides(points, dump, settings.drift_p, rng)
    value_NK = area_NK[those.rows]
    p_K = energy_distance.moved(value_NK, those.drawn(settings.permutations, rng), those.member)
    ours, theirs = value_NK[~those.member].mean(0), value_NK[those.member].mean(0)
    return {
        str(name): {"reference": float(a), "dump": float(b), "p": float(p), "moved": bool(p < settings.drift_p)}
        for name, a, b, p in zip(classes, ours, theirs, p_K, strict=True)
    }


def describe(seen: Pool, dump: str, settings: config.Pool) -> dict[str, Any]:
    """Means of both sides and the difference in reference standard deviations; areas; both histograms of margins."""
    points = answers(seen)
    reference = points.reference
    there = (seen.dump == dump) & ~reference
    values: dict[str, Any] = {}
    for key in ("confidence", "margin", "entropy"):
        ours, theirs = getattr(seen, key)[reference], getattr(seen, key)[there]
        deviation = float(ours.std())
        change = float(theirs.mean() - ours.mean())
        values[key] = {
            "reference": float(ours.mean()),
            "dump": float(theirs.mean()),
            "deviations": change / deviation if deviation else 0.0,
        }
    values["margins"] = {
        "reference": seen.margins[reference].mean(0).tolist(), "dump": seen.margins[there].mean(0).tolist(),
    }  # fmt: skip
    values["area"] = areas(points, seen.area, seen.classes, dump, settings)
    return values
