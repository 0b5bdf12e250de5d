"""Samples in memory with the interface of training.engine.data.Images."""

from types import SimpleNamespace

import torch

from training.engine.data import Sample


class Memory:
    """Random colours labelled by brightness; the interface of training.engine.data.Images."""

    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        self.rows = [SimpleNamespace(name=f"{seed}-{i}") for i in range(n)]
        self.samples = []
        for _ in range(n):
            image = torch.randint(0, 256, (18, 20, 3), generator=g, dtype=torch.uint8)
            image[:9] //= 3
            self.samples.append(Sample(image, (image.float().mean(2) / 86).int().clamp(0, 2)))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.samples[index]
