"""large_image: the reduced image is the one that the whole-image path makes; what must be whole has its own limit."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from pipeline.imaging import decode, large_image, png_bands, resize
from pipeline.imaging.decode import Refused
from pipeline.imaging.large_image import _resize
from tests.support.image_files import exif, save

RNG = np.random.default_rng(13)
LIMITS = large_image.LargeImageLimits(pixels=10**7, whole_pixels=10**5, whole_bytes=10**6, aspect=50)


def smooth(height: int, width: int) -> Image.Image:
    coarse = Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def opened(data: bytes, limits: large_image.LargeImageLimits = LIMITS) -> large_image.LargeImage:
    return large_image.open_picture(io.BytesIO(data), limits)


def code(data: bytes, limits: large_image.LargeImageLimits = LIMITS) -> str:
    with pytest.raises(Refused) as caught:
        opened(data, limits).check_rows()
    return caught.value.code


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_bands, "BAND_PIXELS", 1250)
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 5000)
    monkeypatch.setattr(large_image, "_COLUMNS", 10)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {"compression": "tiff_lzw"})])
@pytest.mark.parametrize(("height", "width"), [(200, 301), (301, 200), (63, 500), (900, 70), (40, 30)])
def test_png_and_tiff_are_reduced_as_the_whole_image_is(kind: str, options: dict, height: int, width: int) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    data = save(noise, kind, **options)
    plan = resize.plan(height, width, long_side=48, stride=1)
    picture = opened(data)
    assert picture.bands is not None
    assert (picture.kind, picture.height, picture.width) == (kind, height, width)
    got, whole = picture.shrunk(plan.scaled_height, plan.scaled_width), decode.decode(data, max_pixels=10**6)
    np.testing.assert_array_equal(got, _resize(_resize(whole, height, plan.scaled_width), *got.shape[:2]))
    assert np.abs(got.astype(int) - resize.apply(whole, plan)).max() <= (0 if width > height else 1)
    np.testing.assert_array_equal(np.concatenate(list(picture.rows())), whole)


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_turned_images_are_reduced_upright(kind: str, turned: int) -> None:
    """Within a grey level: the two passes of the resize change places. A JPEG is not decoded whole."""
    data = save(smooth(400, 600), kind, exif=exif(turned))
    whole = decode.decode(data, max_pixels=10**6)
    picture = opened(data)
    assert (picture.height, picture.width) == whole.shape[:2]
    height, width = (60, 40) if turned >= 5 else (40, 60)
    got, want = picture.shrunk(height, width).astype(int), _resize(whole, height, width).astype(int)
    assert np.abs(got - want).max() <= (1 if kind == "PNG" else 3)
    assert np.abs(got - want).mean() < 0.5


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data = save(smooth(800, 1201), "JPEG", quality=95)
    picture = opened(data, large_image.LargeImageLimits(10**7, 1, 1))  # nothing may be decoded whole
    whole = decode.decode(data, max_pixels=10**7)
    for spare in (4, 2):
        monkeypatch.setattr(large_image, "_SPARE", (spare,))
        difference = np.abs(picture.shrunk(80, 120).astype(int) - _resize(whole, 80, 120))
        assert difference.max() <= 4
        assert difference.mean() < 0.4
    with pytest.raises(Refused, match="in several scans"):
        picture.shrunk(300, 450)  # less than four times


def test_how_far_the_decoder_scales() -> None:
    assert large_image._spare(8000, 8000, 512, 512) == 2  # 15.6 times: by 4, since by 2 would leave 16 MP
    assert large_image._spare(10_000, 10_000, 512, 512) == 4  # 19.5 times: by 4, leaving 6.25 MP
    assert large_image._spare(4096, 4096, 1024, 1024) == 2
    assert large_image._spare(4095, 4096, 1024, 1024) is None


def test_a_jpeg_in_several_scans_counts_as_whole() -> None:
    picture = smooth(400, 600)
    assert opened(save(picture, "JPEG")).scan
    assert opened(save(picture.convert("CMYK"), "JPEG")).scan
    progressive = save(picture, "JPEG", progressive=True)
    assert not opened(progressive).scan
    with pytest.raises(Refused) as caught:
        opened(progressive).shrunk(40, 60)
    assert caught.value.code == "too-many-pixels"
    with pytest.raises(Refused) as caught:
        opened(progressive, large_image.LargeImageLimits(10**7, 10**7, 10)).shrunk(40, 60)
    assert caught.value.code == "body-too-large"


def test_limits_by_kind() -> None:
    large = smooth(400, 600)
    assert code(save(large, "JPEG")) == "too-many-pixels"
    assert code(save(large, "WEBP")) == "too-many-pixels"
    assert code(save(large, "PNG", exif=exif(6))) == "too-many-pixels"
    opened(save(large, "PNG")).check_rows()
    assert code(save(large, "PNG"), large_image.LargeImageLimits(10**5, 10**5, 10**6)) == "too-many-pixels"
    assert code(save(large, "BMP"), large_image.LargeImageLimits(10**7, 10**7, 10**5)) == "body-too-large"
    assert code(save(smooth(3, 600), "PNG")) == "bad-aspect"
    assert code(save(smooth(9, 9), "PNG", save_all=True, append_images=[smooth(9, 9)])) == "animated"


def test_damage_is_told() -> None:
    jpeg = save(smooth(400, 600), "JPEG")
    assert code(jpeg[:40]) in ("truncated", "corrupt")
    assert code(jpeg[:20] + b"\0" + jpeg[21:]) == "corrupt"
    with pytest.raises(Refused) as caught:
        opened(jpeg[: len(jpeg) // 2]).shrunk(40, 60)
    assert caught.value.code == "truncated"


def test_size_by_the_header() -> None:
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP"):
        assert large_image.size(save(smooth(40, 60), kind)) == (40, 60)
