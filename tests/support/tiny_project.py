"""A whole small project on disk: coloured scenes in shards, a manifest, a split, a briefly trained real network."""

import atexit
import contextlib
import functools
import io
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from pipeline import config
from pipeline.imaging import label_maps
from pipeline.storage import atomic, manifest, shards
from tests.support import tiny_settings
from tests.support.command_line import marginalia
from training.models import segmenter

CLASSES = [
    {"id": 0, "name": "sky", "color": [80, 160, 230]},
    {"id": 1, "name": "wall", "color": [150, 90, 60]},
    {"id": 2, "name": "floor", "color": [70, 120, 60]},
    {"id": 3, "name": "lamp", "color": [240, 220, 40]},
]
NAMES = [c["name"] for c in CLASSES]
# A small real encoder: quick to build and to export.
MODEL = tiny_settings.model(architecture="FPN", encoder="resnet10t", weights=None)
INPUT = config.Input(long_side=96, stride=32)


def scene(rng: np.random.Generator, height: int, width: int, *, dark: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Sky over wall over floor with a lamp, noise, and a void strip: (image_HWC, mask_HW)."""
    mask = np.zeros((height, width), np.uint8)
    top, bottom = sorted(rng.integers(height // 5, 4 * height // 5, 2))
    mask[top:], mask[bottom:] = 1, 2
    y, x = rng.integers(0, height - 12), rng.integers(0, width - 12)
    mask[y : y + 12, x : x + 12] = 3
    colours = np.array([c["color"] for c in CLASSES], float)
    image = colours[mask] + rng.normal(0, 18, (height, width, 3))
    if dark:
        image = 0.15 * image
    mask[:, :2] = 255
    return np.clip(image, 0, 255).astype(np.uint8), mask


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_data(
    root: Path,
    parts: Sequence[tuple[str, str, str, int]],
    *,
    size: tuple[int, int] = (64, 96),
    dark: Sequence[str] = (),
) -> list[manifest.Row]:
    """Images for each (split, dump, group, count); every third one is larger. Returns the manifest's rows."""
    rng = np.random.default_rng(0)
    rows, images, answers = [], [], []
    for split, dump, group, count in parts:
        for n in range(count):
            height, width = size if n % 3 else (size[0] + 20, size[1] + 14)
            image, mask = scene(rng, height, width, dark=dump in dark)
            name = f"{group}/{dump}{n:03d}"
            images.append((f"{len(images):06d}.png", png(image)))
            answers.append((f"{len(answers):06d}.png", label_maps.encode_png(mask)))
            rows.append((name, dump, group, split, image))
    home = root / "data/ingested"
    shards.write_tar(home / "images.tar", images)
    shards.write_tar(home / "masks.tar", answers)
    places = [shards.members(home / file) for file in ("images.tar", "masks.tar")]
    table = []
    for (name, dump, group, split, image), one, two in zip(rows, *places, strict=True):
        mask_place: tuple[Any, ...] = (None, None, None)
        if split in ("labelled", "val", "test"):
            mask_place = ("data/ingested/masks.tar", two.offset, two.length)
        table.append(
            manifest.Row(
                manifest.image_id(image), name, "test", dump, group, image.shape[1], image.shape[0],
                "data/ingested/images.tar", one.offset, one.length, *mask_place, "0" * 16, split,
            )
        )  # fmt: skip
    manifest.write(root / "data/split/manifest.parquet", table)
    counts = {split: sum(row.split == split for row in table) for split in manifest.SPLITS}
    pixels = {"labelled": {"sky": 4000, "wall": 3000, "floor": 3000, "lamp": 150}}
    summary = {"classes": CLASSES, "ignore": 255, "counts": counts, "pixels": pixels}
    summary |= {"split_hash": "5" * 64, "test_hash": "7" * 64, "data_hash": "d" * 64}
    atomic.write_json(root / "data/split/summary.json", summary)
    return table


def meta() -> dict[str, Any]:
    return {
        "classes": CLASSES, "ignore": 255, "params": {"model": MODEL.model_dump(), "input": INPUT.model_dump()},
        "split_hash": "5" * 64, "data_hash": "d" * 64, "steps": 25, "method": "supervised", "seed": 0,
    }  # fmt: skip


@functools.cache
def trained(steps: int = 25) -> nn.Module:
    """The real network, trained for a few steps on scenes, so that every class is answered somewhere."""
    torch.manual_seed(0)
    model = segmenter.build(MODEL, len(CLASSES))
    rng = np.random.default_rng(9)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        pairs = [scene(rng, 64, 96) for _ in range(4)]
        image = torch.from_numpy(np.stack([p[0] for p in pairs])).permute(0, 3, 1, 2).float()
        truth = torch.from_numpy(np.stack([p[1] for p in pairs])).long()
        loss = nn.functional.cross_entropy(
            model(image), truth, ignore_index=255, weight=torch.tensor([1.0, 1.0, 1.0, 5.0])
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def write_student(root: Path, model: nn.Module, *, best: nn.Module | None = None) -> None:
    folder = root / "models/student"
    segmenter.save(folder / "student.safetensors", model.state_dict(), meta())
    segmenter.save(folder / "best.safetensors", (best or model).state_dict(), meta())


def write_params(root: Path, **sections: Any) -> config.Params:
    values: dict[str, Any] = {"evaluate": {"bootstrap": 200, "previews": 3, "batch": 4}}
    values |= {"pool": {"permutations": 199, "label_next": 4}, "model": MODEL.model_dump(), "input": INPUT.model_dump()}
    tiny_settings.write(root / "params.yaml", **(values | sections))
    return config.load(root / "params.yaml")


PARTS = (
    ("labelled", "base", "a", 6),
    ("unlabelled", "base", "b", 8),
    ("val", "base", "c", 3),
    ("test", "base", "d", 7),
    ("test", "base", "e", 4),
)


def write(root: Path, **sections: Any) -> config.Params:
    """The usual project: data, student (best = an earlier, worse one), params.yaml."""
    write_data(root, PARTS)
    write_student(root, trained(), best=trained(8))
    return write_params(root, **sections)


@functools.cache
def exported() -> Path:
    """The usual project after evaluate and export, made once a test session: not to be changed."""

    root = Path(tempfile.mkdtemp(prefix="tiny-project-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write(root)
    with contextlib.chdir(root):
        assert marginalia("stage", "evaluate") == 0
        assert marginalia("stage", "export") == 0
    return root
