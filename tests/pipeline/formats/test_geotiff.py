"""GeoTIFFs: tiles, their group, what has no data, and masks that do not lie on their image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.formats import geotiff
from pipeline.formats.common.source import Source, SourceError
from pipeline.imaging import decode
from pipeline.ingest import split
from pipeline.storage import manifest
from tests.support import tiny_labels, tiny_settings

rasterio = pytest.importorskip("rasterio", reason="the extra geotiff is not installed")
HEIGHT, WIDTH = 150, 200


def read(root: Path, **data: Any) -> Source:
    return tiny_labels.read(geotiff.read, root, "geotiff", **{"tile": 64} | data)


def write(path: Path, bands_CHW: np.ndarray, *, west: float = 500_000, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands_CHW.shape
    place = {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(west, 5_000_000, 0.5, 0.5)}
    shape = {"count": count, "height": height, "width": width, "dtype": bands_CHW.dtype}
    with rasterio.open(path, "w", driver="GTiff", **place | shape | options) as out:
        out.write(bands_CHW)


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 255, (4, HEIGHT, WIDTH)).astype(np.uint8), rng.integers(0, 3, (HEIGHT, WIDTH)).astype(
        np.uint8
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    bands_CHW, ids_HW = scene()
    for name, west in (("north", 500_000), ("south/west", 501_000)):
        write(tmp_path / f"images/{name}.tif", bands_CHW, west=west)
    write(tmp_path / "masks/north.tif", ids_HW[None])
    (tmp_path / "classes.txt").write_text("field\nroad\nroof\n")
    return tmp_path


def test_tiles_cover_the_image_once_and_belong_to_it(root: Path) -> None:
    source = read(root)
    bands_CHW, ids_HW = scene()
    seen_HW, content = np.zeros((HEIGHT, WIDTH), int), tiny_labels.content(source)
    for name, data in content.items():
        kind, _, key = name.partition("/")
        parent, _, place = key.removesuffix(".png").rpartition("/")
        assert source.groups is not None
        assert source.groups[f"{parent}/{place}"] == parent
        row, column = (int(part[1:]) for part in place.split("_"))
        pixels = tiny_labels.pixels(data)
        window = np.s_[row : row + 64, column : column + 64]
        if kind == "masks":
            np.testing.assert_array_equal(pixels, ids_HW[window])
            seen_HW[window] += 1
        else:  # the fourth band, near infrared, is left out
            np.testing.assert_array_equal(pixels, bands_CHW[:3].transpose(1, 2, 0)[window])
    assert (seen_HW == 1).all()
    assert sorted(set(source.groups.values())) == ["north", "south/west"]
    assert len(content) == 3 * 4 * 3


def test_what_has_no_data_is_ignored_and_empty_tiles_are_left_out(root: Path) -> None:
    bands_CHW, ids_HW = scene()
    bands_CHW[:, :64, :64] = 0
    bands_CHW[:, 70:80, 70:90] = 0
    write(root / "images/north.tif", bands_CHW[:3], nodata=0)
    signed_HW = ids_HW.astype(np.int16)
    signed_HW[100:110, 70:75] = -1
    write(root / "masks/north.tif", signed_HW[None], nodata=-1)
    source = read(root)
    assert "images/north/r000000_c000000.png" not in dict(source.files)
    assert "1 tiles without data" in source.notes[0]
    label_HW = tiny_labels.labels(source)["north/r000064_c000064"]
    expected_HW = ids_HW[64:128, 64:128].copy()
    expected_HW[6:16, 6:26] = 255
    expected_HW[36:46, 6:11] = 255
    np.testing.assert_array_equal(label_HW, expected_HW)


@pytest.mark.parametrize("worst", [-1, 0.5, 300, np.nan])
def test_values_that_are_no_ids_are_refused_with_the_way_out(root: Path, worst: float) -> None:
    values_HW = scene()[1].astype(np.float32)
    values_HW[0, 0] = worst
    write(root / "masks/north.tif", values_HW[None])
    source = read(root)
    refused = [str(data) for data in tiny_labels.content(source).values() if not isinstance(data, bytes)]
    assert len(refused) == 1
    assert "a_nodata" in refused[0]


def test_grey_and_16_bits_are_as_everywhere(root: Path) -> None:
    deep_HW = np.random.default_rng(1).integers(0, 65536, (1, HEIGHT, WIDTH)).astype(np.uint16)
    write(root / "images/north.tif", deep_HW)
    write(root / "images/south/west.tif", deep_HW.astype(np.float32))
    content = tiny_labels.content(read(root))
    pixels_HWC = tiny_labels.pixels(content["images/north/r000064_c000128.png"])
    high_HW = (deep_HW[0, 64:128, 128:192] >> 8).astype(np.uint8)
    np.testing.assert_array_equal(pixels_HWC, np.repeat(high_HW[:, :, None], 3, axis=2))
    assert [(name, code) for name, code, _ in read(root).refused] == [("images/south/west.tif", "unsupported-depth")]


def refused(root: Path) -> list[tuple[str, str]]:
    source = read(root)
    assert not [name for name, _ in source.files if name.startswith("masks/")]
    assert [name for name, _ in source.files if name.startswith("images/north/")], "the image stays, unlabelled"
    return [(code, reason) for _, code, reason in source.refused]


def test_a_mask_must_lie_on_its_image(root: Path) -> None:
    ids_HW = scene()[1]
    write(root / "masks/north.tif", ids_HW[None, :-1])
    assert refused(root) == [
        ("mask-size", "north.tif: 200 x 149 pixels, its image has 200 x 150; warp it onto the image's grid")
    ]
    for place in ({}, {"crs": None}):
        write(root / "masks/north.tif", ids_HW[None], west=500_020, **place)
        assert refused(root)[0][0] == "mask-place"
    write(root / "masks/north.tif", np.stack([ids_HW] * 3))
    assert refused(root)[0][0] == "rgb-mask"


def test_a_mask_without_georeference_or_with_nodata_0_is_taken_and_said(root: Path) -> None:
    ids_HW = scene()[1]
    write(root / "masks/north.tif", ids_HW[None], crs=None, transform=None, nodata=0)
    notes = read(root).notes
    assert any("1 masks: no projection of their own" in note for note in notes)
    assert any("1 masks: 0 is their nodata, so class 0 is ignored" in note for note in notes)


def test_other_files_are_counted_and_a_broken_image_stops_no_other(root: Path) -> None:
    (root / "masks/south").mkdir()
    (root / "masks/south/west.png").write_bytes(b"x")
    (root / "images/broken.tif").write_bytes(b"II*\x00nothing")
    before = len(read(root).files)
    source = read(root)
    assert len(source.files) == before
    assert source.skipped == [("no .tif: a GeoTIFF's mask is one too, on its grid", "masks/south/west.png")]
    assert [(name, code) for name, code, _ in source.refused] == [("images/broken.tif", "corrupt")]


def test_a_list_names_images_with_all_their_tiles_or_single_tiles(root: Path) -> None:
    (root / "val.txt").write_text("images/north.tif\n")
    (root / "unlabelled.txt").write_text("south/west/r000000_c000064\n")
    found = read(root, lists={"val": "val.txt", "unlabelled": "unlabelled.txt"}).lists
    assert len(found["val"] or ()) == 12
    assert found["unlabelled"] == ["south/west/r000000_c000064"]


def test_what_cannot_be_used_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"data\.tile: 4096 squared"):
        read(root, tile=4096)
    (root / "classes.txt").rename(root / "names.txt")
    with pytest.raises(SourceError, match=r"write classes\.txt"):
        read(root)
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.raises(SourceError, match=r"marginalia-seg\[geotiff\]"):
        read(root)


def test_a_tile_that_gdal_cannot_read_costs_that_tile_alone(root: Path) -> None:
    source = read(root)  # headers are whole
    whole = root / "images/north.tif"
    whole.write_bytes(whole.read_bytes()[: -HEIGHT * WIDTH])
    refused: list[decode.Refused] = []
    makers = [maker for name, maker in source.files if name.startswith("images/")]
    for maker in makers:
        try:
            maker()  # type: ignore[operator]
        except decode.Refused as error:
            refused.append(error)
    assert {error.code for error in refused} == {"truncated"}
    assert all("north.tif" in str(error) for error in refused)
    assert len(refused) <= len(makers) // 2, "the other image's tiles are whole"


def test_folders_that_state_a_split_hold_whole_images_and_test_images_without_masks_are_left_out(
    tmp_path: Path,
) -> None:
    bands_CHW, ids_HW = scene()
    for name in ("train/a", "val/b", "test/c"):
        write(tmp_path / f"images/{name}.tif", bands_CHW)
    for name in ("train/a", "val/b"):
        write(tmp_path / f"masks/{name}.tif", ids_HW[None])
    (tmp_path / "classes.txt").write_text("field\nroad\nroof\n")

    source = read(tmp_path)

    assert {name.split("/")[1] for name, _ in source.files} == {"train", "val"}
    assert {key.rpartition("/")[0] for key in source.lists["test"] or ()} == {"val/b"}
    assert "left out: 1 test images without labels" in source.notes
    assert any("val images are the test set" in note for note in source.notes)


def sides(source: Source, **lists: float) -> dict[str, set[str]]:
    """Image -> the sides of the split that its tiles with masks are on, by the source's groups."""
    assert source.groups is not None
    masked = [name.removeprefix("masks/").removesuffix(".png") for name, _ in source.files if name.startswith("masks/")]
    rows = [
        manifest.Row(key, key, "geotiff", "base", source.groups[key], 4, 4, "s", 0, 1, "m", 0, 1, "0" * 16)
        for key in masked
    ]
    found: dict[str, set[str]] = {}
    for row in split.assign(rows, source.lists, tiny_settings.split(**lists))[0]:
        found.setdefault(row.name.rpartition("/")[0], set()).add(split.SIDES[row.split])
    return found


