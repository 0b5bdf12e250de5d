"""Counts per image from label maps: confusion, boundary, calibration. Integers only, so sums are exact in any order.

What the counts mean (IoU, mIoU, the rule for absent classes, the bootstrap) is in `pipeline.champions.metrics`, which the gate
shares.
"""

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.champions import metrics
from pipeline.records.scores import Totals
from pipeline.storage import manifest

Labels = NDArray[np.unsignedinteger]
CONFIDENCE_LEVELS = 256
BINS = 15


class LabelError(ValueError):
    """A label map holds an id that is neither a class nor ignore."""


def _range_error(k: int, ignore: int) -> LabelError:
    return LabelError(
        f"label maps hold an id outside 0..{k - 1} (ground truth may also be {ignore}, ignore): "
        "the classes of the model and of the data differ"
    )


@overload
def confusion(truth: Labels, predicted: Labels, k: int, ignore: int) -> NDArray[np.int64]: ...
@overload
def confusion(truth: Tensor, predicted: Tensor, k: int, ignore: int) -> Tensor: ...
def confusion(truth: Labels | Tensor, predicted: Labels | Tensor, k: int, ignore: int) -> NDArray[np.int64] | Tensor:
    """K x K int64 pixel counts, rows ground truth, by one bincount of the joint index.

    Args:
        truth: class ids of any shape, `ignore` where not judged.
        predicted: class ids of the same shape, each < k (a network always answers; never `ignore`).

    Returns:
        NumPy in, NumPy out; a tensor in gives a tensor on the same device (one synchronisation, by bincount).

    Raises:
        LabelError: an id outside the classes in either map.
    """
    if isinstance(truth, Tensor) and isinstance(predicted, Tensor):
        return _confusion_torch(truth, predicted, k, ignore)
    assert isinstance(truth, np.ndarray)
    assert isinstance(predicted, np.ndarray)
    if predicted.size and int(predicted.max()) >= k:
        raise _range_error(k, ignore)
    if truth.dtype == np.uint8 and ignore == 255 and k <= 255:
        # Every uint8 id gets its row, ignore too; the last rows are dropped, which is cheaper than masking.
        joint = truth.astype(np.uint16)
        joint *= np.uint16(k)
        joint += predicted.astype(np.uint16, copy=False)
        counts = np.bincount(joint.ravel(), minlength=256 * k).reshape(256, k)
        if counts[k:255].any():
            raise _range_error(k, ignore)
        return counts[:k]
    wide = truth.astype(np.int64)
    known = wide != ignore
    if (known & ((wide < 0) | (wide >= k))).any():
        raise _range_error(k, ignore)
    joint_64 = np.where(known, wide * k + predicted, k * k)
    return np.bincount(joint_64.ravel(), minlength=k * k + 1)[: k * k].reshape(k, k)


def _confusion_torch(truth: Tensor, predicted: Tensor, k: int, ignore: int) -> Tensor:
    wide, answer = truth.long(), predicted.long()
    outside = (wide < 0) | (wide >= k)
    known = wide != ignore
    joint = torch.where(known, wide * k + answer, k * k)
    # Out-of-range ids go to one more bin, so that checking costs no pass of its own and no extra synchronisation.
    joint = torch.where((known & outside) | (answer < 0) | (answer >= k), k * k + 1, joint)
    counts = torch.bincount(joint.flatten(), minlength=k * k + 2)
    if counts[-1]:
        raise _range_error(k, ignore)
    return counts[: k * k].view(k, k)


def _pool(label_HW: Labels, distance: int, take: np.ufunc) -> Labels:
    """Max- or min-pool with a (2 distance + 1)-square window, stride 1, as two one-dimensional passes of shifts."""
    for axis in (0, 1):
        source, size = label_HW, label_HW.shape[axis]
        out = source.copy()
        for shift in range(1, min(distance, size - 1) + 1):
            near, far = [slice(None)] * 2, [slice(None)] * 2
            near[axis], far[axis] = slice(0, size - shift), slice(shift, size)
            a, b = tuple(near), tuple(far)
            take(out[a], source[b], out=out[a])
            take(out[b], source[a], out=out[b])
        label_HW = out
    return label_HW


def boundary(label_HW: Labels, distance: int) -> NDArray[np.bool_]:
    """Pixels within `distance` (Chebyshev) of another class or of the image's edge: H x W.

    A pixel of class c survives the erosion of c's mask by a (2 distance + 1) square exactly when the window holds
    one value, that is when max-pool equals min-pool; one pass serves all classes. The image's edge counts as a
    boundary, as in the code of Cheng et al., "Boundary IoU" (CVPR 2021), which pads the mask with zeros before eroding.
    """
    near: NDArray[np.bool_] = _pool(label_HW, distance, np.maximum) != _pool(label_HW, distance, np.minimum)
    near[:distance], near[-distance:] = True, True
    near[:, :distance], near[:, -distance:] = True, True
    return near


