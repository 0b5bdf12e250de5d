"""What a model says of an image: label map, confidence, areas, and the forms in which other programs take them."""

import io
import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import Manifest
from export.runtime import geojson
from pipeline.imaging import label_maps, polygonize
from pipeline.storage import atomic

if TYPE_CHECKING:
    from PIL.Image import Image

_QUALITY = 90  # of a JPEG, as the service answers with


class ImageClass(NamedTuple):
    """A class of the model: its id in masks, its name, its colour (red, green, blue)."""

    id: int
    name: str
    color: tuple[int, int, int]


class Result:
    """The segmentation of one image.

    Attributes:
        mask: uint8 H x W of class ids, of the image's own size.
        classes: all classes of the model, in the order of their ids.
        bundle: id of the bundle that answered.
    """

    def __init__(
        self,
        image_HWC: NDArray[np.uint8],
        mask_HW: NDArray[np.uint8],
        confidence_HW: NDArray[np.uint8],
        manifest: Manifest,
    ) -> None:
        self.mask = mask_HW
        self.classes = tuple(ImageClass(item.id, item.name, item.color) for item in manifest.classes)
        self.bundle = manifest.id
        self._image_HWC = image_HWC
        self._confidence_HW = confidence_HW
        self._manifest = manifest

    @cached_property
    def confidence(self) -> NDArray[np.float32]:
        """float32 H x W in 0..1: the probability that the model gives the class in `mask`."""
        return self._confidence_HW.astype(np.float32) / np.float32(255)

    @cached_property
    def areas(self) -> dict[str, float]:
        """Share of the image of each class that is in it, 0..1, the largest first."""
        counts = np.bincount(self.mask.ravel(), minlength=256)
        shares = {item.name: counts[item.id] / self.mask.size for item in self.classes if counts[item.id]}
        return dict(sorted(shares.items(), key=lambda pair: -pair[1]))

    def overlay(self, alpha: float = 0.5) -> "Image":
        """The classes' colours over the image, as a Pillow image; alpha 0 shows the image alone, 1 the colours alone."""
        from PIL import Image

        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha}: from 0 (the image) to 1 (the colours)")
        return Image.fromarray(label_maps.overlay(self._image_HWC, self.mask, self._manifest.palette, alpha))

    def to_coco(self, image_id: int = 1, file_name: str = "") -> dict[str, Any]:
        """A COCO data set of this image: one annotation with run lengths for each class that is in it.

        Category ids are those of `mask` plus 1, as COCO's begin with 1.
        """
        height, width = self.mask.shape
        annotations = list[dict[str, Any]]()
        for label, rle in sorted(label_maps.class_rles(self.mask).items()):
            if label == self._manifest.ignore:
                continue
            rows, columns = np.nonzero(self.mask == label)
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "segmentation": rle,
                    "area": len(rows),
                    "bbox": box,
                    "iscrowd": 1,  # COCO's own mark of run lengths
                }
            )
        return {
            "images": [{"id": image_id, "file_name": file_name, "width": width, "height": height}],
            "categories": [{"id": item.id + 1, "name": item.name} for item in self.classes],
            "annotations": annotations,
        }

    def to_geojson(self, tolerance: float = 1.0) -> dict[str, Any]:
        """A GeoJSON FeatureCollection in pixels, x to the right and y down: one polygon for each connected piece.

        Args:
            tolerance: pixels by which outlines may be simplified (needs the extra `geo`; without it they keep every
                corner). Neighbours stay without gap or overlap.
        Raises:
            pipeline.imaging.decode.Refused: more corners than are answered.
        """
        height, width = self.mask.shape
        polygons = polygonize.trace(
            self.mask, tolerance=tolerance, confidence_HW=self._confidence_HW, ignore=self._manifest.ignore
        )
        found: dict[str, Any] = json.loads(geojson.encode(polygons, height, width, self._manifest))
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write what the ending says, whole or not at all: .png the mask with the classes' palette, .jpg the overlay,
        .json COCO, .geojson polygons.

        Raises:
            ValueError: another ending.
        """
        target = Path(path)
        ending = target.suffix.lower()
        if ending == ".png":
            atomic.write_bytes(target, label_maps.encode_png(self.mask, self._manifest.palette))
        elif ending in (".jpg", ".jpeg"):
            buffer = io.BytesIO()
            self.overlay().save(buffer, "JPEG", quality=_QUALITY)
            atomic.write_bytes(target, buffer.getvalue())
        elif ending == ".json":
            atomic.write_json(target, self.to_coco(file_name=target.stem))
        elif ending == ".geojson":
            atomic.write_json(target, self.to_geojson())
        else:
            raise ValueError(f"{target}: say by its ending what to write: .png, .jpg, .json (COCO) or .geojson")
        return target

    def __repr__(self) -> str:
        height, width = self.mask.shape
        largest = ", ".join(f"{name} {share:.1%}" for name, share in list(self.areas.items())[:3])
        return f"<marginalia.Result {width} x {height}: {largest}>"
