"""How often drift flags a dump that is like the rest, and how often one that is not, on real photographs.

    python benchmarks/drift_rates.py DATA [--trials 300] [--out benchmarks/results/drift_rates.json]

DATA holds camvid/ and msrc21/ (images/*.jpg). CamVid's frames are cut into blocks of 12 neighbours in time, which are
its groups; MSRC's photographs are groups of their own. Spaces: the image descriptor of `--screen`, and the deepest
features of the ImageNet encoder that comes in a package (EfficientNet-Lite0, long side 160), averaged over the image,
which stand for the student's. Normal dumps are random groups of the reference's own footage, taken out of it; odd ones
are CamVid's dusk footage 0001TP against its day footage, and MSRC against CamVid.
"""

import argparse
import sys
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import config, console
from pipeline.drift import records, two_sample
from pipeline.storage import atomic, predictions

BLOCK = 12
SETTINGS = config.load(Path(__file__).parents[1] / "params.yaml")
DAY, DARK = ("0006R0", "0016E5", "Seq05VD"), "0001TP"
Rows = NDArray[np.int64]


def descriptors(paths: list[Path]) -> NDArray[np.float64]:
    with console.bar("descriptors", len(paths)) as bar:
        found = []
        for path in paths:
            found.append(predictions.descriptor(np.asarray(Image.open(path).convert("RGB"))))
            bar.advance()
    return np.array(found, np.float64)


def features(paths: list[Path]) -> NDArray[np.float64]:
    """The encoder's deepest features, averaged over each image."""
    import torch

    from pipeline.imaging import resize
    from training.models import segmenter

    torch.set_num_threads(1)
    net = segmenter.build(SETTINGS.model.model_copy(update={"architecture": "FPN"}), 2).eval()
    found = []
    with torch.inference_mode(), console.bar("features", len(paths)) as bar:
        for path in paths:
            image = np.asarray(Image.open(path).convert("RGB"))
            fitted = resize.apply(image, resize.plan(*image.shape[:2], long_side=160, stride=32))
            tensor = torch.from_numpy(np.ascontiguousarray(fitted)).permute(2, 0, 1)[None].float()
            heard: list[Any] = []
            handle = net.net.encoder.register_forward_hook(lambda _m, _i, out: heard.append(out[-1]))  # noqa: B023
            net(tensor)
            handle.remove()
            found.append(heard[0].mean((0, 2, 3)).numpy())
            bar.advance()
    return np.array(found, np.float64)


def groups(paths: list[Path]) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """(sequence of CamVid or "msrc", group) of each image."""
    sequence = np.array([p.stem.split("_")[0] if p.parts[-3] == "camvid" else "msrc" for p in paths])
    group = np.array([p.stem for p in paths], dtype="U64")
    for name in (*DAY, DARK):
        rows = np.flatnonzero(sequence == name)
        group[rows] = [f"{name}-{n // BLOCK}" for n in range(len(rows))]
    return sequence, group


def flagged(
    feature_ND: NDArray[np.float64], group: NDArray[np.str_], name: str, ours: Rows, theirs: Rows
) -> records.Finding:
    rows = np.concatenate([ours, theirs])
    dump = np.array([two_sample.BASE] * len(ours) + [name] * len(theirs))
    points = two_sample.Cloud(feature_ND[rows], dump, group[rows], np.array(["unlabelled"] * len(rows)))
    return two_sample.compare(points, name, SETTINGS.pool)


