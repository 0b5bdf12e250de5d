"""Near-duplicate images: a 64-bit difference hash, an index that grows, all near pairs of many hashes, and a closer look.

The hash proposes and the closer look decides: 64 bits say nothing about a small object, so all pictures of one fixed camera
have nearly the same hash.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS = 64
MAX_TABLES = 20
FLAT = 2  # grey levels; neighbouring cells of a picture without any gradient differ by rounding alone


class Thumbnail(NamedTuple):
    """Means of an image's cells: brightness of 16 x 16, colour (Cb, Cr) of 8 x 8, float32 0..255."""

    luma_HW: NDArray[np.float32]
    chroma_HWC: NDArray[np.float32]


# How far cells of two copies may differ: grey levels, and levels for each level of the picture's own spread (sharp edges
# move from one cell to the next when a picture is scaled). Of 120 copies of 30 photographs (JPEG 20, WebP 30, half and a
# third of the size) two are not recognised, of 547 pairs of a fixed camera with an object of 0.4 % of the picture none is
# taken for a copy.
LUMA_TOLERANCE = (8.0, 0.2)
CHROMA_TOLERANCE = (3.0, 0.25)


def thumbnail(image_HWC: NDArray[np.uint8]) -> Thumbnail:
    """The closer look at an RGB image (H x W x 3, uint8)."""
    image = Image.fromarray(image_HWC).convert("YCbCr")
    luma_HWC = np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
    chroma_HWC = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32)
    return Thumbnail(luma_HWC[..., 0], chroma_HWC[..., 1:])


FEW, PROBES, ROUNDING = 64, 8, 0.01  # pictures compared without a first look; cells of it; its slack in grey levels
CHUNK = 4096  # thumbnails that are compared at once: some 4 MB


class Gallery:
    """Thumbnails by key, compared with one at a time in a few array operations: a fixed camera has thousands alike."""

    def __init__(self) -> None:
        self._place: dict[str, int] = {}
        self._luma_NP = np.empty((64, 256), np.float32)  # each less its mean
        self._power_N = np.empty(64, np.float32)  # sum of its squares
        self._sum_P = np.zeros(256, np.float64)
        self._chroma_NQ = np.empty((64, 128), np.float32)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def add(self, key: str, picture: Thumbnail) -> None:
        """Keep a thumbnail under a new key."""
        place = self._place[key] = len(self._place)
        if place == len(self._luma_NP):
            self._luma_NP = np.concatenate([self._luma_NP, np.empty_like(self._luma_NP)])
            self._chroma_NQ = np.concatenate([self._chroma_NQ, np.empty_like(self._chroma_NQ)])
            self._power_N = np.concatenate([self._power_N, np.empty_like(self._power_N)])
        self._luma_NP[place] = (picture.luma_HW - picture.luma_HW.mean()).ravel()
        self._power_N[place] = max(float((self._luma_NP[place] ** 2).sum()), 1e-6)
        self._sum_P += self._luma_NP[place]
        self._chroma_NQ[place] = (picture.chroma_HWC - picture.chroma_HWC.mean(axis=(0, 1))).ravel()

    def same(self, key: str, others: Sequence[str]) -> list[bool]:
        """Which of the others show the same as `key`, up to brightness, contrast and saturation."""
        place = self._place[key]
        places_K = np.array([self._place[other] for other in others], np.intp)
        same_K = self._may_be_same(place)[places_K] if len(places_K) > FEW else np.ones(len(places_K), np.bool_)
        possible = np.flatnonzero(same_K)
        for start in range(0, len(possible), CHUNK):
            chunk = possible[start : start + CHUNK]
            chunk_K = places_K[chunk]
            fits_K = _fit(self._luma_NP[place], self._luma_NP[chunk_K], LUMA_TOLERANCE)
            near_K = chunk_K[fits_K]
            fits_K[fits_K] = _fit(self._chroma_NQ[place], self._chroma_NQ[near_K], CHROMA_TOLERANCE)
            same_K[chunk] = fits_K
        found: list[bool] = same_K.tolist()
        return found

    def _may_be_same(self, place: int) -> NDArray[np.bool_]:
        """Which of all pictures the cells in which this one is most unlike the mean do not tell apart from it.

        What is new in a fixed camera's picture is in a few cells, so that nearly all others go by these.
        """
        count = len(self._place)
        own_P = self._luma_NP[place]
        # not `@`: for so few numbers the threads of a BLAS wait for each other longer than they work
        gain_N = np.einsum("np,p->n", self._luma_NP[:count], own_P) / self._power_N[:count]
        levels, share = LUMA_TOLERANCE
        limit = levels + share * float(np.sqrt((own_P * own_P).mean())) + ROUNDING
        may_N = np.ones(count, np.bool_)
        for cell in np.argsort(np.abs(own_P - self._sum_P / count))[-PROBES:]:
            may_N &= np.abs(own_P[cell] - gain_N * self._luma_NP[:count, cell]) <= limit
        return may_N


