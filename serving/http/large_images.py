"""Huge images, and native resolution at any size: read in bands, run, and encoded in bands. One huge image at a time.

What is held, for w x h pixels: the image never, except the kinds that `pipeline.imaging.large_image` has to decode whole; with
`resolution=fit` h x (model's width) pixels while reducing; with `resolution=full` one row of windows. The answer's label map
is made band by band and goes to the encoder at once, so the answer is held as its encoded bytes only.
"""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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

Item = TypeVar("Item")
Labels = NDArray[np.uint8]
Bands = Iterator[tuple[Labels, Labels]]  # (class ids, confidence), n x width each, from the top
_ROWS = ("mask", "confidence")  # views that are made row by row; json by columns, which windows do not give
_BAND_PIXELS = 1 << 20
_OVERLAP = 4  # windows overlap by at least 1 / _OVERLAP of their side
_MOST_RUNS = 4_000_000  # in a JSON answer: some 30 MB of text and 200 MB on the way

_one = threading.Lock()


def takes(pixels: int, query: Query, settings: Settings) -> bool:
    """Whether an image of `pixels` goes this way: it, or the answer, is huge, or its native resolution is asked for."""
    height, width = query.pixels() or (0, 0)
    return max(pixels, height * width) > settings.large_pixels or query.resolution == "full"


def image_limits(settings: Settings) -> large_image.Limits:
    return large_image.Limits(settings.max_pixels, settings.max_whole_pixels, settings.max_body, settings.max_aspect)


def segment(
    file: BinaryIO,
    kind: Kind,
    query: Query,
    bundle: Bundle,
    run: sliding_window.Run,
    settings: Settings,
    check: Callable[[], None] = lambda: None,
) -> tuple[responses.Rendered, dict[str, float]]:
    """One image, on disk or in memory, to its answer and the seconds of its phases.

    `run` takes one image of a size that the model takes. `check` is called between bands and windows, and ends the work by
    raising.

    Raises:
        images.Refused: the bytes are no image that we take.
        Problem: 503 another huge image is being worked on; 422 the answer would be too large for its view.
    """
    picture = large_image.open_picture(file, image_limits(settings))
    huge = picture.height * picture.width > settings.large_pixels
    if huge and not _one.acquire(blocking=False):
        raise Problem(503, "overloaded", "another huge image is being worked on; try again", {"Retry-After": "5"})
    try:
        work = _Work(picture, kind, query, bundle, run, settings, check)
        return work.rendered(), work.timings
    finally:
        if huge:
            _one.release()


