"""GeoTIFF: large images/NAME.tif with masks/NAME.tif, cut into tiles of `data.tile` pixels a side.

A tile's name id is NAME/rROW_cCOLUMN (the pixel where it begins) and its group is the image it was cut from, so that
neighbours never stand on two sides of a split; images of the same ground are one group (`pipeline.formats.ground`). Tiles
begin at multiples of the tile's size and do not overlap; the last ones are smaller. Pixels without data, of the image (nodata
value, alpha or mask band) or of the mask, are ignored in the mask and black in the picture; tiles without any data are left
out.

Bands: the first three are red, green and blue; one or two are grey (and alpha). A last band that the file declares to be
alpha says where there is data; GDAL declares so by itself when it writes four bands of 8 bits. 16-bit samples become
their high byte, as everywhere here: stretch the values first where they fill only the lowest of the 65,536. That is judged
once for an image, over all its tiles and bands.

Needs the extra `geotiff` (rasterio). Only the tile at hand is read.
"""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import config
from pipeline.formats import ground
from pipeline.formats.common import class_list as class_lists
from pipeline.formats.common import split_lists
from pipeline.formats.common.source import Maker, Source, SourceError, groups_by, name_id, walk_all
from pipeline.formats.names import image_files, layout, matching
from pipeline.imaging import decode, label_maps

SUFFIXES = (".tif", ".tiff")
NO_IMAGE = "mask-without-image"


def _rasterio() -> Any:
    try:
        import rasterio
    except ImportError as error:
        raise SourceError("data.source: geotiff needs rasterio; `pip install 'marginalia-seg[geotiff]'`") from error
    return rasterio


@dataclass
class Tiled:
    """The tiles of all images, and what became of the rest."""

    files: list[tuple[str, Path | Maker]] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)  # tile -> image
    images: dict[str, ground.Place | None] = field(default_factory=dict)
    tiles: dict[str, ground.Place | None] = field(default_factory=dict)
    masks: int = 0
    empty: int = 0
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """Read headers only; tiles are cut when they are packed. A file that cannot be used is refused and stops no other.

    Raises:
        SourceError: rasterio is not installed, no images, a class file or list that does not fit.
    """
    rasterio = _rasterio()
    pictures, others = _tifs(root / "images")
    labels, without = _tifs(root / "masks")
    if not pictures:
        raise SourceError(f"{root}: no .tif under images/; data.path must name a folder that holds images/ and masks/")
    file = class_lists.read(root, data)
    if file is None:
        raise SourceError(
            f"{root}: GeoTIFF masks carry no names; write classes.txt, one class a line, for data.classes"
        )
    if data.tile**2 > max_pixels:
        raise SourceError(f"data.tile: {data.tile} squared is over ingest.max_pixels ({max_pixels}); lower it")

    matched = matching.match(list(labels), pictures)
    mask_of = {matched.images[name]: path for name, path in labels.items() if name in matched.images}
    tiled = Tiled(refused=[(f"masks/{name}", NO_IMAGE, reason) for name, reason in matched.refused.items()])
    for name, path in pictures.items():
        _cut(rasterio, name, path, mask_of.get(name), data.tile, tiled)
    keys = sorted(tiled.groups)
    splits = _splits(root, data, tiled, list(pictures))
    groups = groups_by(data.group, keys)
    grouped_by_ground: list[str] = []
    if groups is None:
        groups, grouped_by_ground = ground.groups(tiled.groups, tiled.images, tiled.tiles)
    return Source(
        files=sorted(
            (item for item in tiled.files if name_id(item[0].partition("/")[2]) not in splits.left_out),
            key=lambda item: item[0],
        ),
        classes=file[0],
        lists=splits.lists,
        groups=groups,
        refused=tiled.refused,
        notes=[
            f"{len(pictures)} GeoTIFFs, {tiled.masks} with masks, {len(keys)} tiles of "
            f"{data.tile} pixels; {tiled.empty} tiles without data left out",
            *(f"masks matched to images by {rule}: {line}" for rule, line in matched.forgiven),
            *(f"{count} masks: {note}" for note, count in tiled.notes.items()),
            *grouped_by_ground,
            *splits.notes,
        ],
        skipped=[
            *(("no .tif", f"images/{name}") for name in others),
            *(("no .tif: a GeoTIFF's mask is one too, on its grid", f"masks/{name}") for name in without),
        ],
    )


