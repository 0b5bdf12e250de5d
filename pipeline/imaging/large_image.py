"""Images too large to be held: opened, reduced to the model's size, or read band of rows by band of rows.

What needs how much memory, for w x h pixels reduced to a width of s:

- PNG (not interlaced, not 16-bit colour) and TIFF (strips or tiles of their own, one plane): a band of rows, and h x s
  pixels while reducing. Pillow's resize is a pass along the rows and a pass along the columns, rounded to 8 bits between
  them; here the rows come first. Where Pillow begins with the rows too (it chooses by the shape: landscape and moderate
  portrait, in Pillow 13), the result is bit-equal to decoding the whole image and `pipeline.imaging.resize.apply`;
  elsewhere, and for images turned by their orientation, it is within one grey level.
- JPEG of one scan, reduced at least 4 times: libjpeg decodes at 1/2, 1/4 or 1/8 of the size (its DCT scaling, through
  Pillow's `draft`), and the rest is resized. That is another filter than the whole decode's: see `_SPARE`.
- Everything else is decoded whole, at the cost that `pipeline.imaging.decode_cost` counts, and has a limit of its own:
  progressive and multi-scan JPEG (libjpeg holds all coefficients), JPEG at native resolution (Pillow gives no rows before
  the last one), WebP, BMP, interlaced PNG, TIFF in one compressed strip.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.imaging import decode, png_bands, tiff_bands
from pipeline.imaging.decode import Image_HWC, Refused
from pipeline.imaging.headers import jpeg_one_scan

# A JPEG is scaled by its decoder to no less than so many times the wanted size, the larger where that is at most
# _SPARE_PIXELS; the resize does the rest. Against decoding all of it, on 81 photographs in one of 4320 x 3240 reduced to
# 512 (benchmarks/ratios/draft_difference.py): 0.23 grey levels in the mean and at most 7 with 4; 0.69 and 11 with 2; 2.4 and 47
# with 1.
_SPARE, _SPARE_PIXELS = (4, 2), 8_000_000
_COLUMNS = 64


@dataclass(frozen=True)
class LargeImageLimits:
    """Of one image: pixels, pixels and bytes where it must be decoded whole, longer side over shorter."""

    pixels: int
    whole_pixels: int
    whole_bytes: int
    aspect: float | None = None


@dataclass(frozen=True)
class LargeImage:
    """An image whose header was read. `height`, `width` are upright pixels, `orientation` is what stored rows need.

    `bands` reads stored rows from the top, `band_pixels` at a time, None where the kind needs the whole image; `scan` says
    that the decoder of a JPEG can scale.
    """

    kind: str
    height: int
    width: int
    orientation: int
    file: BinaryIO
    limits: LargeImageLimits
    bands: Callable[[], Iterator[Image_HWC]] | None
    band_pixels: int = 0
    scan: bool = False

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def shrunk(self, height: int, width: int) -> Image_HWC:
        """The upright image, antialiased bilinear, at most its own size. Raises Refused."""
        turned = self.orientation >= 5
        stored = (width, height) if turned else (height, width)
        if self.bands is not None:
            source = (self.width, self.height) if turned else (self.height, self.width)
            return decode.orient(_shrink_bands(self.bands(), source, stored), self.orientation)
        spare = self._spare(height, width)
        if spare is not None:
            return decode.orient(_shrink_jpeg(self.file, stored, spare), self.orientation)
        return _resize(self._whole(), height, width)

    def drafted(self, height: int, width: int) -> int | None:
        """Pixels that a JPEG's decoder would make on the way to that size, where it would scale; None elsewhere."""
        spare = self._spare(height, width)
        if spare is None:
            return None
        return self.pixels // _draft_factor(self.height, self.width, spare * height, spare * width) ** 2

    def _spare(self, height: int, width: int) -> int | None:
        return _spare(self.height, self.width, height, width) if self.scan else None

    def rows(self) -> Iterator[Image_HWC]:
        """The upright image in bands of rows from the top, n x width x 3. Raises Refused."""
        if self.bands is not None and self.orientation == 1:
            yield from self.bands()
        else:
            yield self._whole()

    def check_rows(self) -> None:
        """Raises Refused("too-many-pixels" | "body-too-large") when `rows` would need the whole image and may not."""
        if self.bands is None or self.orientation != 1:
            self._check_whole()

    def _check_whole(self) -> None:
        why = f"a {self.kind} of this kind"
        if self.bands is not None:
            why = "an image turned by its EXIF orientation"
        elif self.kind == "JPEG":
            why = "a JPEG, at this resolution or in several scans,"
        way_out = "send it upright as PNG or TIFF (in strips or tiles)"
        if self.pixels > self.limits.whole_pixels:
            raise Refused(
                "too-many-pixels",
                f"{self.width} x {self.height} = {self.pixels} pixels: {why} is decoded as a whole, and the limit for "
                f"that is {self.limits.whole_pixels}; {way_out}, or scale it down",
            )
        size = self.file.seek(0, io.SEEK_END)
        if size > self.limits.whole_bytes:
            raise Refused(
                "body-too-large",
                f"{size} bytes: {why} is read as a whole, and the limit for that is {self.limits.whole_bytes}; {way_out}",
            )

    def _whole(self) -> Image_HWC:
        return decode.decode(self.read(), max_pixels=self.limits.whole_pixels)

    def read(self) -> bytes:
        """The encoded bytes. Raises Refused("too-many-pixels" | "body-too-large") where the image is too large for that."""
        self._check_whole()
        self.file.seek(0)
        return self.file.read()


