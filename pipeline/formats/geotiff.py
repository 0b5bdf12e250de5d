"""GeoTIFF: large images/NAME.tif with masks/NAME.tif, cut into tiles of `data.tile` pixels a side.

A tile's name id is NAME/rROW_cCOLUMN (the pixel where it begins) and its group is the image it was cut from, so that
neighbours never stand on two sides of a split. Tiles begin at multiples of the tile's size and do not overlap; the last ones
are smaller. Pixels without data, of the image (nodata value, alpha or mask band) or of the mask, are ignored in the
mask and black in the picture; tiles without any data are left out.

Bands: the first three are red, green and blue; one or two are grey (and alpha). A last band that the file declares to be
alpha says where there is data; GDAL declares so by itself when it writes four bands of 8 bits. 16-bit samples become
their high byte, as everywhere here: stretch the values first where they fill only the lowest of the 65,536.

Needs the extra `geotiff` (rasterio). Only the tile at hand is read.
"""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import config
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common import split_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk
from pipeline.imaging import decode, label_maps

SUFFIXES = (".tif", ".tiff")


def _rasterio() -> Any:
    try:
        import rasterio
    except ImportError as error:
        raise SourceError("data.source: geotiff needs rasterio; `pip install 'marginalia-seg[geotiff]'`") from error
    return rasterio


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read headers only; tiles are cut when they are packed.

    Raises:
        SourceError: rasterio is not installed, no images, a file that GDAL cannot open, a mask of another size or place
            than its image, a class file or list that does not fit.
    """
    rasterio = _rasterio()
    pictures = {name_id(n): p for n, p in walk(root / "images").items() if p.suffix.lower() in SUFFIXES}
    labels = {name_id(n): p for n, p in walk(root / "masks").items() if p.suffix.lower() in SUFFIXES}
    if not pictures:
        raise SourceError(f"{root}: no .tif under images/; data.path must name a folder that holds images/ and masks/")
    file = class_lists.read(root, data)
    if file is None:
        raise SourceError(
            f"{root}: GeoTIFF masks carry no names; write classes.txt, one class a line, for data.classes"
        )
    if data.tile**2 > max_pixels:
        raise SourceError(f"data.tile: {data.tile} squared is over ingest.max_pixels ({max_pixels}); lower it")
    files: list[tuple[str, Path | Maker]] = []
    groups: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for name, path in pictures.items():
        with _opened(rasterio, path) as image:
            if name in labels:
                with _opened(rasterio, labels[name]) as mask:
                    _same_place(image, mask)
            for row, column, window in windows(rasterio, image.height, image.width, data.tile):
                if not image.dataset_mask(window=window).any():
                    left_out[name] += 1
                    continue
                key = f"{name}/r{row:06d}_c{column:06d}"
                groups[key] = name
                files.append((f"images/{key}.png", partial(picture, path, window)))
                if name in labels:
                    files.append((f"masks/{key}.png", partial(label, labels[name], path, window)))
    keys = sorted(groups)
    return Source(
        files=sorted(files, key=lambda item: item[0]),
        classes=file[0],
        lists=_lists(root, data, groups),
        groups=groups_by(data.group, keys) or groups,
        refused=[
            (f"masks/{n}.tif", "mask-without-image", "no image has its name") for n in labels.keys() - pictures.keys()
        ],
        notes=[
            f"{len(pictures)} GeoTIFFs, {len(labels.keys() & pictures.keys())} with masks, {len(keys)} tiles of "
            f"{data.tile} pixels; {left_out.total()} tiles without data left out"
        ],
    )


def _opened(rasterio: Any, path: Path) -> Any:
    try:
        return rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        raise SourceError(f"{path}: GDAL cannot open it ({decode.short(error)})") from error


@contextmanager
def _reading(rasterio: Any, path: Path) -> Iterator[None]:
    """A tile that GDAL cannot read costs that tile. Raises images.Refused."""
    try:
        yield
    except rasterio.errors.RasterioError as error:
        raise decode.Refused("truncated", f"{path.name}: GDAL cannot read this tile ({decode.short(error)})") from error


def _same_place(image: Any, mask: Any) -> None:
    if (mask.height, mask.width) != (image.height, image.width):
        raise SourceError(
            f"{mask.name}: {mask.width} x {mask.height} pixels, its image has {image.width} x {image.height}; warp it "
            "onto the image's grid"
        )
    if image.crs and mask.crs and (image.crs != mask.crs or not image.transform.almost_equals(mask.transform)):
        raise SourceError(f"{mask.name}: lies at another place or in another projection than its image; warp it first")


def windows(rasterio: Any, height: int, width: int, tile: int) -> Iterator[tuple[int, int, Any]]:
    """(first row, first column, window) of every tile, row by row."""
    for row in range(0, height, tile):
        for column in range(0, width, tile):
            size = min(tile, width - column), min(tile, height - row)
            yield row, column, rasterio.windows.Window(column, row, *size)


def _lists(root: Path, data: config.Data, groups: dict[str, str]) -> dict[str, list[str] | None]:
    """A list names tiles, or whole images and with them all their tiles."""
    parents = set(groups.values())
    found = split_lists.read(root, data.lists, groups.keys() | parents, {f"images/{name}": name for name in parents})
    tiles: dict[str, list[str]] = {name: [] for name in parents}
    for key in sorted(groups):
        tiles[groups[key]].append(key)
    return {
        part: None if ids is None else [key for name in ids for key in tiles.get(name, [name])]
        for part, ids in found.items()
    }


def _valid(source: Any, window: Any) -> NDArray[np.bool_]:
    valid_HW: NDArray[np.bool_] = source.dataset_mask(window=window) > 0
    return valid_HW


def picture(path: Path, window: Any) -> bytes:
    """One tile of an image as an RGB PNG. Raises images.Refused for samples of other kinds than uint8 and uint16."""
    rasterio = _rasterio()
    with _opened(rasterio, path) as source, _reading(rasterio, path):
        kinds = set(source.dtypes[: min(3, source.count)])
        if kinds not in ({"uint8"}, {"uint16"}):
            raise decode.Refused(
                "unsupported-depth", f"{path.name}: samples of {', '.join(sorted(kinds))}; scale them to 8 or 16 bits"
            )
        bands_CHW = source.read([1, 2, 3] if source.count >= 3 else [1], window=window)
        if bands_CHW.dtype == np.uint16:
            bands_CHW = (bands_CHW >> 8).astype(np.uint8)
        image_HWC = np.ascontiguousarray(np.broadcast_to(bands_CHW, (3, *bands_CHW.shape[1:])).transpose(1, 2, 0))
        image_HWC[~_valid(source, window)] = 0
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "PNG", compress_level=1)
    return out.getvalue()


def label(path: Path, image: Path, window: Any) -> bytes:
    """One tile of a mask as a PNG of ids; 255 where the mask or the image has no data.

    Raises:
        images.Refused: "mask-class-id" for fractions and for values outside 0..255 that are not declared as nodata.
    """
    rasterio = _rasterio()
    with _opened(rasterio, path) as source, _opened(rasterio, image) as beside, _reading(rasterio, path):
        values_HW = source.read(1, window=window)
        void_HW = ~(_valid(source, window) & _valid(beside, window))
    if values_HW.dtype == np.uint16:
        void_HW |= values_HW == 65535
    kept = values_HW[~void_HW]
    if kept.size and (
        not np.isfinite(kept).all() or (kept != np.floor(kept)).any() or kept.min() < 0 or kept.max() > 255
    ):
        raise decode.Refused(
            "mask-class-id",
            f"{path.name}: values {kept.min()} to {kept.max()} are no class ids; declare -1 or the like as nodata "
            "(gdal_edit.py -a_nodata), or save it as 8 bits with 255 for ignore",
        )
    ids_HW = np.full(values_HW.shape, label_maps.IGNORE, np.uint8)
    ids_HW[~void_HW] = kept.astype(np.uint8)
    return label_maps.encode_png(ids_HW)
