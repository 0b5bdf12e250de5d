"""A photo that EXIF turns, beside a mask that was drawn on the stored picture or on the upright one."""

from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.imaging import decode
from pipeline.ingest import image_check
from pipeline.storage import manifest
from tests.support import image_files, tiny_source

HEIGHT, WIDTH = 48, 64


def photo(orientation: int, pixels: np.ndarray) -> bytes:
    return image_files.save(
        Image.fromarray(pixels), "JPEG", quality=95, subsampling=0, exif=image_files.exif(orientation)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_follows_its_photo_only_where_the_sizes_say_so(orientation: int) -> None:
    stored_HW = tiny_source.mask(3, HEIGHT, WIDTH)
    drawing = Image.fromarray(stored_HW)
    turn = image_files.TURNS.get(orientation)
    upright_HW = np.asarray(drawing.transpose(turn) if turn is not None else drawing)
    shape = upright_HW.shape
    label_HW, decided = image_check.check_mask(tiny_source.encode(stored_HW), shape, 3, 1 << 20, orientation)
    if orientation >= 5:
        np.testing.assert_array_equal(label_HW, upright_HW)
        assert decided == image_check.TURNED
    else:  # same sides: it is as the annotator saw the photo
        np.testing.assert_array_equal(label_HW, stored_HW)
        assert decided == (image_check.UPRIGHT if orientation > 1 else None)
    label_HW, decided = image_check.check_mask(tiny_source.encode(upright_HW), shape, 3, 1 << 20, orientation)
    np.testing.assert_array_equal(label_HW, upright_HW)
    assert decided == (image_check.UPRIGHT if 1 < orientation < 5 else None)


def test_a_square_mask_is_taken_as_upright() -> None:
    mask_HW = tiny_source.mask(3, 40, 40)
    label_HW, decided = image_check.check_mask(tiny_source.encode(mask_HW), (40, 40), 3, 1 << 20, 6)
    np.testing.assert_array_equal(label_HW, mask_HW)
    assert decided == image_check.UPRIGHT


def test_without_a_turn_swapped_sides_are_a_wrong_mask() -> None:
    mask = tiny_source.encode(tiny_source.mask(3, HEIGHT, WIDTH))
    for orientation, shape in ((1, (WIDTH, HEIGHT)), (3, (WIDTH, HEIGHT)), (6, (WIDTH, HEIGHT + 1))):
        with pytest.raises(decode.Refused, match="64 x 48") as caught:
            image_check.check_mask(mask, shape, 3, 1 << 20, orientation)
        assert caught.value.code == "mask-size"


def test_the_stored_mask_lies_on_the_upright_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Photo and mask show the same bands; after ingest they still lie on each other, and the turn is counted."""
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 2})
    bands_HW = tiny_source.mask(5, HEIGHT, WIDTH)
    bands_HW[:2, :2] = 0
    tiny_source.put(source, "images/b/00.jpg", photo(6, np.repeat(bands_HW[:, :, None] * np.uint8(100), 3, axis=2)))
    tiny_source.put(source, "masks/b/00.png", tiny_source.encode(bands_HW))
    tiny_source.write_project(root, source)
    assert tiny_source.run(root, upto="ingest") == 0
    assert f"{image_check.TURNED}" in " ".join(capsys.readouterr().out.split())
    (row,) = (r for r in manifest.read(root / "data/ingested/base/rows.parquet") if r.name == "b/00")
    assert (row.height, row.width) == (WIDTH, HEIGHT)
    with chdir(root):
        image_HWC = manifest.open_image(row, 1 << 20)
        mask_HW = manifest.open_mask(row, 1 << 20)
    np.testing.assert_array_equal((image_HWC[:, :, 0].astype(int) + 50) // 100, mask_HW)
