"""Huge images, and native resolution at any size: read in bands, run, and encoded in bands.

What is held, for w x h pixels: the image never, except the kinds that `pipeline.imaging.large_image` has to decode whole; with
`resolution=fit` h x (model's width) pixels while reducing; with `resolution=full` one row of windows. The answer's label map
is made band by band and goes to the encoder at once, so the answer is held as its encoded bytes only.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle
from pipeline.imaging import label_maps, large_image, resize, sliding_window
from pipeline.imaging.mask_png import IGNORE, encode_bands
from serving.http import responses
from serving.http.negotiate import Kind
from serving.http.query import Query, lowest_byte, select
from serving.http.requests import Problem
from serving.settings import Settings
from serving.telemetry.phase_timer import PhaseTimer

Item = TypeVar("Item")
Labels = NDArray[np.uint8]
Places = NDArray[np.int64]
Bands = Iterator[tuple[Labels, Labels]]  # (class ids, confidence), n x width each, from the top
_ROWS = ("mask", "confidence")  # views that are made row by row; json by columns, which windows do not give
_BAND_PIXELS = 1 << 20
_OVERLAP = 4  # windows overlap by at least 1 / _OVERLAP of their side
MOST_RUNS = 4_000_000  # in a JSON answer: some 30 MB of text and 200 MB on the way


@dataclass(frozen=True)
class WindowModel:
    """A model that takes one image of a size that it was made for.

    `check` is called between bands and windows, and ends the work by raising.
    """

    bundle: Bundle
    run: sliding_window.Run
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class _LargeImage:
    """One image and what is asked of it: the answer has `height` x `width` pixels. `count` is filled as bands are made."""

    picture: large_image.LargeImage
    kind: Kind
    query: Query
    model: WindowModel
    height: int
    width: int
    ids: frozenset[int] | None
    floor: int
    timer: PhaseTimer
    count: NDArray[np.int64] = field(default_factory=lambda: np.zeros((256, 256), np.int64))


def is_large(pixels: int, query: Query, settings: Settings) -> bool:
    """Whether an image of `pixels` goes this way: it, or the answer, is huge, or its native resolution is asked for."""
    height, width = query.pixels() or (0, 0)
    return max(pixels, height * width) > settings.large_pixels or query.resolution == "full"


def image_limits(settings: Settings) -> large_image.LargeImageLimits:
    """Of an image that is read in bands."""
    return large_image.LargeImageLimits(
        settings.max_pixels, settings.max_whole_pixels, settings.max_body, settings.max_aspect
    )


def opened(data: bytes | BinaryIO) -> BinaryIO:
    """An image in memory or on disk as a file."""
    return io.BytesIO(data) if isinstance(data, bytes) else data


def segment(
    file: BinaryIO, kind: Kind, query: Query, model: WindowModel, settings: Settings
) -> tuple[responses.Rendered, dict[str, float]]:
    """One image, on disk or in memory, to its answer and the seconds of its phases.

    Raises:
        decode.Refused: the bytes are no image that we take.
        Problem: 422 the answer would be too large for its view.
    """
    picture = large_image.open_picture(file, image_limits(settings))
    image = _large_image(picture, kind, query, model)
    _check_view(image, settings.large_pixels)

    body = _from_windows(image) if query.resolution == "full" else _from_model_size(image)

    observed = responses.summarise(image.count, model.bundle.manifest, None)
    return responses.Rendered(body, observed, _asked(image)), image.timer.timings()


def _large_image(picture: large_image.LargeImage, kind: Kind, query: Query, model: WindowModel) -> _LargeImage:
    native = picture.height, picture.width
    fit = model.bundle.fit(*native)
    at_model = native if query.resolution == "full" else (fit.scaled_height, fit.scaled_width)
    height, width = query.pixels() or (at_model if query.size == "model" else native)

    if bands := picture.bands:
        picture = replace(picture, bands=lambda: _checked(bands(), model))
    ids, floor = query.class_ids(model.bundle.manifest), lowest_byte(query.min_confidence)
    return _LargeImage(picture, kind, query, model, height, width, ids, floor, PhaseTimer())


def _check_view(image: _LargeImage, most_pixels: int) -> None:
    """Raises Problem(422), or decode.Refused where native resolution needs the whole image."""
    if image.query.resolution == "full":
        image.picture.check_rows()
    in_bands = _ROWS if image.query.resolution == "full" else (*_ROWS, "json")
    if image.height * image.width > most_pixels and image.kind.view not in in_bands:
        raise Problem(
            422,
            "too-large-for-view",
            f"{image.width} x {image.height} pixels are too many for view={image.kind.view}, which goes up to "
            f"{most_pixels}; ask for a smaller size, or for view={' or '.join(in_bands)}",
        )


def _from_model_size(image: _LargeImage) -> bytes:
    """As trained: the image at the model's size; its answer restored to the image's size, and from there sampled."""
    fit = image.model.bundle.fit(image.picture.height, image.picture.width)
    with image.timer.phase("decode"):
        shrunk_HWC = image.picture.shrunk(fit.scaled_height, fit.scaled_width)
    label_hw, confidence_hw = _run_padded(image, shrunk_HWC)
    label_hw = _selected(image, label_hw, confidence_hw)

    rows = _places(image, fit.scaled_height, fit.height, image.height)
    columns = _places(image, fit.scaled_width, fit.width, image.width)
    if image.kind.view == "json":
        return _encode_json(image, label_hw, rows, columns)
    return _encode(image, _enlarged(label_hw, confidence_hw, rows, columns), highest=int(label_hw.max()))


def _from_windows(image: _LargeImage) -> bytes:
    """Native resolution: windows as large as the model's long side, blended, row of windows by row of windows."""
    picture, manifest = image.picture, image.model.bundle.manifest
    policy = manifest.input
    window = max(policy.stride, policy.long_side // policy.stride * policy.stride)
    overlap = window // _OVERLAP
    grid = sliding_window.grid(picture.height, picture.width, window=window, overlap=overlap)

    pixels = image.timer.pulled("decode", picture.rows())
    bands = sliding_window.blend(pixels, grid, lambda image_HWC: _run_padded(image, image_HWC), overlap=overlap)
    selected = ((_selected(image, label_HW, confidence_HW), confidence_HW) for label_HW, confidence_HW in bands)
    sampled = _sampled(selected, picture.height, image.height, image.width)

    filtered = image.ids is not None or image.floor > 0
    return _encode(image, sampled, highest=IGNORE if filtered else manifest.classes[-1].id)


def _run_padded(image: _LargeImage, image_HWC: NDArray[np.uint8]) -> tuple[Labels, Labels]:
    """The model on an image no larger than it takes: padded to the stride by `pipeline.imaging.resize`, cropped again."""
    image.model.check()
    height, width = image_HWC.shape[:2]
    stride = image.model.bundle.manifest.input.stride
    plan = resize.plan(height, width, long_side=max(height, width), stride=stride)
    with image.timer.phase("run"):
        label_HW, confidence_HW = image.model.run(resize.apply(image_HWC, plan))
    return label_HW[:height, :width], confidence_HW[:height, :width]


def _selected(image: _LargeImage, label_HW: Labels, confidence_HW: Labels) -> Labels:
    """What is asked for of a part of the label map, after counting all of it."""
    image.count[...] += responses.tally(label_HW, confidence_HW)
    ignore = image.model.bundle.manifest.ignore
    return select(label_HW, confidence_HW, image.ids, image.query.min_confidence, ignore)


def _asked(image: _LargeImage) -> responses.Summary:
    return responses.summarise(image.count, image.model.bundle.manifest, image.ids, image.floor)


def _places(image: _LargeImage, scaled: int, native: int, wanted: int) -> Places:
    """Where on an axis of the model's size each pixel of the answer looks."""
    if image.query.size == "model":
        return np.arange(scaled)
    return resize.places(scaled, native)[resize.places(native, wanted)]


def _enlarged(label_hw: Labels, confidence_hw: Labels, rows: Places, columns: Places) -> Bands:
    """Bands of the answer from maps of the model's size."""
    step = max(1, _BAND_PIXELS // len(columns))
    for top in range(0, len(rows), step):
        places = np.ix_(rows[top : top + step], columns)
        yield label_hw[places], confidence_hw[places]


def _sampled(bands: Bands, height: int, to_height: int, to_width: int) -> Bands:
    """Bands of `height` rows together -> the bands of `resize.nearest` to `to_height` x `to_width`."""
    rows = resize.places(height, to_height)
    top = 0
    for both in bands:
        bottom = top + len(both[0])
        mine = rows[(rows >= top) & (rows < bottom)] - top
        if len(mine):
            label_HW, confidence_HW = (resize.nearest(array, len(array), to_width)[mine] for array in both)
            yield label_HW, confidence_HW
        top = bottom


def _encode(image: _LargeImage, bands: Bands, *, highest: int) -> bytes:
    """The answer in its view, from the bands of its maps; `highest` is the largest class id that they may have."""
    manifest = image.model.bundle.manifest
    if image.kind.view == "mask":
        labels = (label_HW for label_HW, _ in bands)
        pieces = encode_bands(labels, image.height, image.width, highest=highest, palette=manifest.palette)
        return _written(pieces, image.model)
    if image.kind.view == "confidence":
        confidences = (confidence_HW for _, confidence_HW in bands)
        pieces = encode_bands(confidences, image.height, image.width, highest=255)
        return _written(pieces, image.model)

    label_HW, confidence_HW = (np.concatenate(part) for part in zip(*bands, strict=True))
    image_HWC = _image_below(image) if image.kind.view == "overlay" else np.empty((0, 0, 3), np.uint8)
    return responses.encode(
        image.kind, image_HWC, label_HW, confidence_HW, _asked(image), manifest, image.query.tolerance
    )


def _written(pieces: Iterator[bytes], model: WindowModel) -> bytes:
    body = io.BytesIO()
    for piece in _checked(pieces, model):
        body.write(piece)
    return body.getvalue()


def _image_below(image: _LargeImage) -> NDArray[np.uint8]:
    """The image to lay colours over, no larger than the answer."""
    height, width = min(image.height, image.picture.height), min(image.width, image.picture.width)
    with image.timer.phase("decode"):
        return image.picture.shrunk(height, width)


def _encode_json(image: _LargeImage, label_hw: Labels, rows: Places, columns: Places) -> bytes:
    """Run lengths go down the columns, so the label map is made in bands of columns. Raises Problem(422)."""
    runs = int(((label_hw[1:] != label_hw[:-1]).sum(axis=0) + 1)[columns].sum())
    if runs > MOST_RUNS:
        raise Problem(
            422,
            "too-large-for-view",
            f"the answer would have {runs} run lengths, more than {MOST_RUNS}; ask for a smaller size or view=mask",
        )

    step = max(1, _BAND_PIXELS // image.height)
    bands = (label_hw[np.ix_(rows, columns[left : left + step])] for left in range(0, image.width, step))
    checked = _checked(bands, image.model)
    lengths = label_maps.column_rles(checked, image.height, image.width, compressed=False)
    return responses.encode_runs(lengths, image.height, image.width, _asked(image), image.model.bundle.manifest)


def _checked(items: Iterator[Item], model: WindowModel) -> Iterator[Item]:
    """The items, with a check before each goes on."""
    for item in items:
        model.check()
        yield item
