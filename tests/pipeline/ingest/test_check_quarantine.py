"""Bad images and masks are named with a reason and a count; the good ones go on."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.ingest import add_dump
from pipeline.storage import manifest, shards
from tests.support import tiny_settings, tiny_source

PNG = tiny_source.encode(tiny_source.picture(77))
JPEG = tiny_source.encode(tiny_source.picture(78), "JPEG")


def bad_crc(png: bytes) -> bytes:
    at = png.index(b"IDAT") + 6
    return png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :]


def bomb(side: int = 19_000) -> bytes:
    """A valid grey PNG of side x side zeros in some 44 kB at the published size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + side)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1 if side > 20_000 else 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BAD = {
    "zero.png": (b"", "empty"),
    "cut.jpg": (JPEG[: len(JPEG) * 2 // 3], "truncated"),
    "cut.png": (PNG[: len(PNG) // 2], "truncated"),
    "crc.png": (bad_crc(PNG), "corrupt"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not-an-image"),
    "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported-format"),
}


@pytest.mark.parametrize("form", ["base", "dump"])
def test_bad_images_are_quarantined_and_the_good_go_on(tmp_path: Path, form: str) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 4, "b": 3, "c": 3})
    folder = source if form == "base" else tmp_path / "delivery"
    for name, (data, _) in BAD.items():
        tiny_source.put(folder, f"images/x-{name.replace('.', '_')}/{name}", data)
    tiny_source.put(folder, "images/good.png", PNG)
    tiny_source.write_project(root, source)
    names = ("base",)
    if form == "dump":
        add_dump.add(folder, name="d", root=root, params=tiny_settings.params())
        names = ("base", "d")
    assert tiny_source.run(root, dumps=names) == 0
    found = tiny_source.quarantine(root)
    codes = {f"x-{n.replace('.', '_')}/{n.rpartition('.')[0]}": code for n, (_, code) in BAD.items()}
    assert {name: item["code"] for name, item in found.items()} == codes
    assert all(item["reason"] and not item["kept"] for item in found.values())
    rows = tiny_source.rows(root)
    assert len(rows) == 11
    assert rows[f"{names[-1]}/good"].split == "unlabelled"


def test_a_small_file_that_is_a_gigabyte(tmp_path: Path) -> None:
    data = bomb()
    assert len(data) < 400_000
    shards.write_tar(tmp_path / "data/pulled/base.tar", [("images/bomb.png", data), ("images/good.png", PNG)])
    tiny_source.write_project(tmp_path, tmp_path)
    source = {"source": "folder", "classes": [{"id": 0, "name": "x", "color": [0, 0, 0]}], "ignore": 255}
    source |= {"lists": {}, "groups": None}
    (tmp_path / "data/pulled/source.json").write_text(json.dumps(source))
    code = (
        "import resource; from pipeline import stage; from pipeline.ingest import check\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); code = stage.run('ingest', check.run, 'base'); print('grew', peak() - before, 'exit', int(code))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    words = done.stdout.split()
    assert words[-1] == "0"
    assert int(words[words.index("grew") + 1]) < 100  # the picture alone would be 1083 MB as RGB
    found = tiny_source.quarantine(tmp_path, "data/ingested/base/quarantine.json")
    assert found["bomb"]["code"] == "too-many-pixels"
    assert "19000" in found["bomb"]["reason"]


def test_too_many_bytes(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 3, "b": 2, "c": 2})
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3)).astype(np.uint8)
    tiny_source.put(source, "images/large.png", tiny_source.encode(noise))
    tiny_source.write_project(root, source, ingest={"max_file_mb": 1})
    assert tiny_source.run(root) == 0
    assert tiny_source.quarantine(root)["large"]["code"] == "too-many-bytes"


