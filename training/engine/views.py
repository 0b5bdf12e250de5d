"""From samples to what one step sees: random crops on the device, and the teacher's answers to whole images."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from pipeline.config import Train
from training import inference
from training.engine.data import Batch, Sample
from training.engine.rare_crops import RareCrops
from training.methods import augment
from training.methods.augment import View
from training.methods.step import Views


@dataclass(frozen=True)
class Cropper:
    """Cuts weak views as `config` says. ignore: class id of pixels without a label, and of those outside the photograph.

    rare: places part of the labelled crops; None: chance places all of them.
    """

    config: Train
    ignore: int
    device: torch.device
    rare: RareCrops | None = None

    def crop(self, samples: list[Sample], generator: Generator, rare: RareCrops | None = None) -> View:
        """A random crop of each sample, on the device."""
        images = [sample.image_HWC for sample in samples]
        labels = [sample.label_HW for sample in samples]
        image, label, sizes = augment.stack(images, labels, self.ignore)
        image, label = augment.send(image, self.device), augment.send(label, self.device)
        weight = None
        if any(sample.weight_HW is not None for sample in samples):
            weight = augment.send(_weights(samples, label.shape), self.device)
        centres = None if rare is None else rare.centres(labels, generator)
        return augment.crop(
            image, label, sizes, self.config.crop, self.config.scale, self.ignore, generator, weight_BHW=weight,
            centres_B2=centres,
        )  # fmt: skip

    def views(self, batch: Batch, generator: Generator, *, partner: bool) -> Views:
        """Views of a batch; of its unlabelled images, where it has any, a second one too if the method wants a partner."""
        labelled = self.crop(batch.labelled, generator, self.rare)
        if not batch.unlabelled:
            return Views(labelled)
        unlabelled = self.crop(batch.unlabelled, generator)
        return Views(labelled, unlabelled, self.crop(batch.unlabelled, generator) if partner else None)


def _weights(samples: list[Sample], shape: torch.Size) -> Tensor:
    """weight_BHW uint8 of a batch, padded as its labels are; 255 where a sample has none of its own."""
    weight_BHW = torch.full(tuple(shape), 255, dtype=torch.uint8)
    for weight_HW, sample in zip(weight_BHW, samples, strict=True):
        if sample.weight_HW is not None:
            height, width = sample.weight_HW.shape
            weight_HW[:height, :width] = sample.weight_HW
    return weight_BHW


@torch.no_grad()
def uncut(teacher: nn.Module, samples: list[Sample], stride: int) -> Tensor:
    """logits_BCHW of the whole images, each answered for as at test time, padded right/bottom with 0 to the largest."""
    maps = [inference.logits_of(teacher, sample.image_HWC, stride) for sample in samples]
    height, width = (max(logits.shape[axis] for logits in maps) for axis in (1, 2))
    out = torch.zeros(len(maps), len(maps[0]), height, width, device=maps[0].device)
    for i, logits in enumerate(maps):
        out[i, :, : logits.shape[1], : logits.shape[2]] = logits
    return out