def sites(root: Path, years: dict[str, float]) -> None:
    """Image name -> metres that it lies east of the first; each is 100 m wide."""
    for number, (name, east) in enumerate(years.items()):
        bands_CHW, ids_HW = scene(number)
        write(root / f"images/{name}.tif", bands_CHW, west=500_000 + east)
        write(root / f"masks/{name}.tif", ids_HW[None], west=500_000 + east)
    (root / "classes.txt").write_text("field\nroad\nroof\n")


@pytest.mark.parametrize("seed", range(8))
def test_two_years_of_one_site_are_never_on_two_sides_of_the_split(tmp_path: Path, seed: int) -> None:
    sites(
        tmp_path, {f"{site}_{year}": 150 * n + year - 2019 for n, site in enumerate("abcdef") for year in (2019, 2021)}
    )
    source = read(tmp_path)

    found = sides(source, seed=seed, val=0.2, test=0.3)
    assert all(found[f"{site}_2019"] == found[f"{site}_2021"] and len(found[f"{site}_2019"]) == 1 for site in "abcdef")
    assert set().union(*found.values()) == {"train", "val", "test"}
    assert any("share its group: 6, the first: a_2021 is of the group a_2019" in note for note in source.notes)


def test_sheets_that_share_an_edge_are_apart(tmp_path: Path) -> None:
    sites(tmp_path, {"a": 0, "b": 100, "c": 199.5})  # 0.5 m is a pixel
    assert set((read(tmp_path).groups or {}).values()) == {"a", "b", "c"}


