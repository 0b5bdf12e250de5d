"""The one table that flows through the pipeline: a row per image, in Parquet, with where its bytes lie."""

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.imaging import decode, label_maps
from pipeline.storage import atomic, shards

SPLITS = ("labelled", "unlabelled", "val", "test", "unused")
NEEDS_MASK = ("labelled", "val", "test")  # splits whose images have a mask


class ManifestError(ValueError):
    """A manifest or the data it points at is not what it should be; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image. Shard paths are relative to the project's folder; offsets and lengths are bytes.

    `id` is `image_id` of the decoded pixels; `phash` is `duplicates.dhash` as 16 hex digits, "" for a flat image. The
    mask fields are None for an image without a mask. `split` is "" until the stage split has assigned one of `SPLITS`.
    `mask_digest` is `mask_digest` of the decoded mask; None is not checked. `mask_import` names the import in labels.yaml
    that the mask came from; None: it is the source's own. `mask_replaced`: the import stands in place of one of the
    source's own. These three stand beside the row's own fields: a table without the last columns is read too.
    """

    id: str
    name: str
    source: str
    dump: str
    group: str
    width: int
    height: int
    shard: str
    offset: int
    length: int
    mask_shard: str | None
    mask_offset: int | None
    mask_length: int | None
    phash: str
    split: str = ""
    mask_digest: str | None = None
    mask_import: str | None = None
    mask_replaced: bool = False


_TEXT, _COUNT = pa.string(), pa.int64()
_TYPES = {"width": _COUNT, "height": _COUNT, "offset": _COUNT, "length": _COUNT}
_TYPES |= {"mask_offset": _COUNT, "mask_length": _COUNT, "mask_replaced": pa.bool_()}
_NULLABLE = {"mask_shard", "mask_offset", "mask_length", "mask_digest", "mask_import"}
SCHEMA = pa.schema([pa.field(f.name, _TYPES.get(f.name, _TEXT), f.name in _NULLABLE) for f in fields(Row)])


def image_id(image_HWC: NDArray[np.uint8]) -> str:
    """Hex SHA-256 over the shape ("HxWxC ") and the decoded uint8 pixels: equal pictures in any file format agree."""
    digest = hashlib.sha256("{}x{}x{} ".format(*image_HWC.shape).encode())
    digest.update(np.ascontiguousarray(image_HWC).data)
    return digest.hexdigest()


def mask_digest(mask_HW: NDArray[np.uint8]) -> str:
    """Hex SHA-256 over the class ids, row by row; the shape is the image's and is checked against it."""
    return atomic.sha256(mask_HW.tobytes())


def content_hash(archive: Path) -> str:
    """`set_hash` over the SHA-256 of every file in an uncompressed tar, names and order apart, as dumps.yaml records it.

    Raises:
        ValueError: not a readable uncompressed tar; names the file.
    """
    found = []
    for member in shards.members(archive):
        digest = hashlib.sha256()
        for at in range(0, member.length, atomic.CHUNK):
            digest.update(shards.read(archive, member.offset + at, min(atomic.CHUNK, member.length - at)))
        found.append(digest.hexdigest())
    return set_hash(found)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace `path` by the rows, in the order given. Equal rows give equal bytes with one version of pyarrow."""
    columns = [pa.array(list(map(attrgetter(f.name), rows)), f.type) for f in SCHEMA]
    table = pa.table(columns, schema=SCHEMA)
    with atomic.replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def read(path: Path) -> list[Row]:
    """Rows in stored order.

    Raises:
        ManifestError: the file is missing, not Parquet, or has other columns.
    """
    try:
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: not found; run `dvc repro` to make it") from error
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{path}: not a readable manifest ({error}); run `dvc repro` to make it again") from error
    if table.column_names not in [SCHEMA.names[: len(SCHEMA.names) - fewer] for fewer in range(4)]:
        odd = sorted(set(table.column_names) ^ set(SCHEMA.names))
        raise ManifestError(f"{path}: columns differ from the manifest's: {odd}; run `dvc repro` to make it again")
    return _rows({name: _values(table.column(name)) for name in table.column_names}, table.num_rows)


def _rows(columns: dict[str, list[Any]], count: int) -> list[Row]:
    """Rows filled a column at a time through their slots: a tenth of what Row(...) takes, which sets each field by name."""
    rows = [object.__new__(Row) for _ in range(count)]
    for field in fields(Row):
        values = columns[field.name] if field.name in columns else repeat(field.default, count)
        deque(map(getattr(Row, field.name).__set__, rows, values), maxlen=0)
    return rows


def _values(column: Any) -> list[Any]:
    """Python values of a column; by NumPy where nothing is null, several times as fast as to_pylist()."""
    if column.null_count == len(column):
        return [None] * len(column)
    values: list[Any] = column.to_pylist() if column.null_count else column.to_numpy().tolist()
    return values


def read_image_bytes(row: Row, root: Path = Path()) -> bytes:
    """The image file as it came. Raises ValueError where the shard is shorter than the row says."""
    return shards.read(root / row.shard, row.offset, row.length)


def read_mask_bytes(row: Row, root: Path = Path()) -> bytes | None:
    """The mask's index PNG, or None for an image without one."""
    if row.mask_shard is None or row.mask_offset is None or row.mask_length is None:
        return None
    return shards.read(root / row.mask_shard, row.mask_offset, row.mask_length)


def open_image(row: Row, max_pixels: int, root: Path = Path()) -> NDArray[np.uint8]:
    """Decoded RGB image, H x W x 3 uint8, verified against the row's id.

    Raises:
        ManifestError: the bytes do not decode, or to other pixels than when the manifest was written.
    """
    where = f"{row.shard} ({row.dump}/{row.name} at offset {row.offset})"
    try:
        image_HWC = decode.decode(read_image_bytes(row, root), max_pixels=max_pixels)
    except (ValueError, OSError) as error:
        raise ManifestError(f"{where}: {error}; the data changed after ingest: run `dvc repro` again") from error
    if image_id(image_HWC) != row.id:
        raise ManifestError(
            f"{where}: the pixels do not match the manifest's hash {row.id[:12]}; "
            "the data changed after ingest: run `dvc repro` again"
        )
    return image_HWC


def open_mask(row: Row, max_pixels: int, root: Path = Path()) -> NDArray[np.uint8] | None:
    """Class ids, H x W uint8 with 255 for ignore, or None for an image without a mask.

    Raises:
        ManifestError: the mask does not decode, has another size than the image, or other ids than when the manifest
            was written.
    """
    data = read_mask_bytes(row, root)
    if data is None:
        return None
    where = f"{row.mask_shard} ({row.dump}/{row.name})"
    try:
        mask_HW = label_maps.decode_mask(data, max_pixels=max_pixels)
    except ValueError as error:
        raise ManifestError(f"{where}: {error}; the data changed after ingest: run `dvc repro` again") from error
    if mask_HW.shape != (row.height, row.width):
        raise ManifestError(
            f"{where}: mask of {mask_HW.shape}, image of {(row.height, row.width)}: run `dvc repro` again"
        )
    mask_HW = mask_HW.astype(np.uint8, copy=False)
    if row.mask_digest is not None and mask_digest(mask_HW) != row.mask_digest:
        raise ManifestError(
            f"{where}: the mask's class ids do not match the manifest's hash {row.mask_digest[:12]}; "
            "the data changed after ingest: run `dvc repro` again"
        )
    return mask_HW


def set_hash(parts: Iterable[str]) -> str:
    """Hex SHA-256 over the sorted parts: names a set whatever order it was met in."""
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()
