"""A project with labels to send out and to bring back, and what the tests of both do with it."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline import config, paths
from pipeline.formats import cvat
from pipeline.formats.common.task import Item, task_name
from pipeline.imaging import label_maps
from pipeline.labels import importer
from pipeline.labels import registry as labels
from pipeline.storage import atomic, manifest, predictions, shards
from tests.support import tiny_source
from tests.support.command_line import marginalia

CLASSES = [{"id": k, "name": n, "color": [50 * k, 9, 200]} for k, n in enumerate(tiny_source.CLASSES)]
NEW = np.tile(np.array([0, 0, 1, 2], np.uint8), (48, 16))  # no band of any pre-label or mask looks like this


def write_label_project(home: Path) -> Path:
    """Groups: a labelled, u and a later dump unlabelled, v val, t test, h with hidden labels; pre-labels of all."""
    source, root = home / "source", home / "project"
    tiny_source.write_source(source, {"a": 3, "u": 3, "v": 1, "t": 1, "h": 1}, {"a", "v", "t", "h"})
    (source / "classes.txt").write_text("".join("{} {} {} {}\n".format(c["name"], *c["color"]) for c in CLASSES))
    parts = {"labelled": ["a/00", "a/01", "a/02"], "unlabelled": ["u/00", "u/01", "u/02", "h/00"]}
    parts |= {"val": ["v/00"], "test": ["t/00"]}
    for part, names in parts.items():
        (source / f"{part}.txt").write_text("\n".join(names))
    tiny_source.write_project(root, source, {"lists": {part: f"{part}.txt" for part in parts}}, pool={"label_next": 3})
    known = {"base": {"archive": "data/pulled/base.tar"}, "d": {"archive": "data/dumps/d.tar"}}
    (root / "dumps.yaml").write_text(yaml.safe_dump({"dumps": known}))
    later = [(f"images/m/{n}.png", tiny_source.encode(tiny_source.picture(9000 + n))) for n in range(2)]
    shards.write_tar(root / "data/dumps/d.tar", later)
    assert tiny_source.run(root, dumps=("base", "d")) == 0
    rows = [row for row in manifest.read(root / paths.SPLIT_MANIFEST) if row.split in ("labelled", "unlabelled")]
    shards.write_tar(
        root / predictions.PRELABELS,
        [(f"{r.id}.png", label_maps.encode_png(tiny_source.mask(n))) for n, r in enumerate(rows)],
    )
    write_pool(root, rows)
    return root


def write_pool(root: Path, rows: list[manifest.Row]) -> None:
    n, ones = len(rows), np.ones(len(rows))
    arrays = {key: np.array([getattr(r, key) for r in rows]) for key in ("id", "name", "dump", "group", "split")}
    arrays |= dict.fromkeys(("confidence", "margin", "entropy"), ones) | {"embedding": np.arange(2.0 * n).reshape(n, 2)}
    arrays |= {"area": np.full((n, 3), 1 / 3), "doubt": np.arange(3.0 * n).reshape(n, 3)}
    arrays["margins"] = np.full((n, predictions.MARGIN_BINS), 1 / predictions.MARGIN_BINS)
    with atomic.replacing(root / predictions.FILE) as file:
        np.savez(file, classes=np.array(tiny_source.CLASSES), **arrays)


def row(name: str) -> manifest.Row:
    return tiny_source.rows(Path())[name]


def zipped(path: Path, *given: tuple[str, np.ndarray], classes: list[dict[str, Any]] = CLASSES) -> Path:
    """CVAT's zip of label maps by DUMP/NAME or by any other name."""
    known = tiny_source.rows(Path())
    items = [
        Item(task_name(known[name].id, f"{name}.png") if name in known else name, "", b"", *label.shape, label)
        for name, label in given
    ]
    cvat.write(path, items, classes)
    return path


def add(path: Path, **options: Any) -> importer.Imported:
    return importer.add(path, params=config.load(), **options)


def codes(result: importer.Imported) -> dict[str, str]:
    return {item.name.partition("-")[2] or item.name: item.code for item in result.refused}


def rebuilt() -> dict[str, manifest.Row]:
    assert marginalia("stage", "index") == 0
    assert marginalia("stage", "split") == 0
    return tiny_source.rows(Path())


def snapshot() -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in [labels.FILE, *sorted(Path("data/labels").glob("*"))] if p.is_file()}
