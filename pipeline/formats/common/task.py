"""One image on its way to a label tool, and the name by which it is known again when it comes back."""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PREFIX = 12  # hex digits of the image id: 48 bits, so a clash among a million images has odds of 1 in 500
LONGEST = 120  # characters of an image's own name
_NAMED = re.compile(rf"(?:^|[/-])([0-9a-f]{{{PREFIX}}})-[^/]+$")


class Item(NamedTuple):
    """`name`: file name with extension, unique among the items. `label_HW` uint8 ids, 255 = ignore; None: no labels."""

    name: str
    id: str
    image: bytes
    height: int
    width: int
    label_HW: NDArray[np.uint8] | None


def task_name(image_id: str, name: str) -> str:
    """`0123456789ab-night_03.png`: the image's own id in front, folders as `_`, characters that tools rewrite as `_`; of long
    names the end, since a file name has 255 bytes at most and a name in the making some more."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", name)
    return f"{image_id[:PREFIX]}-{plain[-LONGEST:]}"


def id_prefix(name: str) -> str | None:
    """The first digits of the image id in a name that `task_name` made, whatever folder or `abcd1234-` precedes it."""
    match = _NAMED.search(name)
    return match[1] if match else None
