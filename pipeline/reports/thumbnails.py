"""Small JPEG data URIs of images from anywhere in the pipeline, under one budget of bytes."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.formats.common.source import name_id
from pipeline.imaging import decode, label_maps
from pipeline.storage import manifest, shards

SIDE, STRIP = 240, 960  # pixels: of a picture's longer side, of a strip of several
MOST_PIXELS = 40_000_000  # a larger one is not decoded for a thumbnail


class Album:
    """Makes data URIs until `budget` characters are used up; then, and for what cannot be decoded, "" ."""

    def __init__(self, budget: int) -> None:
        self.left = budget

    def uri(self, image_HWC: NDArray[np.uint8], side: int = SIDE) -> str:
        picture = Image.fromarray(image_HWC)
        picture.thumbnail((side, side))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=72)
        text = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(text) > self.left:
            return ""
        self.left -= len(text)
        return text

    def of_bytes(self, data: bytes, side: int = SIDE) -> str:
        """Of an image file's bytes, however hostile."""
        try:
            return self.uri(decode.decode(data, max_pixels=MOST_PIXELS), side)
        except (ValueError, OSError):
            return ""

    def of_row(self, row: manifest.Row | None, root: Path = Path()) -> str:
        if row is None:
            return ""
        try:
            return self.of_bytes(manifest.read_image_bytes(row, root))
        except (ValueError, OSError):
            return ""

    def of_file(self, path: Path, side: int = SIDE) -> str:
        try:
            return self.of_bytes(path.read_bytes(), side)
        except OSError:
            return ""

    def overlaid(self, image: Path, mask: Path, palette: Sequence[Any]) -> str:
        """An image file with a mask of class ids over it."""
        try:
            image_HWC = decode.decode(image.read_bytes(), max_pixels=MOST_PIXELS)
            mask_HW = label_maps.decode_mask(mask.read_bytes(), max_pixels=MOST_PIXELS).astype(np.uint8)
            return self.uri(label_maps.overlay(image_HWC, mask_HW, [tuple(c) for c in palette], 0.5))
        except (ValueError, OSError):
            return ""


def originals(archive: Path, names: Sequence[str]) -> Mapping[str, bytes]:
    """Bytes of the images that an archive holds under these name ids; those not found are left out."""
    wanted, found = set(names), dict[str, bytes]()
    try:
        for member in shards.members(archive) if wanted else ():
            key = name_id(member.name.removeprefix("images/"))
            if key in wanted and not member.name.startswith("masks/"):
                found[key] = shards.read(archive, member.offset, member.length)
    except (ValueError, OSError):
        return found
    return found