def boundary_counts(truth_HW: Labels, predicted_HW: Labels, k: int, ignore: int, distance: int) -> NDArray[np.int64]:
    """3 x K int64: pixels in both boundary regions of a class, in the ground truth's, in the prediction's.

    Boundary IoU of class c = row 0 / (row 1 + row 2 - row 0). Where the ground truth is `ignore` the prediction is
    taken as ignore too, so that a perfect prediction scores 1 beside a void region.
    """
    unknown = truth_HW == ignore
    answer = np.where(unknown, truth_HW, predicted_HW.astype(truth_HW.dtype, copy=False))
    truth_edge, answer_edge = boundary(truth_HW, distance) & ~unknown, boundary(answer, distance) & ~unknown
    both = truth_edge & answer_edge & (truth_HW == answer)
    picked = (truth_HW[both], truth_HW[truth_edge], answer[answer_edge])
    return np.stack([np.bincount(ids, minlength=k)[:k] for ids in picked])


def calibration_counts(
    truth: Labels, predicted: Labels, confidence: NDArray[np.uint8], ignore: int
) -> NDArray[np.int64]:
    """256 x 2 int64: pixels per served confidence level (0..255 = 0..1), column 0 wrong, column 1 right; ignore left
    out.
    """
    joint = confidence.astype(np.uint16)
    joint *= np.uint16(2)
    joint += truth == predicted
    joint[truth == ignore] = 2 * CONFIDENCE_LEVELS
    counts = np.bincount(joint.ravel(), minlength=2 * CONFIDENCE_LEVELS + 1)
    return counts[:-1].reshape(CONFIDENCE_LEVELS, 2)


def reliability(counts: NDArray[np.integer], bins: int = BINS) -> NDArray[np.float64]:
    """Calibration counts -> bins x 3: pixels, mean confidence, accuracy (both 0 in an empty bin).

    Bin b holds confidences in (b/bins, (b+1)/bins], and 0 goes to the first (Guo et al., ICML 2017).
    """
    level = np.arange(CONFIDENCE_LEVELS)
    where = np.maximum(-(-level * bins // (CONFIDENCE_LEVELS - 1)) - 1, 0)
    pixels = counts.sum(1).astype(np.float64)
    columns = [
        np.bincount(where, weights=w, minlength=bins)
        for w in (pixels, pixels * level / (CONFIDENCE_LEVELS - 1), counts[:, 1].astype(np.float64))
    ]
    some = np.maximum(columns[0], 1)
    return np.stack([columns[0], columns[1] / some, columns[2] / some], axis=1)


def ece(counts: NDArray[np.integer], bins: int = BINS) -> float:
    """Expected calibration error in 0..1: sum over bins of share * |accuracy - confidence|; 0 without pixels."""
    pixels, confidence, accuracy = reliability(counts, bins).T
    return float((pixels * np.abs(accuracy - confidence)).sum() / max(pixels.sum(), 1))


@dataclass(frozen=True)
class Tally:
    """Everything counted on one image or any set of images; `+` joins, in any order and over any number of
    processes.
    """

    confusion_KK: NDArray[np.int64]
    boundary_3K: NDArray[np.int64]
    calibration_L2: NDArray[np.int64]

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.confusion_KK + other.confusion_KK,
            self.boundary_3K + other.boundary_3K,
            self.calibration_L2 + other.calibration_L2,
        )


def tally(
    truth_HW: Labels, predicted_HW: Labels, confidence_HW: NDArray[np.uint8], *, k: int, ignore: int, distance: int
) -> Tally:
    """All counts of one image at its original size. Raises LabelError as `confusion` does."""
    return Tally(
        confusion(truth_HW, predicted_HW, k, ignore),
        boundary_counts(truth_HW, predicted_HW, k, ignore, distance),
        calibration_counts(truth_HW, predicted_HW, confidence_HW, ignore),
    )


def summary(total: Tally) -> Totals:
    """The scalars of a set of images."""
    conf = total.confusion_KK
    inter, truth, predicted = total.boundary_3K.astype(np.float64)
    union = truth + predicted - inter
    edge = np.divide(inter, union, out=np.full_like(inter, np.nan), where=union > 0)
    return Totals(
        miou=_known(metrics.miou(conf)),
        miou_all=_known(metrics.miou_all(conf)),
        boundary_iou=_known(100 * float(metrics.mean_present(edge))),
        pixel_accuracy=float(np.trace(conf) / conf.sum()) if conf.sum() else None,
        ece=ece(total.calibration_L2),
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


@dataclass(frozen=True)
class Result:
    """Per-image counts in the order of `rows`."""

    rows: tuple[manifest.Row, ...]
    tallies: tuple[Tally, ...]

    @property
    def total(self) -> Tally:
        return reduce(add, self.tallies)

    @property
    def confusion_NKK(self) -> NDArray[np.int64]:
        return np.stack([t.confusion_KK for t in self.tallies])
