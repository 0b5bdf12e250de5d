"""Pseudo-labels made once, before training: by the champion that it starts from, over the whole unlabelled pool.

A round of self-training (ST++, Yang et al., CVPR 2022, its second stage without the choice of images). The method makes
pseudo-labels anew at each step; these stand for the whole training. Only pixels with at least `train.offline` of S4MC's
refined margin have one. They are half of each labelled batch, the true labels the other.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import progress
from training import infer
from training.data import Images, Sample
from training.refine import margin, refine


def sure_labels(logits_KHW: Tensor, least: float, ignore: int) -> NDArray[np.uint8]:
    """uint8 H x W: the class of the highest refined score where its lead over the next is at least `least`, in 0..1;
    else `ignore`."""
    refined_BKHW = refine(torch.softmax(logits_KHW.float(), dim=0)[None])
    label_HW, margin_HW = refined_BKHW.argmax(1)[0], margin(refined_BKHW)[0]
    return torch.where(margin_HW >= least, label_HW, ignore).to(torch.uint8).cpu().numpy()


class Relabelled(Images):
    """Some of `images`, none at first, with labels that are not their own: kept compressed, all in memory."""

    def __init__(self, images: Images) -> None:
        self.rows = []
        self._images, self._at, self._packed = images, list[int](), list[bytes]()

    def add(self, index: int, label_HW: NDArray[np.uint8]) -> None:
        """The image at `index`, with this label (H x W of its working size)."""
        self.rows.append(self._images.rows[index])
        self._at.append(index)
        self._packed.append(zlib.compress(label_HW.tobytes(), 1))

    def __getitem__(self, index: int) -> Sample:
        image_HWC = self._images[self._at[index]].image_HWC
        label_HW = np.frombuffer(zlib.decompress(self._packed[index]), np.uint8).reshape(image_HWC.shape[:2])
        return Sample(image_HWC, torch.from_numpy(label_HW.astype(np.int32)))


def relabel(
    model: nn.Module, images: Images, chosen: Sequence[int], *, least: float, ignore: int, stride: int
) -> Relabelled:
    """Those of the `chosen` images in which `model` is sure of a pixel; the model keeps the mode that it had."""
    was_training, found = model.training, Relabelled(images)
    model.eval()
    with progress.bar("offline labels", len(chosen)) as bar:
        for i in chosen:
            label_HW = sure_labels(infer.logits_of(model, images[i].image_HWC, stride), least, ignore)
            if (label_HW != ignore).any():
                found.add(i, label_HW)
            bar.advance(1)
    model.train(was_training)
    return found
