"""What goes out: a segmentation, narrowed to what was asked for, rendered as one of the answers on offer."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel

from export.bundle.bundle import Bundle
from export.bundle.manifest import Manifest
from export.runtime import geojson
from export.runtime.runtime import Segmentation
from pipeline.imaging import label_maps, polygonize, resize
from serving.http.negotiate import Kind
from serving.http.query import Query, lowest_byte, select
from serving.telemetry import metrics

OVERLAY_ALPHA = 0.5
JPEG_QUALITY = 90
MOST_AREAS = 64  # in the X-Class-Areas header: proxies refuse long headers
_CHUNK = 1 << 20

Bytes_HW = NDArray[np.uint8]


class Rle(BaseModel):
    """COCO run lengths: [height, width] and the text form that `pycocotools.mask.decode` takes."""

    size: tuple[int, int]
    counts: str


class ClassAnswer(BaseModel):
    """One class: area in pixels and as a share of the image, mean confidence 0..1 where it occurs, and its mask."""

    id: int
    name: str
    color: tuple[int, int, int]
    pixels: int
    share: float
    confidence: float | None
    rle: Rle


class SegmentAnswer(BaseModel):
    """The JSON answer of POST /v1/segment: all classes in id order, also those that do not occur or were not asked for.

    `confidence` is the mean over the pixels of these classes (0 where there are none), `ignored` counts the other pixels.
    """

    bundle: str
    width: int
    height: int
    confidence: float
    ignored: int
    classes: list[ClassAnswer]


class ErrorDetail(BaseModel):
    code: str
    message: str
    request_id: str


class ErrorAnswer(BaseModel):
    """Every error of this service, whatever its status."""

    error: ErrorDetail


class ImageError(BaseModel):
    """Why one image has no answer: the code and the message of POST /v1/segment."""

    code: str
    message: str


class Line(BaseModel):
    """One image of a call of many, as a line of JSON: either an error, or the answer or the zip's `member` with it.

    `file` is the name as sent, `bundle` the model that answered or, for an error, the current one (null without any).
    `areas` are shares of the image by class name.
    """

    index: int
    file: str
    bundle: str | None
    error: ImageError | None = None
    answer: SegmentAnswer | geojson.FeatureCollection | None = None
    member: str | None = None
    areas: dict[str, float] | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Summary:
    """By class id: share of the image and, where it occurs, mean confidence 0..1; and the mean over all of these pixels
    (0 where there are none)."""

    shares: dict[int, float]
    means: dict[int, float]
    confidence: float


@dataclass(frozen=True)
class Rendered:
    """The body of an answer; what the model found, and what of it was asked for."""

    body: bytes
    observed: Summary
    asked: Summary


@dataclass(frozen=True)
class SegmentResult:
    """A rendered answer: body, bundle id, seconds by phase; shares of the image by class name and mean confidence, of all
    that the model found (for the metrics) and of what was asked for (for the headers)."""

    body: bytes
    bundle: str
    timings: dict[str, float]
    shares: dict[str, float]
    confidence: float
    asked_shares: dict[str, float]
    asked_confidence: float

    @classmethod
    def of(cls, rendered: Rendered, timings: Mapping[str, float], bundle: Bundle) -> Self:
        """By class names."""
        names = {item.id: item.name for item in bundle.manifest.classes}
        return cls(
            body=rendered.body,
            bundle=bundle.manifest.id,
            timings={phase: timings[phase] for phase in metrics.PHASES},
            shares={name: rendered.observed.shares[i] for i, name in names.items()},
            confidence=rendered.observed.confidence,
            asked_shares={name: rendered.asked.shares[i] for i, name in names.items()},
            asked_confidence=rendered.asked.confidence,
        )

    def headers(self) -> dict[str, str]:
        """Of the answer to POST /v1/segment."""
        return {
            "X-Bundle-Id": self.bundle,
            "X-Class-Areas": class_areas(self.asked_shares),
            "X-Confidence": f"{self.asked_confidence:.4f}",
            "Server-Timing": server_timing(self.timings),
            "Vary": "Accept",
        }


def tally(label_hw: Bytes_HW, confidence_hw: Bytes_HW) -> NDArray[np.int64]:
    """256 x 256 counts of pixels by class id and confidence byte: every area and mean, filtered or not, follows."""
    total = np.zeros(1 << 16, np.int64)
    step = max(1, _CHUNK // label_hw.shape[1])  # bincount makes eight bytes of each pixel
    for top in range(0, len(label_hw), step):
        pair = label_hw[top : top + step].astype(np.uint16) << 8 | confidence_hw[top : top + step]
        total += np.bincount(pair.ravel(), minlength=1 << 16)
    return total.reshape(256, 256)


def summarise(count: NDArray[np.int64], manifest: Manifest, ids: frozenset[int] | None, floor: int = 0) -> Summary:
    """The summary of a tally, of the classes `ids` (None: all) from the confidence byte `floor` on."""
    known = [item.id for item in manifest.classes]
    kept = [i for i in known if ids is None or i in ids]
    pixels = count[:, floor:].sum(axis=1)
    sums = count[:, floor:] @ np.arange(floor, 256) / 255
    all_pixels, all_kept = int(count.sum()), int(pixels[kept].sum())
    return Summary(
        {i: float(pixels[i] / all_pixels) if i in kept else 0.0 for i in known},
        {i: float(sums[i] / pixels[i]) for i in kept if pixels[i]},
        float(sums[kept].sum() / all_kept) if all_kept else 0.0,
    )


def _resized(segmentation: Segmentation, query: Query) -> tuple[Bytes_HW, Bytes_HW]:
    """(label, confidence) at the size asked for. Nearest: the one of labels that invents none."""
    if query.size == "model":
        return segmentation.scaled_label_hw, segmentation.scaled_confidence_hw
    if (size := query.pixels()) is None:
        return segmentation.label_HW, segmentation.confidence_HW
    return resize.nearest(segmentation.label_HW, *size), resize.nearest(segmentation.confidence_HW, *size)


def render(
    kind: Kind, image_HWC: NDArray[np.uint8], segmentation: Segmentation, manifest: Manifest, query: Query | None = None
) -> Rendered:
    """The answer `kind` for an image and its segmentation.

    The areas and means of the summaries are those at the model's resolution, which is cheap.

    Raises:
        Problem: 400, `query` names a class that this model lacks.
        pipeline.imaging.decode.Refused: "too-detailed", for more polygon points than can be answered.
    """
    query = query or Query()
    ids, floor = query.class_ids(manifest), lowest_byte(query.min_confidence)
    count = tally(segmentation.scaled_label_hw, segmentation.scaled_confidence_hw)
    asked = summarise(count, manifest, ids, floor)
    label_HW, confidence_HW = _resized(segmentation, query)
    label_HW = select(label_HW, confidence_HW, ids, query.min_confidence, manifest.ignore)
    body = encode(kind, image_HWC, label_HW, confidence_HW, asked, manifest, query.tolerance)
    observed = summarise(count, manifest, None) if ids is not None or floor else asked
    return Rendered(body, observed, asked)


def encode(
    kind: Kind,
    image_HWC: NDArray[np.uint8],
    label_HW: Bytes_HW,
    confidence_HW: Bytes_HW,
    asked: Summary,
    manifest: Manifest,
    tolerance: float,
) -> bytes:
    """The body of the answer `kind`, from maps of its size; only an overlay looks at the image, which may be larger.

    Raises:
        pipeline.imaging.decode.Refused: "too-detailed".
    """
    if kind.view == "json":
        height, width = label_HW.shape
        return encode_runs(label_maps.class_rles(label_HW, compressed=False), height, width, asked, manifest)
    if kind.view == "geojson":
        return _geojson(label_HW, confidence_HW, manifest, tolerance)
    if kind.view == "overlay":
        return _overlay(image_HWC, label_HW, manifest, kind.media_type)
    if kind.view == "confidence":
        return label_maps.encode_png(np.ascontiguousarray(confidence_HW))
    return label_maps.encode_png(label_HW, manifest.palette)


def encode_runs(
    runs: Mapping[int, Mapping[str, Any]], height: int, width: int, asked: Summary, manifest: Manifest
) -> bytes:
    """`SegmentAnswer` as JSON from run lengths (`label_maps.class_rles`, not compressed): exact at the answer's own size."""
    classes = []
    for item in manifest.classes:
        run = runs.get(item.id, {"size": [height, width], "counts": [height * width]})
        pixels = sum(run["counts"][1::2])
        classes.append(
            ClassAnswer(
                id=item.id,
                name=item.name,
                color=item.color,
                pixels=pixels,
                share=pixels / (height * width),
                confidence=asked.means.get(item.id),
                rle=Rle(size=(height, width), counts=label_maps.pack_counts(run["counts"])),
            )
        )
    ignored = height * width - sum(item.pixels for item in classes)
    answer = SegmentAnswer(
        bundle=manifest.id, width=width, height=height, confidence=asked.confidence, ignored=ignored, classes=classes
    )
    return answer.model_dump_json().encode()