def test_years_of_a_single_site_are_split_by_the_ground_of_their_tiles(tmp_path: Path) -> None:
    sites(tmp_path, {"2019": 0, "2020": 0, "2021": 0})
    source = read(tmp_path)

    assert source.groups is not None
    assert {key.partition("/")[2]: group for key, group in source.groups.items()} == {
        key.partition("/")[2]: key for key in source.groups if key.startswith("2019/")
    }
    assert any("all GeoTIFFs overlap on the ground: tiles of the same ground are a group" in n for n in source.notes)


def test_a_dark_scene_of_16_bits_is_refused_once_and_one_bright_pixel_saves_all_its_tiles(tmp_path: Path) -> None:
    """The copy that is looked at first has 512 pixels a side, and misses the bright pixel."""
    dark_HW = np.full((1, 1100, 600), 3000, np.uint16)
    bright_HW = dark_HW.copy()
    bright_HW[0, 1000, 501] = 50_000
    write(tmp_path / "images/dark.tif", dark_HW)
    write(tmp_path / "images/bright.tif", bright_HW, west=600_000)
    (tmp_path / "classes.txt").write_text("field\nroad\n")
    source = read(tmp_path, tile=512)

    assert [(name, code) for name, code, _ in source.refused] == [("images/dark.tif", "dark-16-bit")]
    assert len(source.files) == 6
    assert (tiny_labels.pixels(tiny_labels.content(source)["images/bright/r000000_c000000.png"]) == 3000 >> 8).all()
