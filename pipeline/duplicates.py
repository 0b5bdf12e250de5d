"""Near-duplicate images: a 64-bit difference hash and a banded index over it."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS = 64


def dhash(image_HWC: NDArray[np.uint8]) -> int:
    """64-bit difference hash of an RGB image (H x W x 3, uint8).

    The grey image is averaged down to 8 rows of 9 cells; bit i says whether a cell is darker than its right
    neighbour, row by row from the top left, most significant bit first (N. Krawetz, "Kind of like that", 2013).
    Invariant to scale and to any brightness change that keeps the order of neighbouring cells.
    """
    grey = Image.fromarray(image_HWC).convert("L").resize((9, 8), Image.Resampling.BOX)
    cell_89 = np.asarray(grey, dtype=np.int16)
    bit_88 = cell_89[:, 1:] > cell_89[:, :-1]
    return int.from_bytes(np.packbits(bit_88).tobytes(), "big")


def distance(first: int, second: int) -> int:
    """Number of differing bits, 0..64."""
    return (first ^ second).bit_count()


class NearIndex:
    """Finds an earlier hash within `bits` of a new one without comparing it with all of them.

    The 64 bits are cut into bits + 1 bands. Two hashes that differ in at most `bits` places agree in at least one
    whole band (pigeonhole), so only the entries that share a band are compared. Flat images (hash 0: no gradient at
    all) say nothing about each other and are never called near duplicates.
    """

    def __init__(self, bits: int) -> None:
        if not 0 <= bits < BITS:
            raise ValueError(f"bits: expected 0 to {BITS - 1}, got {bits}")
        self.bits = bits
        edges = [round(i * BITS / (bits + 1)) for i in range(bits + 2)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._tables: list[dict[int, list[tuple[int, str]]]] = [{} for _ in self._bands]

    def find(self, value: int) -> str | None:
        """Key of the first added entry within `bits` of `value`, or None."""
        if value == 0:
            return None
        for (shift, mask), table in zip(self._bands, self._tables, strict=True):
            for other, key in table.get((value >> shift) & mask, ()):
                if distance(value, other) <= self.bits:
                    return key
        return None

    def add(self, value: int, key: str) -> None:
        """Remember a hash under `key`."""
        for (shift, mask), table in zip(self._bands, self._tables, strict=True):
            table.setdefault((value >> shift) & mask, []).append((value, key))
