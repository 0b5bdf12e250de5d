"""Which image stands at a position of an endless shuffled stream: computed, not looked up in a permutation.

A permutation of ten million images takes most of a second to draw and 80 MB to hold, and a step needs 32 entries of it.
Here a position is encrypted instead: a Feistel network over a domain just larger than the pool, walked until it falls into
the pool (Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, generalised Feistel and cycle walking).
Microseconds a position whatever the pool's size, and nothing to keep.
"""

from math import isqrt

ROUNDS = 8  # each changes the row, then the column; with 4 the orders of five images are visibly not equally frequent
_MASK = (1 << 64) - 1
# Increment and multipliers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def order(length: int, seed: int, start: int, count: int, stream: int = 0) -> list[int]:
    """Items start..start+count of an endless stream of seeded permutations of range(length).

    Every item occurs once before any occurs twice, across batch borders too; any position can be asked for directly,
    so a resumed run needs only the step.

    Args:
        stream: streams of one seed are independent of each other.
    Raises:
        ValueError: something is asked of an empty pool.
    """
    if length < 1 and count:
        raise ValueError(f"{count} images asked of an empty pool")
    found: list[int] = []
    while len(found) < count:
        epoch, offset = divmod(start + len(found), length)
        permutation = Permutation(length, seed, epoch, stream)
        last = min(length, offset + count - len(found))
        found += [permutation[position] for position in range(offset, last)]
    return found


class Permutation:
    """A bijection of range(length) onto itself, drawn by (seed, epoch, stream); `permutation[position]` is its image.

    The domain is rows x columns, both near the square root of `length`: few places lie outside the pool, so that walking
    seldom takes a second turn. Rows are even in number: between two odd sides only even permutations are drawn.
    """

    def __init__(self, length: int, seed: int, epoch: int, stream: int = 0) -> None:
        self.length = length
        side = isqrt(max(length, 1) - 1) + 1
        self._rows = side + side % 2
        self._columns = -(-length // self._rows)

        key = 0
        for part in (seed, epoch, stream):
            key = _mixed(key ^ part)
        self._keys = [(_mixed(key + 2 * number), _mixed(key + 2 * number + 1)) for number in range(ROUNDS)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> int:
        """Raises IndexError outside 0..length-1."""
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} of a pool of {self.length}")
        place = self._encrypted(position)
        while place >= self.length:
            place = self._encrypted(place)
        return place

    def _encrypted(self, place: int) -> int:
        row, column = divmod(place, self._columns)
        for of_rows, of_columns in self._keys:
            row = (row + _mixed(of_rows ^ column)) % self._rows
            column = (column + _mixed(of_columns ^ row)) % self._columns
        return row * self._columns + column


def _mixed(value: int) -> int:
    """64 bits of which each depends on every bit of `value`: one output of SplitMix64."""
    value = (value + _STEP) & _MASK
    value = (value ^ value >> 30) * _FIRST & _MASK
    value = (value ^ value >> 27) * _SECOND & _MASK
    return value ^ value >> 31
