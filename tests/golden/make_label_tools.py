"""Made the files in label_tools/ with the tools' own libraries; not run by the tests.

pip install datumaro==1.13.12 cvat-sdk==2.80.0 label-studio-sdk==2.1.2 pycocotools==2.0.11
python tests/golden/make_label_tools.py
"""

import json
import sys
import tempfile
from pathlib import Path

import datumaro as dm
import numpy as np
from cvat_sdk import masks as cvat_masks
from label_studio_sdk.converter import brush
from PIL import Image
from pycocotools import mask as coco_masks

HERE = Path(__file__).parent / "label_tools"
sys.path.insert(0, str(HERE.parents[2]))
from tests.support import synthetic_masks  # noqa: E402

NAMES = ["sky", "wall", "floor", "lamp"]
HEIGHT, WIDTH = 24, 33  # unequal and odd: an exchange of rows and columns cannot pass


def truth() -> np.ndarray:
    out = synthetic_masks.regions(HEIGHT, WIDTH, 4, seed=3)
    out[:2, 5:9] = 255
    return out


def cvat(label: np.ndarray) -> None:
    """datumaro writes each class as a mask in the whole image, sky below as a box; cvat_sdk packs masks in their boxes."""
    shapes = [dm.Bbox(0, 0, WIDTH, HEIGHT, label=0, z_order=0)]
    shapes += [dm.Mask(label == k, label=k, z_order=1) for k in (3, 2, 1)]
    shapes += [dm.Polygon([4, 3, 14, 5, 9, 13.5], label=3, z_order=-1)]  # below everything: never seen
    item = dm.DatasetItem(
        "night/a b", media=dm.Image.from_numpy(np.zeros((HEIGHT, WIDTH, 3), np.uint8)), annotations=shapes
    )
    dataset = dm.Dataset.from_iterable([item], categories=NAMES)
    with tempfile.TemporaryDirectory() as folder:
        dataset.export(folder, "cvat", save_media=False)
        (HERE / "cvat/annotations.xml").write_bytes(next(Path(folder).rglob("*.xml")).read_bytes())
    packed = {name: list(map(int, cvat_masks.encode_mask(label == k))) for k, name in enumerate(NAMES)}
    (HERE / "cvat/masks.json").write_text(json.dumps(packed))


def labelstudio(label: np.ndarray) -> None:
    """`noise`: runs of one value, which its encoder writes as values in turn. `wide`: longer than the longest run."""
    packed = {name: brush.mask2rle((label == k).astype(np.uint8) * 255) for k, name in enumerate(NAMES)}
    noise = np.random.default_rng(0).integers(0, 256, (7, 5, 4)).astype(np.uint8)
    noise[:3] = 255
    packed["noise"] = brush.encode_rle(noise.ravel())
    wide = np.zeros((200, 300), np.uint8)
    wide[150:, 7] = 255
    packed["wide"] = brush.mask2rle(wide)
    assert (brush.decode_rle(packed["noise"]) == noise.ravel()).all()
    (HERE / "labelstudio/brush.json").write_text(json.dumps({"rle": packed, "noise": noise.tolist()}))


def main() -> None:
    label = truth()
    Image.fromarray(label).save(HERE / "cvat/truth.png")
    cvat(label)
    labelstudio(label)
    counts = {n: coco_masks.encode(np.asfortranarray(label == k))["counts"].decode() for k, n in enumerate(NAMES)}
    (HERE / "coco/counts.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
