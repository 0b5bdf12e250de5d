"""A small `folder` source on disk, its project folder, and the data stages run on it as the command line would."""

import io
import json
import tarfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.ingest import dump_registry
from pipeline.storage import manifest
from tests.support import tiny_settings
from tests.support.command_line import marginalia

CLASSES = ("sky", "wall", "floor")


def picture(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A blocky random picture, H x W x 3 uint8: different seeds are far apart in dHash."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (8, 9, 3)).astype(np.uint8)
    rows = np.arange(height) * 8 // height
    columns = np.arange(width) * 9 // width
    noise = rng.integers(0, 3, (height, width, 3)).astype(np.uint8)
    return np.minimum(cells[rows][:, columns], 250) + noise


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def tar(pictures: dict[str, bytes]) -> bytes:
    """An uncompressed tar of named files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in pictures.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def mask(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Three horizontal bands of the classes 0, 1, 2, and a corner to ignore; H x W uint8."""
    cut = 8 + seed % 20
    out = np.full((height, width), 2, np.uint8)
    out[: height - 10], out[:cut] = 1, 0
    out[:2, :2] = 255
    return out


def write_source(folder: Path, groups: dict[str, int], masked: set[str] | None = None) -> list[str]:
    """images/GROUP/NN.png for each group, masks for the groups in `masked` (all by default); returns the name ids."""
    ids = []
    (folder / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for group, count in groups.items():
        for n in range(count):
            seed = 1000 * (sorted(groups).index(group) + 1) + n
            key = f"{group}/{n:02d}"
            ids.append(key)
            put(folder, f"images/{key}.png", encode(picture(seed)))
            if masked is None or group in masked:
                put(folder, f"masks/{key}.png", encode(mask(seed)))
    return ids


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_project(root: Path, source: Path, data: dict[str, Any] | None = None, **sections: Any) -> None:
    """params.yaml and dumps.yaml of a project on that source."""
    root.mkdir(parents=True, exist_ok=True)
    section = {"source": "folder", "path": str(source), **(data or {})}
    tiny_settings.write(root / "params.yaml", data=section, **sections)
    base = dump_registry.DumpEntry(archive="data/pulled/base.tar")
    dump_registry.write_dumps(dump_registry.DumpRegistry(dumps={"base": base}), root / dump_registry.FILE)


def run(root: Path, *, dumps: tuple[str, ...] = ("base",), upto: str = "split") -> int:
    """pull, ingest of each dump, index, split, in this process; the first exit code that is not 0, else 0."""
    stages = [("pull", lambda: marginalia("stage", "pull"))]
    stages += [("ingest", lambda dump=dump: marginalia("stage", "ingest", dump)) for dump in dumps]
    stages += [("index", lambda: marginalia("stage", "index")), ("split", lambda: marginalia("stage", "split"))]
    last = max(i for i, (name, _) in enumerate(stages) if name == upto)
    with chdir(root):
        for _, stage in stages[: last + 1]:
            if code := stage():
                return code
    return 0


def quarantine(root: Path, file: str = "data/quarantine.json") -> dict[str, dict[str, Any]]:
    """Quarantine records by name."""
    return {item["name"]: item for item in json.loads((root / file).read_text())}


def rows(root: Path, file: str = "data/split/manifest.parquet") -> dict[str, manifest.Row]:
    return {f"{row.dump}/{row.name}": row for row in manifest.read(root / file)}


def summary(root: Path) -> dict[str, Any]:
    return json.loads((root / "data/split/summary.json").read_text())
