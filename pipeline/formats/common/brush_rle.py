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

    head = int.from_bytes((data + bytes(7))[:7], "big")  # 53 of these 56 bits
    total = head >> 24
    word = (head >> 19 & 31) + 1
    length_bits = [(head >> 15 - 4 * kind & 15) + 1 for kind in range(4)]
    if total != 4 * height * width or word > 8:
        raise Refused(
            "bad-rle", f"brush run lengths of {total} values of {word} bits; {width} x {height} pixels have 4 of 8 each"
        )

    place_R, length_R, repeats_R = _runs(data, total, word, length_bits)

    # A run is one value that repeats, or as many values as it is long, one behind the other.
    stored_R = np.where(repeats_R, 1, length_R)
    offset_V = np.arange(stored_R.sum()) - np.repeat(np.cumsum(stored_R) - stored_R, stored_R)
    value_V = _read_values(data, np.repeat(place_R, stored_R) + word * offset_V, word)
    values = np.repeat(value_V, np.repeat(np.where(repeats_R, length_R, 1), stored_R))
    return values.reshape(height, width, 4)[..., 3] >= _PAINTED


def _runs(
    data: bytes, total: int, word: int, length_bits: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Of each run: the bit at which its values begin, its length, and whether one value repeats.

    Where a run begins is known only when the one before is read, so this is a loop over runs.
    """
    padded = data + bytes(4)
    bits = 8 * len(data)
    places, lengths, repeats = [], [], []
    done = 0
    at = 53
    while done < total:
        byte = at >> 3
        window = int.from_bytes(padded[byte : byte + 4], "big") << (at & 7) & 0xFFFFFFFF  # 25 bits or more from `at`
        size = length_bits[window >> 29 & 3]
        length = ((window & 0x1FFFFFFF) >> 29 - size) + 1
        repeating = window >> 31
        at += 3 + size
        places.append(at)
        lengths.append(length)
        repeats.append(repeating)
        at += word if repeating else word * length
        done += length
        if at > bits or done > total:
            raise Refused("bad-rle", f"brush run lengths end at value {done - length} of {total}; export again")
    return np.array(places, np.int64), np.array(lengths, np.int64), np.array(repeats, np.bool_)


def _read_values(data: bytes, place_V: NDArray[np.int64], word: int) -> NDArray[np.uint8]:
    """The values of `word` bits, 8 at most, that begin at these bits."""
    table = np.frombuffer(data + b"\0", np.uint8).astype(np.uint16)
    pairs = table[:-1] << 8 | table[1:]
    value_V: NDArray[np.uint8] = (pairs[place_V >> 3] >> (16 - word - (place_V & 7)).astype(np.uint16)).astype(np.uint8)
    return value_V & np.uint8((1 << word) - 1)


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
