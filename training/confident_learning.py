"""Where a network confidently contradicts a mask: confident learning on pixels, counted by connected regions.

A pixel of given class g counts as another class s when p_s reaches t_s, the mean p_s over the pixels that masks call s, and
s is the most probable such class (Northcutt, Jiang and Chuang, "Confident Learning", JAIR 70, 2021, the counting rule of the
confident joint). So a class that the network is never sure of needs less to be suggested than one that it always is. Pixels
near a border of the mask are left out, since nobody draws those alike; what remains counts as regions of one (g, s), and
specks do not count at all.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.connected_components import components
from training.metrics import boundary

Floats = NDArray[np.float64]
Labels = NDArray[np.uint8]
SPECK = 1 / 2000  # of the image's pixels: a smaller region is not worth a person's look


@dataclass(frozen=True)
class Region:
    """Connected pixels that the mask calls `given` and the network `suggested`.

    weight: sum of p_suggested - p_given over its pixels. box: left, top, right, bottom; the last two exclusive.
    """

    given: int
    suggested: int
    pixels: int
    weight: float
    box: tuple[int, int, int, int]


def _of(probability_KHW: NDArray[np.floating], label_HW: Labels) -> NDArray[np.floating]:
    """p of each pixel's label; of the last class where the label is no class."""
    place_HW = np.minimum(label_HW, len(probability_KHW) - 1).astype(np.int64)
    own_HW: NDArray[np.floating] = np.take_along_axis(probability_KHW, place_HW[None], 0)[0]
    return own_HW


def self_confidence(probability_KHW: NDArray[np.floating], mask_HW: Labels) -> tuple[Floats, Floats]:
    """Sum of p_c over the pixels that the mask calls c, and their number: each K. Ids beyond K (ignore) are left out."""
    k = len(probability_KHW)
    known = mask_HW < k
    given = mask_HW[known]
    own = _of(probability_KHW, mask_HW)[known]
    sum_K: Floats = np.bincount(given, own, minlength=k).astype(np.float64)  # bincount of nothing counts in integers
    return sum_K, np.bincount(given, minlength=k).astype(np.float64)


def thresholds(sum_K: Floats, count_K: Floats) -> Floats:
    """Mean self-confidence per class; infinite for a class that no mask names, which is then never suggested."""
    mean_K: Floats = np.divide(sum_K, count_K, out=np.full(len(sum_K), np.inf), where=count_K > 0)
    return mean_K


def suggestions(
    probability_KHW: NDArray[np.floating], mask_HW: Labels, threshold_K: Floats, *, ignore: int, distance: int
) -> tuple[Labels, NDArray[np.floating]]:
    """suggested_HW (`ignore` where the mask stands) and gain_HW = p_suggested - p_given (0 there).

    distance: pixels this near a border of the mask, or of the image, are not judged (Chebyshev).
    """
    k = len(probability_KHW)
    sure_KHW = np.where(probability_KHW >= threshold_K[:, None, None], probability_KHW, 0)
    best_HW = sure_KHW.argmax(0).astype(np.uint8)
    judged_HW = (mask_HW < k) & ~boundary(mask_HW, distance) & (sure_KHW.max(0) > 0) & (best_HW != mask_HW)
    gain_HW = np.where(judged_HW, _of(probability_KHW, best_HW) - _of(probability_KHW, mask_HW), 0)
    judged_HW &= gain_HW > 0  # the given class may be the most probable one and miss its own, higher bar
    return np.where(judged_HW, best_HW, np.uint8(ignore)), np.where(judged_HW, gain_HW, 0)


def regions(mask_HW: Labels, suggested_HW: Labels, gain_HW: NDArray[np.floating], *, ignore: int) -> list[Region]:
    """Regions above SPECK of the image, heaviest first."""
    number_HW = components(mask_HW.astype(np.int32) * 256 + suggested_HW)
    there_HW = suggested_HW != ignore
    rows, columns = np.nonzero(there_HW)
    number = number_HW[there_HW]
    found = []
    pixels, weight = np.bincount(number), np.bincount(number, gain_HW[there_HW])
    for one in np.flatnonzero(pixels >= max(1.0, SPECK * mask_HW.size)):
        inside = number == one
        y, x = rows[inside], columns[inside]
        given, suggested = int(mask_HW[y[0], x[0]]), int(suggested_HW[y[0], x[0]])
        box = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
        found.append(Region(given, suggested, int(pixels[one]), float(weight[one]), box))
    return sorted(found, key=lambda region: (-region.weight, region.box))


def score(found: list[Region], mask_HW: Labels, *, ignore: int) -> float:
    """Share of the labelled pixels that regions would repaint, each pixel by its gain: 0..1."""
    return sum(region.weight for region in found) / max(1, int((mask_HW != ignore).sum()))