class _Work:
    """One image on its way. Seconds are booked by phase as bands are pulled."""

    def __init__(
        self,
        picture: large_image.Picture,
        kind: Kind,
        query: Query,
        bundle: Bundle,
        run: sliding_window.Run,
        settings: Settings,
        check: Callable[[], None],
    ) -> None:
        if bands := picture.bands:
            picture = replace(picture, bands=lambda: self._checked(bands()))
        self.picture, self.kind, self.query, self.manifest = picture, kind, query, bundle.manifest
        self.plan, self.full = bundle.fit(picture.height, picture.width), query.resolution == "full"
        self.timings = {"decode": 0.0, "run": 0.0, "encode": 0.0}
        self._run, self._check, self._most = run, check, settings.large_pixels
        self._ids, self._floor = query.class_ids(bundle.manifest), lowest_byte(query.min_confidence)
        self._count = np.zeros((256, 256), np.int64)
        native = picture.height, picture.width
        model = native if self.full else (self.plan.scaled_height, self.plan.scaled_width)
        self.height, self.width = query.pixels() or (model if query.size == "model" else native)

    def rendered(self) -> responses.Rendered:
        """The answer. Raises as `segment`."""
        begun = time.perf_counter()
        self._check_view()
        body = self._full() if self.full else self._fit()
        self.timings["encode"] = time.perf_counter() - begun - self.timings["decode"] - self.timings["run"]
        return responses.Rendered(body, responses.summarise(self._count, self.manifest, None), self._asked())

    def _check_view(self) -> None:
        if self.full:
            self.picture.check_rows()
        in_bands = _ROWS if self.full else (*_ROWS, "json")
        if self.height * self.width > self._most and self.kind.view not in in_bands:
            raise Problem(
                422,
                "too-large-for-view",
                f"{self.width} x {self.height} pixels are too many for view={self.kind.view}, which goes up to "
                f"{self._most}; ask for a smaller size, or for view={' or '.join(in_bands)}",
            )

    def _asked(self) -> responses.Summary:
        return responses.summarise(self._count, self.manifest, self._ids, self._floor)

    def _select(self, label_HW: Labels, confidence_HW: Labels) -> Labels:
        self._count += responses.tally(label_HW, confidence_HW)
        return select(label_HW, confidence_HW, self._ids, self.query.min_confidence, self.manifest.ignore)

    def _fit(self) -> bytes:
        """As trained: the image at the model's size; its answer restored to the image's size, and from there sampled."""
        plan = self.plan
        with self._booked("decode"):
            shrunk_HWC = self.picture.shrunk(plan.scaled_height, plan.scaled_width)
        label_hw, confidence_hw = self._padded_run(shrunk_HWC)
        label_hw = self._select(label_hw, confidence_hw)
        rows = self._places(plan.scaled_height, plan.height, self.height)
        columns = self._places(plan.scaled_width, plan.width, self.width)
        if self.kind.view == "json":
            return self._json(label_hw, rows, columns)

        def bands() -> Bands:
            step = max(1, _BAND_PIXELS // self.width)
            for top in range(0, self.height, step):
                places = np.ix_(rows[top : top + step], columns)
                yield label_hw[places], confidence_hw[places]

        return self._encode(bands(), highest=int(label_hw.max()))

    def _places(self, scaled: int, native: int, wanted: int) -> NDArray[np.int64]:
        """Where on an axis of the model's size each pixel of the answer looks."""
        if self.query.size == "model":
            return np.arange(scaled)
        return resize.places(scaled, native)[resize.places(native, wanted)]

    def _full(self) -> bytes:
        """Native resolution: windows as large as the model's long side, blended, row of windows by row of windows."""
        policy, picture = self.manifest.input, self.picture
        window = max(policy.stride, policy.long_side // policy.stride * policy.stride)
        overlap = window // _OVERLAP
        plan = sliding_window.grid(picture.height, picture.width, window=window, overlap=overlap)

        def selected() -> Bands:
            pixels = self._timed(picture.rows())
            for label_HW, confidence_HW in sliding_window.blend(pixels, plan, self._padded_run, overlap=overlap):
                yield self._select(label_HW, confidence_HW), confidence_HW

        filtered = self._ids is not None or self._floor > 0
        highest = IGNORE if filtered else self.manifest.classes[-1].id
        return self._encode(_sampled(selected(), picture.height, self.height, self.width), highest=highest)

    def _encode(self, bands: Bands, *, highest: int) -> bytes:
        if self.kind.view == "mask":
            labels = (label_HW for label_HW, _ in bands)
            table = self.manifest.palette
            pieces = encode_bands(labels, self.height, self.width, highest=highest, palette=table)
        elif self.kind.view == "confidence":
            pieces = encode_bands((part for _, part in bands), self.height, self.width, highest=255)
        else:
            label_HW, confidence_HW = (np.concatenate(part) for part in zip(*bands, strict=True))
            image_HWC = self._image() if self.kind.view == "overlay" else np.empty((0, 0, 3), np.uint8)
            tolerance = self.query.tolerance
            return responses.encode(
                self.kind, image_HWC, label_HW, confidence_HW, self._asked(), self.manifest, tolerance
            )
        body = io.BytesIO()
        for piece in self._checked(pieces):
            body.write(piece)
        return body.getvalue()

    def _image(self) -> NDArray[np.uint8]:
        """The image to lay colours over, no larger than the answer."""
        sides = min(self.height, self.picture.height), min(self.width, self.picture.width)
        with self._booked("decode"):
            return self.picture.shrunk(*sides)

    def _json(self, label_hw: Labels, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> bytes:
        """Run lengths go down the columns, so the label map is made in bands of columns."""
        runs = int(((label_hw[1:] != label_hw[:-1]).sum(axis=0) + 1)[columns].sum())
        if runs > _MOST_RUNS:
            raise Problem(
                422,
                "too-large-for-view",
                f"the answer would have {runs} run lengths, more than {_MOST_RUNS}; ask for a smaller size or view=mask",
            )
        step = max(1, _BAND_PIXELS // self.height)
        bands = (label_hw[np.ix_(rows, columns[left : left + step])] for left in range(0, self.width, step))
        lengths = label_maps.column_rles(self._checked(bands), self.height, self.width, compressed=False)
        return responses.encode_runs(lengths, self.height, self.width, self._asked(), self.manifest)

    def _padded_run(self, image_HWC: NDArray[np.uint8]) -> tuple[Labels, Labels]:
        """The model on an image no larger than it takes: padded to the stride by `pipeline.imaging.resize`, cropped again."""
        self._check()
        height, width = image_HWC.shape[:2]
        plan = resize.plan(height, width, long_side=max(height, width), stride=self.manifest.input.stride)
        with self._booked("run"):
            label_HW, confidence_HW = self._run(resize.apply(image_HWC, plan))
        return label_HW[:height, :width], confidence_HW[:height, :width]

    def _checked(self, items: Iterator[Item]) -> Iterator[Item]:
        for item in items:
            self._check()
            yield item

    def _timed(self, bands: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        while True:
            with self._booked("decode"):
                band_HWC = next(bands, None)
            if band_HWC is None:
                return
            yield band_HWC

    @contextmanager
    def _booked(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent inside to a phase."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.timings[phase] += time.perf_counter() - begun


def _sampled(bands: Bands, height: int, to_height: int, to_width: int) -> Bands:
    """Bands of `height` rows together -> the bands of `resize.nearest` to `to_height` x `to_width`."""
    rows, top = resize.places(height, to_height), 0
    for both in bands:
        bottom = top + len(both[0])
        mine = rows[(rows >= top) & (rows < bottom)] - top
        if len(mine):
            label_HW, confidence_HW = (resize.nearest(array, len(array), to_width)[mine] for array in both)
            yield label_HW, confidence_HW
        top = bottom
