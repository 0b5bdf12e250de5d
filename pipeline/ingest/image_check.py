"""One image of an archive and its mask: decoded, hashed and judged by a worker. Bad content is an answer, not an error.

A mask of a photo that EXIF turns by 90 degrees (5 to 8) may have been drawn on the stored picture: where its sides are
those of the stored picture and not of the upright one, it is turned with it. Where both have the same sides (a square
photo, a half turn, a mirror) they cannot be told apart, and the mask is taken as upright, because that is how browsers and
label tools show a photo. Both are counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging import decode, label_maps, perceptual_hash
from pipeline.storage import manifest, shards

TURNED, UPRIGHT = "masks turned with their photo", "masks taken as upright, their photo is turned"


@dataclass(frozen=True, slots=True)
class CheckRules:
    """What holds for every image of an archive."""

    archive: Path
    palette: tuple[tuple[int, int, int], ...]  # one colour a class
    max_pixels: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class CheckTask:
    """One image of the archive, its mask if it has one, and the rules for both."""

    rules: CheckRules
    name: str
    image: shards.Member
    mask: shards.Member | None
    needs_mask: bool
    mask_refusal: tuple[str, str] | None = None  # why the source could not make its mask: code, reason


class CheckedImage(NamedTuple):
    id: str
    kind: str  # file format, in lower case
    height: int
    width: int
    phash: str


class CheckedMask(NamedTuple):
    """A mask as it is stored. `turned`: what was decided about it, where EXIF turns its photo."""

    png: bytes
    digest: str
    turned: str | None


class Checked(NamedTuple):
    """What a worker found out. `image` is None when the image is refused."""

    image: CheckedImage | None
    mask: CheckedMask | None
    refusal: tuple[str, str] | None  # code, reason


def check_mask(
    data: bytes, shape: tuple[int, int], classes: int, max_pixels: int, orientation: int = 1
) -> tuple[NDArray[np.uint8], str | None]:
    """Mask bytes -> (class ids, H x W uint8, 255 = ignore; what was decided about its turn, if anything).

    `orientation` is that of the image, whose upright size is `shape`.

    Raises:
        decode.Refused: as `label_maps.decode_mask`; "mask-size", "mask-class-id" or "mask-all-ignore".
    """
    ids_HW = label_maps.decode_mask(data, max_pixels=max_pixels)
    stored = orientation >= 5 and ids_HW.shape != shape and ids_HW.shape == shape[::-1]
    if ids_HW.shape != shape and not stored:
        raise decode.Refused(
            "mask-size",
            f"the mask is {ids_HW.shape[1]} x {ids_HW.shape[0]}, the image {shape[1]} x {shape[0]}; export it again",
        )
    pixels_K = np.bincount(ids_HW.ravel())
    found = [int(k) for k in np.flatnonzero(pixels_K) if k not in (255, 65535)]
    if alien := [k for k in found if k >= classes]:
        listed = ", ".join(f"{k} ({pixels_K[k]} px)" for k in alien[:5])
        reason = f"ids outside 0..{classes - 1}: {listed}; map them to a class or to 255 (ignore)"
        raise decode.Refused("mask-class-id", reason)
    if not found:
        raise decode.Refused(
            "mask-all-ignore", "every pixel is ignored (255 or 65535): nothing to learn; drop the mask"
        )
    label_HW = ids_HW.astype(np.uint8)  # 65535 becomes 255
    if stored:
        return decode.orient(label_HW, orientation), TURNED
    unclear = orientation > 1 and (orientation < 5 or shape[0] == shape[1])
    return label_HW, UPRIGHT if unclear else None


def check_image(task: CheckTask) -> Checked:
    """Decode, hash and judge one image and its mask; never raises for bad content."""
    try:
        image, orientation = _check_pixels(task)
    except decode.Refused as error:
        return Checked(None, None, (error.code, str(error)))
    try:
        return Checked(image, _check_own_mask(task, image, orientation), None)
    except decode.Refused as error:
        return Checked(None if task.needs_mask else image, None, (error.code, str(error)))


def _check_pixels(task: CheckTask) -> tuple[CheckedImage, int]:
    """The image and its EXIF orientation. Raises Refused."""
    rules = task.rules
    if task.image.length > rules.max_bytes:
        raise decode.Refused(
            "too-many-bytes", f"{task.image.length} bytes; the limit is {rules.max_bytes} (ingest.max_file_mb)"
        )
    data = shards.read(rules.archive, task.image.offset, task.image.length)
    kind = decode.sniff(data)
    image_HWC, orientation = decode.decode_turned(data, max_pixels=rules.max_pixels)
    height, width = image_HWC.shape[:2]
    hashed = perceptual_hash.dhash(image_HWC)
    phash = "" if hashed is None else f"{hashed:016x}"
    return CheckedImage(manifest.image_id(image_HWC), kind.lower(), height, width, phash), orientation


def _check_own_mask(task: CheckTask, image: CheckedImage, orientation: int) -> CheckedMask | None:
    """None where the image has no mask and needs none. Raises Refused."""
    if task.mask_refusal:
        raise decode.Refused(*task.mask_refusal)
    if task.mask is None:
        if task.needs_mask:
            raise decode.Refused("mask-missing", "listed as labelled, val or test, but no file under masks/")
        return None
    rules = task.rules
    data = shards.read(rules.archive, task.mask.offset, task.mask.length)
    shape = (image.height, image.width)
    mask_HW, turned = check_mask(data, shape, len(rules.palette), rules.max_pixels, orientation)
    return CheckedMask(label_maps.encode_png(mask_HW, list(rules.palette)), manifest.mask_digest(mask_HW), turned)