def _tifs(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The .tif files below a folder by name, and the names of the others."""
    tifs: dict[str, Path] = {}
    others: list[str] = []
    for name, path in walk_all(folder).items():
        if path.suffix.lower() in SUFFIXES and not image_files.is_system_file(name):
            tifs[name] = path
        else:
            others.append(name)
    return tifs, others


def _cut(rasterio: Any, name: str, path: Path, mask: Path | None, tile: int, tiled: Tiled) -> None:
    """Add one image's tiles, with its mask's where that lies on it."""
    parent = name_id(name)
    try:
        with _opened(rasterio, path) as image:
            check_samples(image)
            mask = _usable(rasterio, image, mask, parent, tiled)
            tiled.images[parent] = ground.place(image)
            for row, column, window in windows(rasterio, image.height, image.width, tile):
                if not image.dataset_mask(window=window).any():
                    tiled.empty += 1
                    continue
                key = f"{parent}/r{row:06d}_c{column:06d}"
                tiled.groups[key] = parent
                tiled.tiles[key] = ground.place(image, (row, column, int(window.height), int(window.width)))
                tiled.files.append((f"images/{key}.png", partial(picture, path, window)))
                if mask is not None:
                    tiled.files.append((f"masks/{key}.png", partial(label, mask, path, window)))
    except (decode.Refused, rasterio.errors.RasterioError) as error:
        code = error.code if isinstance(error, decode.Refused) else "corrupt"
        tiled.refused.append((f"images/{name}", code, str(error)))
        return
    tiled.masks += mask is not None


def _usable(rasterio: Any, image: Any, mask: Path | None, parent: str, tiled: Tiled) -> Path | None:
    """The mask where it can be laid on its image; else None, and it is refused with its reason."""
    if mask is None:
        return None
    try:
        with _opened(rasterio, mask) as opened:
            _same_place(image, opened)
            if opened.count >= 3:
                raise decode.Refused(
                    "rgb-mask", f"{mask.name}: {opened.count} bands are colours, not ids; save one band"
                )
            if opened.nodata == 0:
                tiled.notes[
                    "0 is their nodata, so class 0 is ignored; `gdal_edit.py -unsetnodata` if 0 is a class"
                ] += 1
            if image.crs and not opened.crs:
                tiled.notes["no projection of their own; taken as lying on their image"] += 1
    except decode.Refused as error:
        tiled.refused.append((f"masks/{parent}.tif", error.code, str(error)))
        return None
    return mask


def _opened(rasterio: Any, path: Path) -> Any:
    try:
        return rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        raise decode.Refused("corrupt", f"{path.name}: GDAL cannot open it ({decode.short(error)})") from error


@contextmanager
def _reading(rasterio: Any, path: Path) -> Iterator[None]:
    """A tile that GDAL cannot read costs that tile. Raises images.Refused."""
    try:
        yield
    except rasterio.errors.RasterioError as error:
        raise decode.Refused("truncated", f"{path.name}: GDAL cannot read this tile ({decode.short(error)})") from error


def _same_place(image: Any, mask: Any) -> None:
    """Raises images.Refused("mask-size" | "mask-place"). A mask without any georeference is taken to lie on its image."""
    name = Path(mask.name).name
    if (mask.height, mask.width) != (image.height, image.width):
        raise decode.Refused(
            "mask-size",
            f"{name}: {mask.width} x {mask.height} pixels, its image has {image.width} x {image.height}; warp it "
            "onto the image's grid",
        )
    projected = image.crs and mask.crs and image.crs != mask.crs
    moved = not mask.transform.is_identity and not image.transform.almost_equals(mask.transform)
    if projected or moved:
        raise decode.Refused(
            "mask-place", f"{name}: lies at another place or in another projection than its image; warp it first"
        )


def windows(rasterio: Any, height: int, width: int, tile: int) -> Iterator[tuple[int, int, Any]]:
    """(first row, first column, window) of every tile, row by row."""
    for row in range(0, height, tile):
        for column in range(0, width, tile):
            size = min(tile, width - column), min(tile, height - row)
            yield row, column, rasterio.windows.Window(column, row, *size)


def tiles(path: Path, tile: int) -> Iterator[tuple[str, bytes]]:
    """The tiles of one image as (name, PNG), as a source is cut: those without any data are left out.

    Raises:
        images.Refused: GDAL cannot read it, or as `check_samples`.
    """
    rasterio = _rasterio()
    with _opened(rasterio, path) as image, _reading(rasterio, path):
        check_samples(image)
        for row, column, window in windows(rasterio, image.height, image.width, tile):
            if image.dataset_mask(window=window).any():
                yield f"r{row:06d}_c{column:06d}.png", picture(path, window)


def _splits(root: Path, data: config.Data, tiled: Tiled, pictures: list[str]) -> split_lists.Splits:
    """A list names tiles, or whole images and with them all their tiles; so do folders named as splits."""
    groups, parents = tiled.groups, set(tiled.groups.values())
    aliases = {f"images/{name}": name for name in parents}
    masked = {groups[name_id(name[len("masks/") :])] for name, _ in tiled.files if name.startswith("masks/")}
    # A file that cannot be opened has no tiles.
    stated = {part: [name for name in names if name in parents] for part, names in layout.parts(pictures).items()}
    splits = split_lists.decide(root, data.lists, groups.keys() | parents, aliases, stated, masked)
    tiles: dict[str, list[str]] = {name: [] for name in parents}
    for key in sorted(groups):
        tiles[groups[key]].append(key)
    lists = {
        part: None if ids is None else [key for name in ids for key in tiles.get(name, [name])]
        for part, ids in splits.lists.items()
    }
    return split_lists.Splits(lists, {key for name in splits.left_out for key in tiles.get(name, ())}, splits.notes)


def check_samples(image: Any) -> None:
    """Refuse an open image as a whole for its samples, once for all its tiles.

    Raises:
        images.Refused: samples of other kinds than uint8 and uint16, or uint16 that fill too little of their range
            (`decode.check_range`): the brightest of a copy of at most 512 pixels a side, or if that is dark, of all.
    """
    bands = [1, 2, 3] if image.count >= 3 else [1]
    name, kinds = Path(image.name).name, {image.dtypes[band - 1] for band in bands}
    if kinds not in ({"uint8"}, {"uint16"}):
        raise decode.Refused(
            "unsupported-depth", f"{name}: samples of {', '.join(sorted(kinds))}; scale them to 8 or 16 bits"
        )
    if kinds == {"uint8"}:
        return
    copy = (len(bands), min(image.height, 512), min(image.width, 512))
    brightest = int(image.read(bands, out_shape=copy).max())
    blocks = (window for _, window in image.block_windows(1))
    while brightest < decode.DARK and (window := next(blocks, None)) is not None:
        brightest = max(brightest, int(image.read(bands, window=window).max()))
    try:
        decode.check_range(brightest)
    except decode.Refused as error:
        raise decode.Refused(error.code, f"{name}: {error}") from error


def _valid(source: Any, window: Any) -> NDArray[np.bool_]:
    valid_HW: NDArray[np.bool_] = source.dataset_mask(window=window) > 0
    return valid_HW


def picture(path: Path, window: Any) -> bytes:
    """One tile of an image that `check_samples` has passed, as an RGB PNG."""
    rasterio = _rasterio()
    with _opened(rasterio, path) as source, _reading(rasterio, path):
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
