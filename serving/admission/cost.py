"""What one image costs while it is worked on: the one function by which single requests, calls of many and archives are
counted, from the header alone.

Beside the decoder (`pipeline.imaging.decode_cost`) there are, for each pixel, the image itself, its copy that is scaled
down to the model's size, and the answer's maps on their way to the body. A test compares with what a process takes.
"""

import math
from typing import BinaryIO, NamedTuple

from export.bundle.bundle import Bundle
from pipeline.imaging import decode_cost, large_image
from serving.http import large_images
from serving.http.negotiate import Kind
from serving.http.query import Query
from serving.settings import Settings

_IMAGE = 3  # bytes of a pixel as it is worked on
_PILLOW = 4  # and as Pillow holds it
_MAPS = 2  # class id and confidence
# Beside these, of a pixel of the answer, by view: what is selected, drawn and encoded.
_ANSWER = {"mask": 3, "confidence": 3, "overlay": 20, "json": 8, "geojson": 16}
_RUN = 64  # of a run length in an answer as JSON: a number in Python's list, in an array and as text
_CELL = 900  # of a pixel of the model's answer that is a polygon of its own, and so are those around it
_MOST_CELLS = 1 << 18  # more of them have more points than `pipeline.imaging.polygonize.MAX_POINTS`
_ROWS = ("mask", "confidence")  # of huge images, encoded row by row: all that is held is the body


class Cost(NamedTuple):
    """Bytes at the peak, and whether the image goes the way of `serving.http.large_images`."""

    size: int
    is_large: bool


def of(data: bytes | BinaryIO, kind: Kind, query: Query, bundle: Bundle, settings: Settings) -> Cost:
    """Of working on an encoded image, in memory (held and counted by the caller) or on disk.

    Raises:
        pipeline.imaging.decode.Refused: the bytes are no image that we take, by the header.
    """
    if isinstance(data, bytes):
        height, width, decoding = decode_cost.decode_bytes(data, settings.max_pixels)
        if not large_images.is_large(height * width, query, settings):
            return Cost(_at_once(height, width, decoding, kind, query, bundle), is_large=False)
    picture = large_image.open_picture(large_images.opened(data), large_images.image_limits(settings))
    if large_images.is_large(picture.pixels, query, settings):
        return Cost(_in_bands(picture, kind, query, bundle, settings.large_pixels), is_large=True)
    read = picture.read()
    height, width, decoding = decode_cost.decode_bytes(read, settings.max_pixels)
    return Cost(_at_once(height, width, decoding, kind, query, bundle) + len(read), is_large=False)


def _at_once(height: int, width: int, decoding: int, kind: Kind, query: Query, bundle: Bundle) -> int:
    pixels = height * width
    fit = bundle.fit(height, width)
    scaling = (_IMAGE + _PILLOW) * pixels + _PILLOW * height * fit.scaled_width
    asked = math.prod(query.pixels() or (0,))
    answer = asked or (fit.scaled_height * fit.scaled_width if query.size == "model" else pixels)
    answering = (
        (_IMAGE + _MAPS) * pixels + _MAPS * asked + _answer(kind, answer, height, fit.scaled_height, fit.scaled_width)
    )
    return max(decoding, scaling + decode_cost.OVERHEAD, answering + decode_cost.OVERHEAD)


def _answer(kind: Kind, pixels: int, height: int, model_height: int, model_width: int) -> int:
    """Of drawing and encoding what a model of that size says of an image `height` pixels high, at its most detailed.

    Run lengths go down the columns, at most as many in each as the model has rows.
    """
    size = _ANSWER[kind.view] * pixels
    if kind.view == "json":
        size += _RUN * min(pixels, max(1, pixels // height) * model_height)
    if kind.view == "geojson":
        size += _CELL * min(model_height * model_width, _MOST_CELLS)
    return size


def _in_bands(picture: large_image.LargeImage, kind: Kind, query: Query, bundle: Bundle, most_drawn: int) -> int:
    """An answer of more than `most_drawn` pixels is refused in the views that are drawn, before anything is."""
    fit = bundle.fit(picture.height, picture.width)
    native = picture.pixels
    is_full = query.resolution == "full"
    at_model = native if is_full else fit.scaled_height * fit.scaled_width
    answer = math.prod(query.pixels() or (at_model if query.size == "model" else native,))
    if is_full:
        window = min(picture.height, bundle.manifest.input.long_side)
        # A row of windows: the image, float votes, maps and the copies of them that go on.
        reading = decode_cost.rows_bytes(picture) + (2 * _IMAGE + _PILLOW + 5 * _MAPS) * window * picture.width
    else:
        reading = decode_cost.shrink_bytes(picture, fit.scaled_height, fit.scaled_width)
    if kind.view in _ROWS:
        return reading + (3 * answer if is_full else answer // 8)  # noise, as it grows; enlarged maps repeat their rows
    if kind.view == "json" and not is_full:
        columns = (query.pixels() or (picture.height, picture.width))[1]
        return reading + _RUN * min(large_images.MOST_RUNS, columns * fit.scaled_height)
    answer = min(answer, most_drawn)
    model = (picture.height, picture.width) if is_full else (fit.scaled_height, fit.scaled_width)
    drawing = (_IMAGE + _MAPS + _MAPS) * answer + _answer(kind, answer, picture.height, *model)
    if kind.view == "overlay":
        scale = math.sqrt(min(1.0, answer / native))
        height, width = max(1, int(picture.height * scale)), max(1, int(picture.width * scale))
        drawing += decode_cost.shrink_bytes(picture, height, width)
    return max(reading + 2 * _MAPS * answer, drawing)
