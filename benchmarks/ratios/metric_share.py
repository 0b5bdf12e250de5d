"""Time of all metrics of an image (confusion, boundary, calibration) over inference of that image.

    python benchmarks/ratios/metric_share.py [--height 360 --width 480] [--out benchmarks/results/ratios/metric_share.json]

Bar 5 %, stretch 2 %. Inference is what evaluation does on this machine: the default network, batches of evaluate.batch,
arg max and confidence, answer on the host. The second line is the confusion matrix alone (what mIoU needs).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support.timing import Timed, alternate, finish
from tests.support import tiny_settings
from training import inference as infer
from training import metrics
from training.models import segmenter

CLASSES, ROUNDS = 11, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width", type=int, default=480)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings, where = tiny_settings.params(), infer.device()
    batch, stride = settings.evaluate.batch, settings.input.stride
    model = segmenter.build(settings.model.model_copy(update={"weights": None}), CLASSES).eval().to(where)
    height, width = (-(-side // stride) * stride for side in (options.height, options.width))
    rng = np.random.default_rng(0)
    images_BHWC = torch.from_numpy(rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8))

    @torch.inference_mode()
    def inference() -> tuple[np.ndarray, np.ndarray]:
        label, confidence = infer.answer(model(images_BHWC.to(where).float().permute(0, 3, 1, 2).contiguous()))
        return label.cpu().numpy(), confidence.cpu().numpy()

    # Realistic maps to count: regions, a tenth of the pixels wrong, a void strip.
    coarse = rng.integers(0, CLASSES, (batch, -(-height // 24), -(-width // 24))).astype(np.uint8)
    truth = np.repeat(np.repeat(coarse, 24, 1), 24, 2)[:, : options.height, : options.width].copy()
    predicted = np.where(rng.random(truth.shape) < 0.1, rng.integers(0, CLASSES, truth.shape), truth).astype(np.uint8)
    truth[:, :8] = 255
    confidence = rng.integers(0, 256, truth.shape).astype(np.uint8)
    how = {"k": CLASSES, "ignore": 255, "distance": settings.evaluate.boundary_px}

    def every() -> None:
        for item in zip(truth, predicted, confidence, strict=True):
            metrics.tally(*item, **how)

    def confusion() -> None:
        for one, two in zip(truth, predicted, strict=True):
            metrics.confusion(one, two, CLASSES, 255)

    works: dict[str, Callable[[], object]] = {
        "all metrics": every, "confusion alone": confusion, f"inference, {where}": inference,
    }  # fmt: skip
    timed: dict[str, Timed] = alternate(works, ROUNDS)
    what = f"metrics over inference, {batch} images of {options.height} x {options.width}, {settings.model.encoder}"
    finish("metric_share", what, timed, bar=0.05, stretch=0.02, out=options.out)


if __name__ == "__main__":
    main()
