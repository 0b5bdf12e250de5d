"""What predict left about the pool, and image descriptors that need no network: the numbers drift and rank work on.

data/pool/images.npz, one row an image (labelled, unlabelled and later dumps): id, name, dump, group ("" where
unknown), split, embedding N x D, confidence, margin and entropy (means in 0..1), area N x K (share of pixels per
predicted class), doubt N x K (per predicted class, the sum of 1 - refined margin over its pixels, divided by all
pixels), margins N x 16 (share of pixels by refined margin, 16 equal bins of 0..1); and `classes`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import paths

Floats = NDArray[np.float64]
Names = NDArray[np.str_]

FILE, PRELABELS = paths.PREDICTIONS, paths.PRELABELS
DESCRIPTOR = 80
MARGIN_BINS = 16
_KEYS = (
    "id",
    "name",
    "dump",
    "group",
    "split",
    "embedding",
    "confidence",
    "margin",
    "entropy",
    "area",
    "doubt",
    "classes",
    "margins",
)


class PoolError(ValueError):
    """The pool's files are missing or damaged; the message says what to run."""


@dataclass(frozen=True)
class PredictionPool:
    """The arrays of the module's docstring."""

    id: Names
    name: Names
    dump: Names
    group: Names
    split: Names
    embedding: Floats
    confidence: Floats
    margin: Floats
    entropy: Floats
    area: Floats
    doubt: Floats
    classes: Names
    margins: Floats


def read_pool(path: Path = FILE) -> PredictionPool:
    """Raises PoolError when the file is missing or lacks an array."""
    if not path.exists():
        raise PoolError(f"{path}: not found; run the predict stage")
    with np.load(path, allow_pickle=False) as arrays:
        missing = [key for key in _KEYS if key not in arrays]
        if missing:
            raise PoolError(f"{path}: arrays {missing} are missing; run the predict stage again")
        values = {key: arrays[key] for key in _KEYS}
    for key in ("embedding", "confidence", "margin", "entropy", "area", "doubt", "margins"):
        values[key] = values[key].astype(np.float64)
    return PredictionPool(**values)


def descriptor(image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """80 numbers about light, colour and texture, no network needed: what a dump looks like before anything is trained.

    Square roots of histogram shares (so that Euclidean distance is Hellinger's): luma, blue and red difference (16
    bins each) and log gradient size (16), and the mean luma of a 4 x 4 grid over 255 times a quarter. From at most
    about 128 x 128 samples.
    """
    step = max(1, max(image_HWC.shape[:2]) // 128)
    rgb = image_HWC[::step, ::step].astype(np.float32)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # BT.601
    planes = [luma, 128 + 0.564 * (blue - luma), 128 + 0.713 * (red - luma)]
    gradient = np.abs(np.diff(luma, axis=0, append=luma[-1:])) + np.abs(np.diff(luma, axis=1, append=luma[:, -1:]))
    planes.append(np.log2(1 + gradient) * 28)  # 0..510 -> 0..252
    parts = [np.sqrt(np.histogram(p, bins=16, range=(0, 256))[0] / p.size) for p in planes]
    rows, columns = (np.array_split(np.arange(n), 4) for n in luma.shape)
    grid = [luma[np.ix_(r, c)].mean() if len(r) and len(c) else 0.0 for r in rows for c in columns]
    return np.concatenate([*parts, 0.25 * np.array(grid) / 255]).astype(np.float32)
