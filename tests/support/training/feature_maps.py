"""Random embeddings of a small feature map, and bilinear upsampling pixel by pixel."""

import numpy as np
import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def embeddings(batch=2, k=3, n=11, seed=0, dtype=torch.float64, scale=1.5):
    random = generator(seed)
    return [(torch.randn(batch, k, n, generator=random, dtype=torch.float64) * scale).to(dtype) for _ in range(3)]


def resize(field, size):
    """Bilinear with the corners of both grids on each other, pixel by pixel."""
    field = np.asarray(field, dtype=np.float64)
    h, w = field.shape
    out = np.empty(size)
    for y, x in np.ndindex(*size):
        v = y * (h - 1) / (size[0] - 1) if size[0] > 1 else 0.0
        u = x * (w - 1) / (size[1] - 1) if size[1] > 1 else 0.0
        y0, x0 = min(int(v), h - 1), min(int(u), w - 1)
        y1, x1, dy, dx = min(y0 + 1, h - 1), min(x0 + 1, w - 1), v - y0, u - x0
        upper, lower = (field[r, x0] * (1 - dx) + field[r, x1] * dx for r in (y0, y1))
        out[y, x] = upper * (1 - dy) + lower * dy
    return out