def size(data: bytes) -> tuple[int, int]:
    """(height, width) as stored by the header alone, unverified and cheap: to choose a path, not to trust.

    Raises Refused, as `decode.probe`.
    """
    if data.startswith(png_bands.SIGNATURE) and len(data) >= 24:
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    _, width, height = decode.probe(data)
    return height, width


def open_picture(file: BinaryIO, limits: LargeImageLimits) -> LargeImage:
    """Read the header of an image on disk or in memory (a seekable binary file); nothing is decoded.

    Raises:
        Refused: the codes of `pipeline.imaging.decode`, by the header.
    """
    file.seek(0)
    kind = decode.sniff(file.read(256))
    orientation, scan, band_pixels = 1, False, 0
    bands: Callable[[], Iterator[Image_HWC]] | None = None
    if kind == "PNG":
        png = png_bands.layout(file)
        height, width, orientation, several = png.height, png.width, png.orientation, png.animated
        if png.by_rows:
            bands = partial(png_bands.bands, file, png)
            band_pixels = max(png_bands.BAND_PIXELS, width)
    elif kind == "TIFF":
        tiff = tiff_bands.layout(file)
        height, width, orientation, several = tiff.height, tiff.width, tiff.orientation, tiff.several
        if tiff.by_rows:
            bands = partial(tiff_bands.bands, file, tiff)
            band_pixels = tiff.piece_height * max(width, tiff.piece_width)
    elif kind == "JPEG":
        scan = jpeg_one_scan(file)
        image, several = _jpeg(file), False
        width, height = image.size
        orientation = decode.orientation_of(image)
    else:
        file.seek(0)
        if file.seek(0, io.SEEK_END) > limits.whole_bytes:
            raise Refused("body-too-large", f"a {kind} may have {limits.whole_bytes} bytes; send it as PNG or TIFF")
        file.seek(0)
        _, width, height = decode.probe(file.read())
        several = False  # probing has refused it
    decode.check_pixels(width, height, limits.pixels)
    decode.check_aspect(width, height, limits.aspect)
    if several:
        raise Refused("animated", "several frames or pages have no single image to segment; send one")
    if orientation >= 5:
        height, width = width, height
    return LargeImage(kind, height, width, orientation, file, limits, bands, band_pixels, scan)


def _resize(image_HWC: Image_HWC, height: int, width: int) -> Image_HWC:
    return np.asarray(Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BILINEAR))


def _shrink_bands(bands: Iterator[Image_HWC], source: tuple[int, int], target: tuple[int, int]) -> Image_HWC:
    """The bands put together and resized: each row to the width as it comes, then slices of columns to the height."""
    middle_HWC, top = np.empty((source[0], target[1], 3), np.uint8), 0
    for band_HWC in bands:
        middle_HWC[top : top + len(band_HWC)] = _resize(band_HWC, len(band_HWC), target[1])
        top += len(band_HWC)
    shrunk_HWC = np.empty((*target, 3), np.uint8)
    for left in range(0, target[1], _COLUMNS):
        columns = np.ascontiguousarray(middle_HWC[:, left : left + _COLUMNS])
        shrunk_HWC[:, left : left + _COLUMNS] = _resize(columns, target[0], columns.shape[1])
    return shrunk_HWC


def _jpeg(file: BinaryIO) -> JpegImageFile:
    file.seek(0)
    try:
        return JpegImageFile(file)
    except Exception as error:  # a plugin may raise nearly anything on damaged bytes
        raise Refused(
            "corrupt", f"the JPEG header cannot be read ({decode.short(error)}); send the original file again"
        ) from error


def _spare(height: int, width: int, to_height: int, to_width: int) -> int | None:
    """By how much a JPEG's decoder should stay above the wanted size; None where it would not scale."""
    for spare in _SPARE:
        factor = _draft_factor(height, width, spare * to_height, spare * to_width)
        if factor > 1 and (spare == _SPARE[-1] or height * width <= _SPARE_PIXELS * factor**2):
            return spare
    return None


def _draft_factor(height: int, width: int, to_height: int, to_width: int) -> int:
    """By how much libjpeg scales both sides down to stay at `to_height` x `to_width` or above."""
    ratio = min(height // to_height, width // to_width)
    return max(factor for factor in (8, 4, 2, 1) if factor <= max(1, ratio))


def _shrink_jpeg(file: BinaryIO, target: tuple[int, int], spare: int) -> Image_HWC:
    """The stored image at `target` (height, width): decoded at a fraction of its size, the rest resized."""
    image = _jpeg(file)
    try:
        drafted = image.draft(image.mode, (spare * target[1], spare * target[0]))
        image.load()
        scaled = image if image.mode == "RGB" else Image.fromarray(decode.to_rgb(image, decode.SampleRange(wide=False)))
    except Refused:
        raise
    except Exception as error:
        code = "truncated" if "truncated" in str(error) else "corrupt"
        raise Refused(
            code, f"the JPEG cannot be decoded ({decode.short(error)}); send the original file again"
        ) from error
    # The box is the image without the part of a pixel by which the scaled one is larger.
    box = drafted[1] if drafted else None
    return np.asarray(scaled.resize((target[1], target[0]), Image.Resampling.BILINEAR, box=box))
