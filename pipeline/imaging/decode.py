"""Untrusted image bytes -> uint8 RGB, by stated rules; anything else is refused with a code and a way out.

The rules (each has a golden test):

- Only the decoders in `FORMATS` exist for us; the format is told by the content, never by a name or a content type.
- Size comes from the header and is checked against the pixel budget before a pixel is decoded.
- EXIF orientation is applied, also where a PNG's eXIf chunk stands after the pixel data. ICC profiles are ignored.
- 16-bit samples become their high byte (v >> 8), for grey and colour alike; float and 32-bit images are refused. So are
  16-bit pictures whose brightest sample is below 8192, as of 12-bit cameras: fewer than 32 grey levels would be left. The
  brightest is that of the whole picture over all its colours, alpha apart, be it decoded whole or in bands of rows.
- Grey and palette become RGB; alpha is composited on black, (c * a + 127) // 255; CMYK goes by Pillow's plain formula.
- More than one frame or page (APNG, animated WebP, multi-page TIFF) is refused: one image in, one mask out. A TIFF's
  reduced-resolution copies and transparency masks (NewSubfileType, TIFF 6.0 section 8) are no pages.
  The extra pictures of a multi-picture JPEG (gain map, stereo twin) are not frames: the main one is taken.
- PNG checksums are verified for every chunk, because the decoder itself skips those of the pixel data.

The plugin classes are called directly instead of through `Image.open`: that keeps every other decoder out of reach and
needs none of Pillow's process-wide settings (`MAX_IMAGE_PIXELS`, the plugin registry), so many threads may decode.
"""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from pipeline.imaging.headers import BITS_PER_SAMPLE, check_tiff, exif_orientation, tiff_samples, webp_size
from pipeline.imaging.headers import Refused as Refused
from pipeline.imaging.headers import check_pixels as check_pixels
from pipeline.imaging.headers import png_chunks as png_chunks
from pipeline.imaging.headers import short as short