GOOD = tiny_source.mask(3)
RGB = tiny_source.picture(5)
ALIEN = f"7 ({(GOOD == 1).sum()} px)"
MASKS = {
    "size": (tiny_source.encode(GOOD[:-1]), "mask-size", "64 x 47, the image 64 x 48"),
    "alien": (tiny_source.encode(np.where(GOOD == 1, 7, GOOD).astype(np.uint8)), "mask-class-id", ALIEN),
    "void": (tiny_source.encode(np.full_like(GOOD, 255)), "mask-all-ignore", "every pixel"),
    "void16": (tiny_source.encode(np.full(GOOD.shape, 65535, np.uint16)), "mask-all-ignore", "65535"),
    "colours": (tiny_source.encode(RGB), "rgb-mask", "colours"),
    "broken": (bad_crc(tiny_source.encode(GOOD)), "corrupt", ""),
    "empty": (b"", "empty", ""),
    "lossy": (tiny_source.encode(GOOD, "JPEG"), "lossy-mask", ""),
}  # fmt: skip


@pytest.mark.parametrize("listed", ["labelled", "val", "test", "unlabelled", "none"])
def test_bad_masks(tmp_path: Path, listed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Listed where a mask is needed: the pair is refused. Elsewhere the image stays, unlabelled."""
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 4, "b": 3, "c": 3})
    for n, (name, (data, _, _)) in enumerate(MASKS.items()):
        tiny_source.put(source, f"images/bad/{name}.png", tiny_source.encode(tiny_source.picture(500 + n)))
        tiny_source.put(source, f"masks/bad/{name}.png", data)
    lists = {}
    if listed != "none":
        (source / "list.txt").write_text("\n".join(f"bad/{name}" for name in MASKS))
        lists = {listed: "list.txt"}
    tiny_source.write_project(root, source, {"lists": lists})
    needed = listed in ("labelled", "val", "test")
    code = tiny_source.run(root)
    assert code == (1 if needed else 0)  # nothing is left to learn from, or to judge by
    out = capsys.readouterr().out
    found = tiny_source.quarantine(root)
    for name, (_, kind, text) in MASKS.items():
        item = found[f"bad/{name}"]
        assert (item["code"], item["kept"]) == (kind, not needed)
        assert text in item["reason"]
    assert f"mask-all-ignore{'' if needed else ' (image kept, unlabelled)'} │ 2" in " ".join(out.split()).replace(
        "  ", " "
    )
    rows = {row.name: row for row in tiny_source.rows(root, "data/manifest.parquet").values()}
    kept = [name for name in MASKS if f"bad/{name}" in rows]
    assert kept == ([] if needed else list(MASKS))
    if not needed:
        split = tiny_source.rows(root)
        assert {split[f"base/bad/{name}"].split for name in MASKS} == {"unlabelled"}
        assert all(split[f"base/bad/{name}"].mask_shard is None for name in MASKS)


def test_a_listed_image_without_any_mask_is_refused(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    ids = tiny_source.write_source(source, {"a": 4, "b": 3, "c": 3}, masked={"a", "c"})
    (source / "val.txt").write_text("\n".join(i for i in ids if i[0] in "bc"))
    tiny_source.write_project(root, source, {"lists": {"val": "val.txt"}}, split={"test": 0})
    assert tiny_source.run(root) == 0
    codes = {name: item["code"] for name, item in tiny_source.quarantine(root).items()}
    assert codes == dict.fromkeys(("b/00", "b/01", "b/02"), "mask-missing")


def test_16_bit_masks_are_read_and_255_and_65535_are_ignored(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 3, "b": 3, "c": 3})
    wide = GOOD.astype(np.uint16)
    wide[0, :2] = 65535  # where the 8-bit mask has 255; the other two stay 255, which is no class either
    tiny_source.put(source, "masks/a/00.png", tiny_source.encode(wide))
    tiny_source.write_project(root, source)
    assert tiny_source.run(root) == 0
    assert tiny_source.quarantine(root) == {}
    row = tiny_source.rows(root)["base/a/00"]
    np.testing.assert_array_equal(manifest.open_mask(row, 10_000, root), GOOD)
