"""Label Studio's brush: run lengths over the R, G, B, A values of a picture, packed into bits.

32 bits: how many values; 5: bits a value, minus 1; four times 4: bits of each kind of run length, minus 1. Then runs:
1 bit (1: one value repeated, 0: values in turn), 2 bits: which kind of length, the length minus 1, the value or values.
Most significant bit first (thi.ng/rle-pack, which Label Studio's front end uses). What is painted is told by alpha.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.decode import Refused

_LENGTH_BITS = (3, 4, 8, 16)
_PAINTED = 128  # alpha from here on is paint: the brush's edge is blended


def decode(rle: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """Packed bytes, as the list in Label Studio's JSON -> painted pixels, H x W.

    Raises:
        Refused: "bad-rle": no bytes, cut short, or of another size than the picture.
    """
    try:
        data = bytes(rle)
    except (TypeError, ValueError) as error:
        raise Refused("bad-rle", "brush run lengths must be a list of bytes, 0 to 255; export again") from error
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    padded = data + bytes(8)

    def read(at: int, count: int) -> int:
        word = int.from_bytes(padded[at >> 3 : (at >> 3) + 6], "big")  # 48 bits hold 32 from any bit on
        return word >> (48 - (at & 7) - count) & (1 << count) - 1

    total, word = read(0, 32), read(32, 5) + 1
    if total != 4 * height * width or word > 8:
        raise Refused(
            "bad-rle", f"brush run lengths of {total} values of {word} bits; {width} x {height} pixels have 4 of 8 each"
        )
    kinds = [read(37 + 4 * kind, 4) + 1 for kind in range(4)]
    values, done, at = np.zeros(total, np.uint8), 0, 53
    weights = 1 << np.arange(word)[::-1]
    while done < total:
        size = kinds[read(at + 1, 2)]
        count = read(at + 3, size) + 1
        wide = word if read(at, 1) else word * count
        place, after = at + 3 + size, at + 3 + size + wide
        if after > len(bits) or done + count > total:
            raise Refused("bad-rle", f"brush run lengths end at value {done} of {total}; export again")
        if wide == word:
            values[done : done + count] = read(place, word)
        else:
            values[done : done + count] = bits[place:after].reshape(count, word) @ weights
        done, at = done + count, after
    return values.reshape(height, width, 4)[..., 3] >= _PAINTED


def encode(mask_HW: NDArray[np.bool_]) -> list[int]:
    """Painted pixels -> packed bytes: all four values 255 where painted, else 0. As Label Studio's own converter."""
    flat = mask_HW.ravel()
    edges = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]))
    runs, painted = 4 * np.diff(edges), flat[edges[:-1]]
    kind = np.searchsorted((8, 16, 256), runs)
    pieces = np.where(kind == 3, -(-runs // (1 << 16)), 1)  # 65536 is the longest run
    kind, painted = np.repeat(kind, pieces), np.repeat(painted, pieces)
    length = np.full(len(kind), 1 << 16)
    length[np.cumsum(pieces) - 1] = runs - (pieces - 1) * (1 << 16)
    size = np.array(_LENGTH_BITS)[kind]
    code = ((4 | kind) << size | length - 1) << 8 | np.where(painted, 255, 0)
    used = 3 + size + 8
    place = used[:, None] - 1 - np.arange(27)
    bits = (code[:, None] >> np.maximum(place, 0) & 1)[place >= 0]
    head = f"{4 * flat.size:032b}{8 - 1:05b}" + "".join(f"{n - 1:04b}" for n in _LENGTH_BITS)
    packed = np.packbits(np.concatenate(([int(bit) for bit in head], bits)).astype(np.uint8)).tobytes()
    return list(packed if (len(head) + bits.size) % 8 else packed + b"\0")
