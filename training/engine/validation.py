"""How good the teacher is while it trains: mIoU over val images at working size."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.champions import metrics as scores
from training import inference, metrics
from training.engine.data import Images
from training.engine.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Validator:
    """teacher -> mIoU in percent over (at most `limit`) val images; NaN without val images.

    Ranks score every world-th image each and add their counts: no image twice, none left out.
    """

    images: Images
    n_classes: int
    stride: int
    ignore: int
    ranks: Ranks = ALONE
    limit: int = 128

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> float:
        if not len(self.images):
            return math.nan
        was_training, device = model.training, next(model.parameters()).device
        model.eval()

        total_KK = torch.zeros(self.n_classes, self.n_classes, dtype=torch.int64, device=device)
        chosen = np.linspace(0, len(self.images) - 1, min(self.limit, len(self.images))).round().astype(int)
        for i in chosen[self.ranks.rank :: self.ranks.world]:
            sample = self.images[int(i)]
            label = inference.logits_of(model, sample.image_HWC, self.stride).argmax(0)
            total_KK += metrics.confusion(sample.label_HW.long().to(device), label, self.n_classes, self.ignore)

        model.train(was_training)
        return float(scores.miou(self.ranks.add(total_KK).cpu().numpy()))
