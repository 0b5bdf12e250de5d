"""What a confusion matrix says, and how sure we may be: IoU, mIoU and the bootstrap over test images.

Rows are ground truth, columns predictions, entries pixels; ignored pixels were never counted. Leading axes broadcast.

The rule for absent classes: a class that occurs neither in the ground truth nor in the prediction of the test set
has an empty union and is *skipped* by `miou`; `miou_all` counts it as 0, which is what the published code bases do
(they add 1e-10 to the union and average over all K). A class that is predicted but not in the ground truth scores 0
in both.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

ABSENT_RULE = (
    "miou skips a class that occurs neither in the ground truth nor in the prediction of the test set; "
    "miou_all counts it as 0"
)
_CHUNK = 4_000_000  # resampling weights held at once


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def as_list(self) -> list[float]:
        return [self.low, self.high]


def marginals(confusion_KK: NDArray[np.integer]) -> Floats:
    """... x K x K counts -> ... x 3 x K: intersection, ground-truth pixels, predicted pixels per class (exact below
    2^53).
    """
    inter = np.diagonal(confusion_KK, axis1=-2, axis2=-1)
    return np.stack([inter, confusion_KK.sum(-1), confusion_KK.sum(-2)], axis=-2).astype(np.float64)


def _iou(marginals_3K: Floats) -> Floats:
    inter, truth, predicted = (marginals_3K[..., i, :] for i in range(3))
    union = truth + predicted - inter
    values: Floats = np.divide(inter, union, out=np.full_like(inter, np.nan), where=union > 0)
    return values


def iou(confusion_KK: NDArray[np.integer]) -> Floats:
    """... x K x K counts -> ... x K in 0..1; NaN for a class with an empty union."""
    return _iou(marginals(confusion_KK))


def mean_present(values_K: Floats) -> Floats:
    """Mean over the last axis without its NaNs; NaN where nothing is left (no warning)."""
    there = ~np.isnan(values_K)
    count = there.sum(-1)
    total = np.where(there, values_K, 0.0).sum(-1)
    mean: Floats = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
    return mean


def miou(confusion_KK: NDArray[np.integer]) -> float:
    """mIoU in percent over the classes that occur in ground truth or prediction; NaN when no pixel was counted."""
    return 100 * float(mean_present(iou(confusion_KK)))


def miou_all(confusion_KK: NDArray[np.integer]) -> float:
    """mIoU in percent over all K classes, an absent one counting 0 (the papers' rule)."""
    return 100 * float(np.nan_to_num(iou(confusion_KK), nan=0.0).mean())


def bootstrap(confusion_NKK: NDArray[np.integer], *, samples: int, seed: int) -> Floats:
    """Per-class IoU of `samples` test sets drawn with replacement from N images: samples x K in 0..1, NaN as in `iou`.

    A draw is a multinomial count per image, so all draws are one matrix product with the per-image marginals. The same
    N, `samples` and `seed` draw the same images: two models' results can be paired row by row.

    Raises:
        ValueError: no image.
    """
    n, k = confusion_NKK.shape[:2]
    if n == 0:
        raise ValueError("bootstrap: the test set is empty")
    flat = marginals(confusion_NKK).reshape(n, 3 * k)
    draw = np.random.default_rng(seed)
    step = max(1, _CHUNK // n)
    parts = []
    for start in range(0, samples, step):
        weights = draw.multinomial(n, np.full(n, 1 / n), size=min(step, samples - start)).astype(np.float64)
        parts.append(_iou((weights @ flat).reshape(-1, 3, k)))
    return np.concatenate(parts)


def interval(values_S: Floats, confidence: float) -> Interval | None:
    """Central percentile interval of bootstrap values, NaNs left out; None when all are NaN."""
    kept = values_S[~np.isnan(values_S)]
    if kept.size == 0:
        return None
    low, high = np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