Image_HWC = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
PLUGINS: dict[str, type[ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
# Recognised only to give a better answer than "not an image".
_FOREIGN = (
    (b"GIF8", "GIF"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"8BPS", "Photoshop"),
    (b"<svg", "SVG"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"SIMPLE  =", "FITS"),
)
DARK = 8192  # of 65,536
STRIP_PIXELS = 1 << 18  # that are converted at a time
_HEADER_PIXELS = 1 << 62

# A damaged EXIF block makes the plugins warn; a damaged picture is an answer to the caller here, not a line on stderr.
# Set once at import: `catch_warnings` around a decode would not be safe with threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def sniff(data: bytes) -> str:
    """Format name from the first bytes. Raises Refused("empty" | "unsupported-format" | "not-an-image")."""
    if not data:
        raise Refused("empty", "the file has no bytes; send the image itself")
    head = bytes(data[:256])
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and len(data) >= 26:
        return "BMP"
    if head[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        return "TIFF"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, name in _FOREIGN:
        if head.startswith(magic) or text.startswith(magic) or (name == "SVG" and b"<svg" in head):
            raise Refused("unsupported-format", f"{name} is not read here; convert it to one of {', '.join(FORMATS)}")
    if head[4:8] == b"ftyp":
        raise Refused("unsupported-format", f"HEIF/AVIF is not read here; convert it to one of {', '.join(FORMATS)}")
    raise Refused("not-an-image", f"these bytes are no image; send one of {', '.join(FORMATS)}")


def orientation_of(image: ImageFile) -> int:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # this plugin reports the upright size and turns the pixels itself
    exif = image.info.get("exif", b"")
    return exif_orientation(exif) if isinstance(exif, bytes) else 1


def open_header(data: bytes, max_pixels: int) -> tuple[str, ImageFile]:
    """Header only. Raises Refused; anything a decoder throws at hostile bytes becomes Refused("corrupt")."""
    kind = sniff(data)
    animated, chunks = False, dict[bytes, bytes]()
    if kind == "PNG":
        chunks = png_chunks(data)
        animated = b"acTL" in chunks
    elif kind == "WEBP":
        width, height, animated = webp_size(data)
        check_pixels(width, height, max_pixels)
    if animated:
        raise Refused("animated", "an animation has no single frame to segment; send one still picture")
    try:
        image = PLUGINS[kind](io.BytesIO(data))
    except Exception as error:  # a plugin may raise nearly anything on damaged bytes
        if kind == "TIFF" and (samples := tiff_samples(data)):
            raise Refused(
                "unsupported-depth",
                f"a TIFF of {samples}; send three bands of 8 bits, or one of 8 or 16 (a project of GeoTIFFs takes such "
                "files: data.source: geotiff)",
            ) from error
        raise Refused(
            "corrupt", f"the {kind} header cannot be read ({short(error)}); send the original file again"
        ) from error
    check_pixels(*image.size, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        check_tiff(image, max_pixels)
    if b"eXIf" in chunks:
        image.info.setdefault("exif", chunks[b"eXIf"])  # the plugin sees one after the pixels too late for the header
    return kind, image


def check_aspect(width: int, height: int, max_aspect: float | None) -> None:
    if max_aspect is not None and max(width, height) > max_aspect * min(width, height):
        raise Refused(
            "bad-aspect",
            f"{width} x {height} is longer than {max_aspect:g} times its width; cut it into pieces",
        )


class SampleRange:
    """The brightest 16-bit sample of one image, whose rows may come in several bands.

    Grey is seen in 16 bits. Of colours the decoder gives the high bytes alone, so `brightest` is a little more than the truth.
    """

    def __init__(self, wide: bool) -> None:
        """`wide`: whether samples are stored in 16 bits; of others nothing is asked."""
        self.wide = wide
        self.brightest = 0

    def see_grey(self, wide_HW: NDArray[np.uint16]) -> None:
        self.brightest = max(self.brightest, int(wide_HW.max(initial=0)))

    def see_colours(self, high_HWC: NDArray[np.uint8]) -> None:
        if self.wide:
            self.brightest = max(self.brightest, int(high_HWC.max(initial=0)) << 8 | 255)

    def check(self) -> None:
        """Raises Refused as `check_range`."""
        check_range(self.brightest)


def is_wide(image: ImageFile) -> bool:
    """Whether an image that was opened and not loaded has samples of 16 bits."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return bool(max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8)
    return isinstance(image, PngImagePlugin.PngImageFile) and any(";16" in str(tile.args) for tile in image.tile)


def to_rgb(image: Image.Image, samples: SampleRange) -> Image_HWC:
    """Decoded Pillow image -> H x W x 3 by the rules in the module's docstring; `samples` sees it, and is for the caller to
    check once the whole image was there.

    Strip by strip, so that what a kind needs on the way (16 bits a sample, alpha) is never there for the whole image.
    """
    mode = image.mode
    if mode in ("F", "I", "LAB") or (mode.startswith(("I;", "F;")) and not mode.startswith("I;16")):
        raise Refused(
            "unsupported-depth",
            f"pixels of kind {mode} have no stated range; convert the image to 8 or 16 bits per channel",
        )
    rgb_HWC = np.empty((image.height, image.width, 3), np.uint8)
    step = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, step):
        strip = image.crop((0, top, image.width, min(top + step, image.height)))
        rows = rgb_HWC[top : top + step]
        if mode.startswith("I;16"):
            wide_HW = np.asarray(strip).astype(np.uint16)
            samples.see_grey(wide_HW)
            rows[:] = (wide_HW >> 8)[:, :, None]
        elif "transparency" in image.info or "A" in mode or "a" in mode:
            rgba_HWC = np.asarray(strip.convert("RGBA"))
            samples.see_colours(rgba_HWC[:, :, :3])
            rows[:] = _on_black(rgba_HWC)
        else:
            rows[:] = np.asarray(strip if mode == "RGB" else strip.convert("RGB"))
            samples.see_colours(rows)
    return rgb_HWC


def _on_black(rgba_HWC: NDArray[np.uint8]) -> NDArray[np.uint16]:
    colour_HWC = rgba_HWC[:, :, :3].astype(np.uint16)
    colour_HWC *= rgba_HWC[:, :, 3:]
    colour_HWC += np.uint16(127)
    colour_HWC //= np.uint16(255)
    return colour_HWC


def check_range(brightest: int) -> None:
    """Raises Refused("dark-16-bit") where 16-bit samples fill so little of their range that their high bytes say nothing.

    A picture that is black throughout passes: nothing is lost of it.
    """
    if 0 < brightest < DARK:
        raise Refused(
            "dark-16-bit",
            f"16-bit samples up to {brightest} of 65535: only {(brightest >> 8) + 1} of 256 levels would be left; "
            "scale them to 8 bits or to the whole of 16, all images by the same factor",
        )


def orient(image_HWC: Image_HWC, orientation: int) -> Image_HWC:
    """Turn stored rows and columns into the upright picture; `orientation` 1..8 as EXIF 2.32, tag 0x0112."""
    turned = image_HWC
    if orientation >= 5:
        turned = turned.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


def probe(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) after orientation, from the header alone. Raises Refused."""
    kind, image = open_header(data, _HEADER_PIXELS)
    width, height = image.size
    return (kind, height, width) if orientation_of(image) >= 5 else (kind, width, height)


def decode(data: bytes, *, max_pixels: int, max_aspect: float | None = None) -> Image_HWC:
    """Encoded image -> uint8, H x W x 3, RGB, 0..255, contiguous and writable.

    `max_pixels` bounds width * height, `max_aspect` the longer side over the shorter; both are checked on the header.

    Raises:
        Refused: with a code and a message that says what to do.
    """
    return decode_turned(data, max_pixels=max_pixels, max_aspect=max_aspect)[0]


def decode_turned(data: bytes, *, max_pixels: int, max_aspect: float | None = None) -> tuple[Image_HWC, int]:
    """`decode`, and the orientation 1..8 by which the stored picture was turned."""
    rgb_HWC, orientation = _decoded(data, max_pixels, max_aspect)
    return orient(rgb_HWC, orientation), orientation


def _decoded(data: bytes, max_pixels: int, max_aspect: float | None) -> tuple[Image_HWC, int]:
    """The stored picture and its orientation; what the decoder holds ends here, before the picture is turned."""
    kind, image = open_header(data, max_pixels)
    check_aspect(*image.size, max_aspect)
    orientation = orientation_of(image)
    samples = SampleRange(is_wide(image))
    try:
        image.load()
        rgb_HWC = to_rgb(image, samples)
        samples.check()
        return rgb_HWC, orientation
    except Refused:
        raise
    except Exception as error:
        code = "truncated" if "truncated" in str(error) else "corrupt"
        raise Refused(code, f"the {kind} cannot be decoded ({short(error)}); send the original file again") from error