def interval(hits: int, trials: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % bounds of a rate, by bisection."""

    def tail(p: float, low: int, high: int) -> float:
        return sum(comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(low, high + 1))

    def root(wanted: Callable[[float], bool]) -> float:
        a, b = 0.0, 1.0
        for _ in range(50):
            a, b = ((a + b) / 2, b) if wanted((a + b) / 2) else (a, (a + b) / 2)
        return a

    lower = 0.0 if hits == 0 else root(lambda p: tail(p, hits, trials) < 0.025)
    upper = 1.0 if hits == trials else root(lambda p: tail(p, 0, hits) > 0.025)
    return lower, upper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    paths = [p for name in ("camvid", "msrc21") for p in sorted((arguments.data / name / "images").glob("*.jpg"))]
    sequence, group = groups(paths)
    day, dark, msrc = np.isin(sequence, DAY), sequence == DARK, sequence == "msrc"
    rng = np.random.default_rng(0)
    results = []

    def draw(mask: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
        chosen = rng.choice(np.unique(group[mask]), count, replace=False)
        return np.isin(group, chosen) & mask

    def normal(mask: NDArray[np.bool_], count: int) -> Callable[[], tuple[Rows, Rows]]:
        def trial() -> tuple[Rows, Rows]:
            out = draw(mask, count)
            return np.flatnonzero(mask & ~out), np.flatnonzero(out)

        return trial

    def few(mask: NDArray[np.bool_], count: int) -> Callable[[], tuple[Rows, Rows]]:
        """`count` groups as reference, one more as the dump."""

        def trial() -> tuple[Rows, Rows]:
            some = draw(mask, count + 1)
            out = draw(some, 1)
            return np.flatnonzero(some & ~out), np.flatnonzero(out)

        return trial

    def odd(ours: NDArray[np.bool_], theirs: NDArray[np.bool_], count: int) -> Callable[[], tuple[Rows, Rows]]:
        """`count` groups of the other kind, against a random four fifths of the reference."""

        def trial() -> tuple[Rows, Rows]:
            kept = draw(ours, len(np.unique(group[ours])) * 4 // 5)
            return np.flatnonzero(kept), np.flatnonzero(draw(theirs, count))

        return trial

    rare = max(20, arguments.trials // 10)
    cases = [
        ("false alarm", "CamVid day, 1 block of 50", normal(day, 1), arguments.trials),
        ("false alarm", "CamVid day, 5 blocks of 50", normal(day, 5), arguments.trials),
        ("false alarm", "CamVid day, 10 blocks of 50", normal(day, 10), arguments.trials),
        ("false alarm", "CamVid day, 1 block against 4", few(day, 4), arguments.trials),
        ("false alarm", "MSRC, one half against the other", normal(msrc, int(msrc.sum()) // 2), arguments.trials),
        ("false alarm", "MSRC, 50 against the rest", normal(msrc, 50), arguments.trials),
        ("detection", "CamVid dark, 1 block, against day", odd(day, dark, 1), rare),
        ("detection", "CamVid dark, 3 blocks, against day", odd(day, dark, 3), rare),
        ("detection", "CamVid dark, all, against day", odd(day, dark, len(np.unique(group[dark]))), rare),
        ("detection", "MSRC, 20 images, against CamVid day", odd(day, msrc, 20), rare),
    ]
    table = Table("space", "rate of", "dump", "flagged", "rate", "95 % bounds", "rule", title="drift at p < 0.01")
    for space, look in (("descriptor", descriptors), ("encoder features", features)):
        feature_ND = look(paths)
        for kind, name, trial, trials in cases:
            with console.bar(name, trials) as bar:
                found = []
                for number in range(trials):
                    found.append(flagged(feature_ND, group, f"week{number}", *trial()))
                    bar.advance()
            hits = sum(f.drifted for f in found)
            low, high = interval(hits, trials)
            rules = " / ".join(sorted({f.rule for f in found}))
            results.append(
                {"space": space, "kind": kind, "dump": name, "flagged": hits, "trials": trials, "rule": rules}
            )
            bounds = f"{100 * low:.2f} to {100 * high:.2f} %"
            table.add_row(space, kind, name, f"{hits} of {trials}", f"{100 * hits / trials:.2f} %", bounds, rules)
    Console(width=150).print(table)
    if arguments.out:
        atomic.write_json(arguments.out, {"drift_p": SETTINGS.pool.drift_p, "images": len(paths), "rows": results})


if __name__ == "__main__":
    main()