def _fit(
    first_P: NDArray[np.float32], other_KP: NDArray[np.float32], tolerance: tuple[float, float]
) -> NDArray[np.bool_]:
    """For each other (its mean taken off, as the first's) whether no cell differs by more than the tolerance once it is
    fitted to the first by least squares."""
    levels, share = tolerance
    spread = float(np.sqrt((first_P * first_P).mean()))
    gain_K = (other_KP @ first_P) / np.maximum((other_KP * other_KP).sum(axis=1), 1e-6)
    furthest_K = np.abs(first_P - gain_K[:, None] * other_KP).max(axis=1, initial=0)
    fits_K: NDArray[np.bool_] = furthest_K <= levels + share * spread
    return fits_K


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
    """Finds an earlier hash within `bits` of a new one, one at a time, without comparing it with all of them.

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


def near_pairs(value_N: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Places (P x 2, the smaller first, ascending) of all pairs of distinct hashes that differ in at most `bits` places.

    The 64 bits are cut into bits + r blocks; two hashes that differ in at most `bits` places agree in at least r whole
    blocks (pigeonhole), so for each choice of r blocks only those that agree in them are compared, found by sorting (G.
    Manku et al., "Detecting near-duplicates for web crawling", WWW 2007). One block alone is not enough for photographs:
    in the sky above every street the same bits are set. Time is that of the sorts, N log N, beside the pairs that agree.

    Raises:
        ValueError: `bits` is not in 0..63.
    """
    if not 0 <= bits < BITS:
        raise ValueError(f"bits: expected 0 to {BITS - 1}, got {bits}")
    found = [np.zeros((0, 2), np.int64)]
    agree = next((r for r in (3, 2) if comb(bits + r, r) <= MAX_TABLES), 1)
    edges = [round(i * BITS / (bits + agree)) for i in range(bits + agree + 1)]
    masks = [((1 << (high - low)) - 1) << low for low, high in pairwise(edges)]
    tables = [np.uint64(sum(chosen)) for chosen in combinations(masks, agree)] if bits else []
    for number, table in enumerate(tables):
        key_N = value_N & table
        order_N = np.argsort(key_N)
        key_N, sorted_N = key_N[order_N], value_N[order_N]
        at = np.arange(len(value_N))
        for step in range(1, len(value_N)):  # ends with the longest run of equal keys
            at = at[at + step < len(value_N)]
            at = at[key_N[at + step] == key_N[at]]
            if not len(at):
                break
            differ = sorted_N[at] ^ sorted_N[at + step]
            near = np.bitwise_count(differ) <= bits
            for earlier in tables[:number]:  # which had the pair already
                near[near] = (differ[near] & earlier) != 0
            close = at[near]
            if len(close):
                found.append(np.sort(np.stack([order_N[close], order_N[close + step]], axis=1), axis=1))
    pairs_P2 = np.concatenate(found)
    return pairs_P2[np.lexsort((pairs_P2[:, 1], pairs_P2[:, 0]))]


def neighbours(values: Iterable[int | None], bits: int) -> dict[int, list[int]]:
    """Hash -> all hashes among `values` within `bits` of it, itself included; left out where nothing is near.

    A hash that occurs several times is near itself. None, of flat images, is near nothing: they say nothing about each
    other.
    """
    counts = Counter(value for value in values if value is not None)
    value_N = np.fromiter(counts, np.uint64, len(counts))
    near = {value: [value] for value, count in counts.items() if count > 1}
    for first, second in value_N[near_pairs(value_N, bits)].tolist():
        near.setdefault(first, [first]).append(second)
        near.setdefault(second, [second]).append(first)
    return near
