"""Pseudo-labels made once, before training: by the champion that it starts from, over the whole unlabelled pool.

A round of self-training (ST++, Yang et al., CVPR 2022, its second stage without the choice of images). The method makes
pseudo-labels anew at each step; these stand for the whole training. Only pixels with at least `train.offline` of S4MC's
refined margin have one. They have their share of each labelled batch, half of it at most; the true labels have the rest.
Off unless asked for: 300 steps of S4MC from a champion of 40.2 test mIoU on CamVid (46 labels, one seed) came to 43.4, with
labels of margin 0.9 to 40.9 (benchmarks/results/offline_round.json): what the champion takes for buildings stays so.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import console
from pipeline.storage import atomic
from training import inference
from training.engine.data import Images, Sample
from training.methods.s4mc import margin, refine


def sure_labels(logits_KHW: Tensor, least: float, ignore: int) -> NDArray[np.uint8]:
    """uint8 H x W: the class of the highest refined score where its lead over the next is at least `least`, in 0..1;
    else `ignore`."""
    refined_BKHW = refine(torch.softmax(logits_KHW.float(), dim=0)[None])
    label_HW, margin_HW = refined_BKHW.argmax(1)[0], margin(refined_BKHW)[0]
    return torch.where(margin_HW >= least, label_HW, ignore).to(torch.uint8).cpu().numpy()


class Relabelled(Images):
    """The first of `images`, with labels that are not their own: uint8 of each one's working size, by `zlib`."""

    def __init__(self, images: Images, packed: Sequence[bytes]) -> None:
        self.rows = images.rows[: len(packed)]
        self._images, self._packed = images, packed

    def __getitem__(self, index: int) -> Sample:
        image_HWC = self._images[index].image_HWC
        label_HW = np.frombuffer(zlib.decompress(self._packed[index]), np.uint8).reshape(image_HWC.shape[:2])
        return Sample(image_HWC, torch.from_numpy(label_HW.astype(np.int32)))


def relabel(
    model: nn.Module, images: Images, count: int, *, least: float, ignore: int, stride: int, kept: Path | None = None
) -> Relabelled:
    """The first `count` images with the model's labels; the model keeps the mode that it had.

    All of them, also where it is sure of nothing: so their order hangs on the pool alone, not on a card's rounding.

    Args:
        kept: a file where the labels are; written where they are not, so that a resumed run need not ask again.
    """
    if kept is not None and kept.exists():
        with np.load(kept, allow_pickle=False) as arrays:
            ends = np.cumsum(arrays["sizes"])
            return Relabelled(images, [part.tobytes() for part in np.split(arrays["packed"], ends[:-1])])
    was_training, packed = model.training, list[bytes]()
    model.eval()
    with console.bar("offline labels", count) as bar:
        for i in range(count):
            label_HW = sure_labels(inference.logits_of(model, images[i].image_HWC, stride), least, ignore)
            packed.append(zlib.compress(label_HW.tobytes(), 1))
            bar.advance(1)
    model.train(was_training)
    if kept is not None and packed:
        with atomic.replacing(kept) as file:
            np.savez(file, packed=np.frombuffer(b"".join(packed), np.uint8), sizes=np.array([len(p) for p in packed]))
    return Relabelled(images, packed)
