"""COCO panoptic PNGs: each pixel's colour is a segment's id, R + 256 G + 65536 B; 0 is in no segment.

Format: https://cocodataset.org/#format-data, section 4.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.formats.common import parsing
from pipeline.formats.common.source import SourceError
from pipeline.imaging import decode, label_maps
from pipeline.storage import archives


def find(root: Path, file: Path, annotation: Any) -> Path:
    """A panoptic annotation's PNG: in the folder of the JSON file's name, beside it or in the source.

    Raises:
        SourceError: a file_name that leads out of the source, or a PNG that is nowhere.
    """
    try:
        name = archives.safe_name(parsing.field(annotation, "file_name", str), file)
    except (parsing.Broken, archives.DumpRefused) as error:
        raise SourceError(f"{file}: a panoptic annotation cannot be used: {error}") from error
    for place in (file.parent / file.stem, root / file.stem, file.parent, root):
        path = place / name
        if path.is_file() and path.resolve().is_relative_to(root.resolve()):
            return path
    raise SourceError(
        f"{file}: no {name} in {file.parent / file.stem} or {root / file.stem}; unpack the panoptic PNGs there"
    )


def render(path: Path, annotation: Any, numbers: Mapping[str, int], empty: int, max_pixels: int) -> bytes:
    """Panoptic PNG -> PNG of class ids. `numbers` are the class ids of the categories; `empty` stands for segment 0.

    Raises:
        images.Refused: "panoptic-png" where it is not RGB, "label-file" for a segment or category that is not described,
            and the codes of a damaged image.
    """
    kind, image = decode.open_header(path.read_bytes(), max_pixels)
    if kind != "PNG" or image.mode != "RGB":
        raise decode.Refused("panoptic-png", f"{path.name} is {kind} {image.mode}, not an RGB PNG: its colours are ids")
    try:
        pixels_HWC = np.asarray(image, dtype=np.uint32)
    except Exception as error:  # a plugin may raise nearly anything on damaged bytes
        raise decode.Refused("corrupt", f"{path.name} cannot be decoded ({decode.short(error)})") from error
    segment_HW = pixels_HWC[..., 0] + 256 * pixels_HWC[..., 1] + 65536 * pixels_HWC[..., 2]
    try:
        table = {0: empty}
        for segment in parsing.field(annotation, "segments_info", list):
            number = parsing.whole(segment.get("id"), "a segment's id")
            category = parsing.identifier(segment, "category_id")
            if category is None or category not in numbers or number == 0 or number in table:
                raise parsing.Broken(f"segment {number}: no category {category}, or the segment is described twice")
            table[number] = numbers[category]
    except (parsing.Broken, AttributeError) as error:
        raise decode.Refused("label-file", f"{path.name}: {error}") from error
    found, inverse = np.unique(segment_HW, return_inverse=True)
    if alien := [int(number) for number in found if int(number) not in table]:
        raise decode.Refused("label-file", f"{path.name}: segment {alien[0]} is not in segments_info")
    lookup = np.array([table[int(number)] for number in found], np.uint8)
    return label_maps.encode_png(lookup[inverse.reshape(segment_HW.shape)])
