"""Our confusion matrix (one bincount) against the three-histogram form. Bar 0.25, stretch 0.15.

python benchmarks/ratios/metric_speed.py [--out benchmarks/results/ratios/metric_speed.json]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support.timing import Timed, alternate, finish
from training import metrics

SHAPE, CLASSES, ROUNDS = (1024, 2048), 19, 15


def three_histograms(
    truth: np.ndarray, predicted: np.ndarray, k: int, *, uniform: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intersection, prediction and ground-truth areas by three histograms with listed edges, as the references count.

    `uniform` gives numpy the number of bins instead, its faster form.
    """
    answer = np.where(truth == 255, 255, predicted)
    same = answer[answer == truth]
    bins: dict[str, Any] = {"bins": k, "range": (0, k)} if uniform else {"bins": np.arange(k + 1)}
    return tuple(np.histogram(values, **bins)[0] for values in (same, answer, truth))  # type: ignore[return-value]


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Blocky ground truth with void, and a prediction that differs in about a tenth of the pixels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, CLASSES, (SHAPE[0] // 32, SHAPE[1] // 32)).astype(np.uint8)
    truth = np.repeat(np.repeat(coarse, 32, 0), 32, 1)
    predicted = np.where(rng.random(SHAPE) < 0.1, rng.integers(0, CLASSES, SHAPE), truth).astype(np.uint8)
    truth[rng.random(SHAPE) < 0.05] = 255
    return truth, predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    truth, predicted = inputs()
    inter, answered, labelled = three_histograms(truth, predicted, CLASSES)
    ours = metrics.confusion(truth, predicted, CLASSES, 255)
    # numpy's last bin includes its right edge, hence the check on all but the last class.
    assert (np.diagonal(ours)[:-1] == inter[:-1]).all()
    assert (ours.sum(0)[:-1] == answered[:-1]).all()
    assert (ours.sum(1)[:-1] == labelled[:-1]).all()
    works: dict[str, Callable[[], object]] = {
        "one bincount (ours)": lambda: metrics.confusion(truth, predicted, CLASSES, 255),
        "three histograms, uniform bins": lambda: three_histograms(truth, predicted, CLASSES, uniform=True),
        "three histograms": lambda: three_histograms(truth, predicted, CLASSES),
    }
    timed: dict[str, Timed] = alternate(works, ROUNDS)
    finish(
        "metric_speed",
        f"metric time at {SHAPE[0]} x {SHAPE[1]}, {CLASSES} classes",
        timed,
        bar=0.25,
        stretch=0.15,
        out=out,
    )


if __name__ == "__main__":
    main()