def _geojson(label_HW: Bytes_HW, confidence_HW: Bytes_HW, manifest: Manifest, tolerance: float) -> bytes:
    polygons = polygonize.trace(label_HW, tolerance=tolerance, confidence_HW=confidence_HW, ignore=manifest.ignore)
    height, width = label_HW.shape
    return geojson.encode(polygons, height, width, manifest)


def _overlay(image_HWC: NDArray[np.uint8], label_HW: Bytes_HW, manifest: Manifest, media_type: str) -> bytes:
    height, width = label_HW.shape
    if image_HWC.shape[:2] != label_HW.shape:
        resized = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BILINEAR)
        image_HWC = np.asarray(resized)
    blended = Image.fromarray(label_maps.overlay(image_HWC, label_HW, manifest.palette, OVERLAY_ALPHA))
    buffer = io.BytesIO()
    if media_type == "image/jpeg":
        blended.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        blended.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def server_timing(timings: Mapping[str, float]) -> str:
    """Server-Timing header: milliseconds by phase."""
    return ", ".join(f"{name};dur={seconds * 1e3:.2f}" for name, seconds in timings.items())


def class_areas(shares: Mapping[str, float]) -> str:
    """X-Class-Areas header: `name=0.1234, ...`, the largest first, URL-quoted; classes below 0.00005 are left out."""
    largest = sorted(((share, name) for name, share in shares.items() if share >= 0.00005), key=lambda pair: -pair[0])
    return ", ".join(f"{quote(name, safe='')}={share:.4f}" for share, name in largest[:MOST_AREAS])
