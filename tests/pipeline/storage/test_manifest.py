"""Rows survive the round trip; ids name pixels, not files; an alien table is refused."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.imaging import decode
from pipeline.storage import manifest
from tests.support import tiny_source

ROW = manifest.Row(
    "ab" * 32, "g/ü 1", "folder", "base", "g", 640, 480, "data/x.tar", 512, 99, "data/m.tar", 1024, 50, "f" * 16, "val"
)
BARE = replace(ROW, id="cd" * 32, mask_shard=None, mask_offset=None, mask_length=None, split="")


def test_rows_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    manifest.write(path, [replace(ROW, mask_digest="e" * 64), BARE])
    assert manifest.read(path) == [replace(ROW, mask_digest="e" * 64), BARE]
    manifest.write(path, [ROW, BARE])
    assert manifest.read(path) == [ROW, BARE]
    first = path.read_bytes()
    manifest.write(path, [ROW, BARE])
    assert path.read_bytes() == first
    manifest.write(path, [])
    assert manifest.read(path) == []


def test_columns_are_the_data_contract() -> None:
    names = "id name source dump group width height shard offset length mask_shard mask_offset mask_length phash split"
    assert manifest.SCHEMA.names == [*names.split(), "mask_digest", "mask_import", "mask_replaced"]


def test_a_table_without_the_last_columns_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    manifest.write(path, [ROW, replace(BARE, mask_digest="e" * 64, mask_import="monday", mask_replaced=True)])
    pq.write_table(pq.read_table(path).drop_columns("mask_replaced"), path)
    assert manifest.read(path) == [ROW, replace(BARE, mask_digest="e" * 64, mask_import="monday")]
    pq.write_table(pq.read_table(path).drop_columns("mask_import"), path)
    assert manifest.read(path) == [ROW, replace(BARE, mask_digest="e" * 64)]
    pq.write_table(pq.read_table(path).drop_columns("mask_digest"), path)
    assert manifest.read(path) == [ROW, BARE]


def test_image_id_names_shape_and_pixels_only() -> None:
    image = tiny_source.picture(3, 10, 20)
    assert manifest.image_id(image) == hashlib.sha256(b"10x20x3 " + image.tobytes()).hexdigest()
    assert manifest.image_id(image[:, ::2]) == manifest.image_id(image[:, ::2].copy())
    assert manifest.image_id(image) != manifest.image_id(image.reshape(20, 10, 3))
    png, webp = tiny_source.encode(image), tiny_source.encode(image, "WEBP", lossless=True)
    ids = {manifest.image_id(decode.decode(data, max_pixels=10_000)) for data in (png, webp)}
    assert ids == {manifest.image_id(image)}


def test_a_table_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(manifest.ManifestError, match="not found"):
        manifest.read(path)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(manifest.ManifestError, match=r"m\.parquet"):
        manifest.read(path)
    pq.write_table(pa.table({"id": ["a"], "path": ["b"]}), path)
    with pytest.raises(manifest.ManifestError, match=r"columns.*path"):
        manifest.read(path)


def test_set_hash_ignores_order_but_not_content() -> None:
    assert manifest.set_hash(["b", "a"]) == manifest.set_hash(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
    assert manifest.set_hash(["a", "b"]) != manifest.set_hash(["a", "c"])


def test_masks_are_read_as_ids_or_as_absent(tmp_path: Path) -> None:
    data = tiny_source.encode(tiny_source.mask(4))
    (tmp_path / "m.tar").write_bytes(b"...." + data)
    row = replace(ROW, mask_shard="m.tar", mask_offset=4, mask_length=len(data), width=64, height=48)
    np.testing.assert_array_equal(manifest.open_mask(row, 10_000, tmp_path), tiny_source.mask(4))
    assert manifest.open_mask(BARE, 10_000, tmp_path) is None
    with pytest.raises(manifest.ManifestError, match=r"m\.tar.*mask of"):
        manifest.open_mask(replace(row, width=65), 10_000, tmp_path)
