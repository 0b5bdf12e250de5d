"""Label maps to draw on, and polygons filled the slow way."""

import itertools
from collections.abc import Iterable

import numpy as np
from PIL import Image


def regions(height: int, width: int, classes: int, seed: int = 0) -> np.ndarray:
    """Ragged regions with specks and holes: the largest of smooth random fields, plus noise."""
    rng = np.random.default_rng(seed)
    fields = []
    for _ in range(classes):
        coarse = Image.fromarray(rng.normal(0, 1, (5, 6)).astype(np.float32))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        fields.append(smooth + rng.normal(0, 0.1, (height, width)))
    return np.argmax(np.stack(fields), axis=0).astype(np.uint8)


def fill(rings: Iterable[np.ndarray], height: int, width: int) -> np.ndarray:
    """Pixels whose centre has an odd number of border crossings on its left (even-odd rule), by a loop over edges."""
    crossings = np.zeros((height, width + 1), int)
    for ring in rings:
        points = np.asarray(ring).tolist()
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            for row in range(min(y0, y1), max(y0, y1)):
                at = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                crossings[row, min(width, max(0, int(np.ceil(at - 0.5))))] += 1
    return crossings.cumsum(axis=1)[:, :-1] % 2 == 1
