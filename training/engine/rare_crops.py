"""Crops that show rare classes more often than chance would.

A class of a thousandth of the pixels is in few random crops, and a network trained on a dozen images never learns it. Here
a share of the labelled crops is placed so that it holds a pixel of a class drawn by its rarity: rare class sampling of
DAFormer (Hoyer, Dai and Van Gool, CVPR 2022, section 3.3), which draws images; with few images each is met soon enough, so
the draw is of the crop's place inside its image.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class RareCrops:
    """share: of the crops, in 0..1, that are placed by class. weight_K: how often each class is drawn, up to a factor."""

    share: float
    weight_K: Tensor

    def centres(self, labels_HW: Sequence[Tensor], generator: Generator) -> Tensor:
        """A pixel (y, x) of each label map that its crop shall hold, centres_B2; NaN where chance places the crop.

        A class among those in the map is drawn by `weight_K`, then one of its pixels, each as likely. Values beyond the
        classes (ignore) are never drawn.
        """
        centres_B2 = torch.full((len(labels_HW), 2), torch.nan)
        for i, label_HW in enumerate(labels_HW):
            if torch.rand((), generator=generator) >= self.share:
                continue
            weight_K = torch.where(_counts(label_HW, len(self.weight_K)) > 0, self.weight_K, 0.0)
            if not weight_K.any():
                continue
            k = int(torch.multinomial(weight_K, 1, generator=generator))
            places_N = np.flatnonzero(label_HW.numpy() == k)  # several times as fast as torch's on a CPU
            place = int(places_N[int(torch.randint(len(places_N), (), generator=generator))])
            centres_B2[i] = torch.tensor(divmod(place, label_HW.shape[1]), dtype=torch.float32)
        return centres_B2


def rare_crops(share: float, labels_HW: Iterable[Tensor], n_classes: int) -> RareCrops:
    """Classes drawn by one over the square root of their share of all labelled pixels; absent ones as the rarest."""
    counts_K = torch.zeros(n_classes, dtype=torch.float64)
    for label_HW in labels_HW:
        counts_K += _counts(label_HW, n_classes)
    least = counts_K[counts_K > 0].min() if counts_K.any() else torch.ones((), dtype=torch.float64)
    return RareCrops(share, counts_K.clamp_min(float(least)).rsqrt().float())


def _counts(label_HW: Tensor, n_classes: int) -> Tensor:
    """Pixels of each class; values beyond the classes are left out."""
    counts = np.bincount(label_HW.numpy().ravel(), minlength=n_classes)  # torch's wants a filtered copy in 64 bits
    return torch.from_numpy(counts[:n_classes])
