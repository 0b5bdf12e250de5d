"""What goes out: which answer an Accept header asks for, and a segmentation rendered as that answer."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel

from export.runtime import Segmentation
from export.schema import Manifest
from pipeline import masks
from serving.limits import Problem

OVERLAY_ALPHA = 0.5
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Kind:
    """One answer on offer: its name in `view`, its media type."""

    view: str
    media_type: str


# In order of preference: what */* gets first.
KINDS = (
    Kind("mask", "image/png"),
    Kind("json", "application/json"),
    Kind("overlay", "image/png"),
    Kind("overlay", "image/jpeg"),
)
VIEWS = ("mask", "json", "overlay")


class Rle(BaseModel):
    """COCO run lengths: [height, width] and the text form that `pycocotools.mask.decode` takes."""

    size: tuple[int, int]
    counts: str


class ClassAnswer(BaseModel):
    """One class: area in pixels and as a share of the image, mean confidence 0..1 where it is seen, and its mask."""

    id: int
    name: str
    color: tuple[int, int, int]
    pixels: int
    share: float
    confidence: float | None
    rle: Rle


class SegmentAnswer(BaseModel):
    """The JSON answer of POST /v1/segment: all classes in id order, also those not seen."""

    bundle: str
    width: int
    height: int
    confidence: float
    classes: list[ClassAnswer]


class ErrorDetail(BaseModel):
    code: str
    message: str
    request_id: str


class ErrorAnswer(BaseModel):
    """Every error of this service, whatever its status."""

    error: ErrorDetail


def _ranges(accept: str) -> list[tuple[str, str, str | None, float]]:
    """(type, subtype, view or None, quality) of each media range; malformed ones are passed over (RFC 9110, 12.5.1)."""
    found = []
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        kind, slash, subkind = media.partition("/")
        if not slash or not kind or not subkind:
            continue
        view, quality = None, 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "view":
                view = value.strip().strip('"')
            elif name.strip() == "q":
                try:
                    quality = min(1.0, max(0.0, float(value)))
                except ValueError:
                    quality = 0.0
        found.append((kind, subkind, view, quality))
    return found


def negotiate(accept: str | None, view: str | None = None) -> Kind:
    """The answer to give: `view` narrows the offers, then the most specific media range sets each offer's quality.

    Raises:
        Problem: 406 when nothing on offer is acceptable.
    """
    if accept is not None and len(accept) > 1000:
        raise Problem(400, "bad-accept", "the Accept header is longer than 1000 characters; name what you want only")
    ranges = _ranges(accept) if accept and accept.strip() else [("*", "*", None, 1.0)]
    best: tuple[float, Kind] | None = None
    for offer in KINDS:
        if view is not None and offer.view != view:
            continue
        kind, subkind = offer.media_type.split("/")
        matches = [
            (wanted_view is not None, wanted_sub != "*", wanted != "*", quality)
            for wanted, wanted_sub, wanted_view, quality in ranges
            if wanted in (kind, "*") and wanted_sub in (subkind, "*") and wanted_view in (offer.view, None)
        ]
        quality = max(matches)[3] if matches else 0.0
        if quality > 0 and (best is None or quality > best[0]):
            best = quality, offer
    if best is None:
        offers = "image/png, application/json, image/png;view=overlay, image/jpeg (an overlay)"
        raise Problem(406, "not-acceptable", f"nothing here fits that Accept header and view; on offer: {offers}")
    return best[1]


def statistics(found: Segmentation, manifest: Manifest) -> tuple[dict[int, float], dict[int, float], float]:
    """(share by class id, mean confidence 0..1 by seen class id, mean confidence), at the model's resolution: cheap."""
    label, confidence = found.scaled_label_hw.ravel(), found.scaled_confidence_hw.ravel()
    pixels = np.bincount(label, minlength=256)
    sums = np.bincount(label, weights=confidence, minlength=256)
    ids = [item.id for item in manifest.classes]
    shares = {i: float(pixels[i] / label.size) for i in ids}
    means = {i: float(sums[i] / pixels[i] / 255) for i in ids if pixels[i]}
    return shares, means, float(sums.sum() / label.size / 255)


def to_json(found: Segmentation, manifest: Manifest) -> bytes:
    """`SegmentAnswer` as JSON; areas and run lengths are exact at the image's own size."""
    height, width = found.label_HW.shape
    runs = masks.class_rles(found.label_HW, compressed=False)
    _, means, confidence = statistics(found, manifest)
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
                confidence=means.get(item.id),
                rle=Rle(size=(height, width), counts=masks.pack_counts(run["counts"])),
            )
        )
    answer = SegmentAnswer(bundle=manifest.id, width=width, height=height, confidence=confidence, classes=classes)
    return answer.model_dump_json().encode()


def _to_overlay(image_HWC: NDArray[np.uint8], found: Segmentation, manifest: Manifest, media_type: str) -> bytes:
    blended = Image.fromarray(masks.overlay(image_HWC, found.label_HW, manifest.palette, OVERLAY_ALPHA))
    buffer = io.BytesIO()
    if media_type == "image/jpeg":
        blended.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        blended.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def render(kind: Kind, image_HWC: NDArray[np.uint8], found: Segmentation, manifest: Manifest) -> bytes:
    """The body of the answer `kind` for an image and what was found in it."""
    if kind.view == "json":
        return to_json(found, manifest)
    if kind.view == "overlay":
        return _to_overlay(image_HWC, found, manifest, kind.media_type)
    return masks.encode_png(found.label_HW, manifest.palette)


def server_timing(timings: Mapping[str, float]) -> str:
    """Server-Timing header: milliseconds by phase."""
    return ", ".join(f"{name};dur={seconds * 1e3:.2f}" for name, seconds in timings.items())
