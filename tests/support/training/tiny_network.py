"""A small network with feature maps (BatchNorm, dropout, two depths), and random views for one step."""

import torch
import torch.nn.functional as F
from torch import nn

from training.methods.augment import View


class Featured(nn.Module):
    """encode -> [scaled image, half, quarter]; decode uses both depths; forward = decode(encode)."""

    has_features = True
    channels = 8

    def __init__(self, k=3, dropout=0.2, norm=True):
        super().__init__()
        self.net = nn.Module()
        maybe = nn.BatchNorm2d if norm else (lambda c: nn.Identity())
        self.net.encoder = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), maybe(6), nn.ReLU()),
                nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), maybe(8), nn.ReLU()),
            ]
        )
        self.mix = nn.Sequential(nn.Conv2d(14, 8, 3, padding=1), maybe(8), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Conv2d(8, k, 1)

    def encode(self, image_BCHW):
        features = [image_BCHW / 127.5 - 1]
        for stage in self.net.encoder:
            features.append(stage(features[-1]))
        return features

    def decode(self, features, size):
        deep = F.interpolate(features[2], features[1].shape[-2:], mode="bilinear")
        return F.interpolate(self.head(self.mix(torch.cat([features[1], deep], 1))), size, mode="bilinear")

    def forward(self, image_BCHW):
        return self.decode(self.encode(image_BCHW), image_BCHW.shape[-2:])


def view(n, seed, size=(16, 20), k=3, ragged=True):
    """Smooth random images, random labels with an ignored corner, and a strip that is no photograph."""
    g = torch.Generator().manual_seed(seed)
    image = F.interpolate(255 * torch.rand(n, 3, 4, 5, generator=g), size, mode="bilinear")
    label = torch.randint(0, k, (n, *size), generator=g)
    label[:, :2, :3] = 255
    valid = torch.ones(n, *size, dtype=torch.bool)
    if ragged:
        valid[0, :, -3:] = False
    return View(image * valid[:, None], torch.where(valid, label, 255), valid)
