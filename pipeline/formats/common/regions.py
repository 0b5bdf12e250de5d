"""A label map cut into regions for hand correction."""

from collections.abc import Iterator

import numpy as np

from pipeline.formats.common.annotations import Label, Patch
from pipeline.imaging.connected_components import runs


def regions(label_HW: Label, smallest: int | None = None) -> Iterator[tuple[int, Patch]]:
    """(id, patch) pairs that cover every pixel exactly once, ordered by id.

    A region (4-connected) of at least `smallest` pixels is a patch of its own; all smaller ones of a class share one
    patch, so that specks are neither lost nor make thousands of objects.

    Args:
        smallest: default 1/2000 of the image, at least 16 pixels: so at most 2000 regions stand alone.
    """
    height, width = label_HW.shape
    limit = max(16, label_HW.size // 2000) if smallest is None else smallest
    flat = label_HW.ravel()
    start, end, region = runs(label_HW)
    size = np.bincount(region, weights=end - start, minlength=len(start))
    value = flat[start].astype(int)
    key = np.where(size[region] >= limit, 256 + region, value)  # below 256: the specks of that id
    row, column = np.divmod(start, width)
    names, inverse = np.unique(key, return_inverse=True)
    low, high = np.full((len(names), 2), flat.size), np.zeros((len(names), 2), int)
    np.minimum.at(low, inverse, np.stack([row, column], axis=1))
    np.maximum.at(high, inverse, np.stack([row + 1, column + end - start], axis=1))
    box = {int(name): [*map(int, low[i]), *map(int, high[i])] for i, name in enumerate(names)}
    key_HW = np.repeat(key, end - start).reshape(height, width)
    found = sorted((int(v), k) for k, v in {int(k): v for k, v in zip(key, value, strict=True)}.items())
    for id_, name in found:
        top, left, bottom, right = box[name]
        yield id_, Patch(top, left, key_HW[top:bottom, left:right] == name)
