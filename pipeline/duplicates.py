"""Near-duplicate images: a 64-bit difference hash and a banded index over it."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS = 64
FLAT = 2  # grey levels; neighbouring cells of a picture without any gradient differ by rounding alone


def dhash(image_HWC: NDArray[np.uint8]) -> int | None:
    """64-bit difference hash of an RGB image (H x W x 3, uint8), or None for one that is flat from left to right.

    The grey image is averaged down to 8 rows of 9 cells; bit i says whether a cell is darker than its right
    neighbour, row by row from the top left, most significant bit first (N. Krawetz, "Kind of like that", 2013).
    Invariant to scale and to any brightness change that keeps the order of neighbouring cells. Flat means that no row's
    cells lie `FLAT` or more grey levels apart: then the bits are rounding, not content. 0 is a hash like any other: every
    row gets darker, or stays, from left to right, as under light from the left.
    """
    grey = Image.fromarray(image_HWC).convert("L").resize((9, 8), Image.Resampling.BOX)
    cell_89 = np.asarray(grey, dtype=np.int16)
    if (cell_89.max(axis=1) - cell_89.min(axis=1)).max() < FLAT:
        return None
    bit_88 = cell_89[:, 1:] > cell_89[:, :-1]
    return int.from_bytes(np.packbits(bit_88).tobytes(), "big")


def distance(first: int, second: int) -> int:
    """Number of differing bits, 0..64."""
    return (first ^ second).bit_count()


class NearIndex:
    """Finds an earlier hash within `bits` of a new one without comparing it with all of them.

    The 64 bits are cut into bits + 1 bands. Two hashes that differ in at most `bits` places agree in at least one
    whole band (pigeonhole), so only the entries that share a band are compared. Flat images (None) say nothing about
    each other and are never called near duplicates.
    """

    def __init__(self, bits: int) -> None:
        if not 0 <= bits < BITS:
            raise ValueError(f"bits: expected 0 to {BITS - 1}, got {bits}")
        self.bits = bits
        edges = [round(i * BITS / (bits + 1)) for i in range(bits + 2)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._tables: list[dict[int, list[tuple[int, str]]]] = [{} for _ in self._bands]

    def find(self, value: int | None) -> str | None:
        """Key of the first added entry within `bits` of `value`, or None."""
        if value is None:
            return None
        for (shift, mask), table in zip(self._bands, self._tables, strict=True):
            for other, key in table.get((value >> shift) & mask, ()):
                if distance(value, other) <= self.bits:
                    return key
        return None

    def add(self, value: int | None, key: str) -> None:
        """Remember a hash under `key`; a flat image leaves no trace."""
        if value is None:
            return
        for (shift, mask), table in zip(self._bands, self._tables, strict=True):
            table.setdefault((value >> shift) & mask, []).append((value, key))
