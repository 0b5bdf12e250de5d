"""Which score says best where a teacher is right? Precision at equal coverage, without training anything.

    python benchmarks/ranking.py WEIGHTS [--every 3] [--out FILE]

Run in a project whose split exists and whose unlabelled images have hidden masks (as benchmarks/evidence.py makes them);
WEIGHTS are a teacher's, as training keeps them (student.safetensors) or as a state dict of torch. Every rule gives each
pixel a label and a score; pixels are taken from the surest down. A refinement is worth training with where its precision
at a coverage is higher than that of the plain maximum. A tenth of the pixels, drawn once for all rules, is looked at.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.evidence import commit
from pipeline import config, paths
from pipeline.champions import metrics as scores
from pipeline.storage import atomic, manifest
from training import inference
from training.engine.data import Images
from training.methods import s4mc
from training.models import segmenter
from training.split_data import SplitData

COVERAGES = (0.6, 0.8, 0.9, 1.0)
PIXELS = 0.1  # share of the pixels that is looked at
SCALES = (0.75, 1.3)
NEAR_BORDER = 2  # pixels; labels so close to another class are half a matter of taste


class Views(NamedTuple):
    """The teacher's probabilities prob_1KHW of one image: as it is, mirrored (and turned back), smaller and larger."""

    plain: Tensor
    mirrored: Tensor
    smaller: Tensor
    larger: Tensor


def union(one: Tensor, two: Tensor) -> Tensor:
    """Probability of either event, were they independent (the paper's refinement)."""
    return one + two - one * two


def at_distance(prob_BKHW: Tensor, distance: int) -> Tensor:
    """S4MC's union with the most supportive of four neighbours `distance` pixels away."""
    height, width = prob_BKHW.shape[2:]
    padded = F.pad(prob_BKHW, (distance,) * 4)
    offsets = ((0, 1), (1, 0), (2, 1), (1, 2))
    shifted = [padded[..., y * distance :, x * distance :][..., :height, :width] for y, x in offsets]
    return union(prob_BKHW, torch.stack(shifted).amax(0))


def mean(*maps: Tensor) -> Tensor:
    return torch.stack(maps).mean(0)


# What is refined -> the map whose margin ranks the pixels and whose largest class labels them.
RULES: dict[str, Callable[[Views], Tensor]] = {
    "margin": lambda v: v.plain,
    "union, 8 neighbours (S4MC)": lambda v: s4mc.refine(v.plain),
    "union, 4 pixels away": lambda v: at_distance(v.plain, 4),
    "union, 8 pixels away": lambda v: at_distance(v.plain, 8),
    "union, mirrored": lambda v: union(v.plain, v.mirrored),
    "mean, mirrored": lambda v: mean(v.plain, v.mirrored),
    "mean, smaller": lambda v: mean(v.plain, v.smaller),
    "mean, three scales": lambda v: mean(v.plain, v.smaller, v.larger),
    "mean, scales and mirrored": lambda v: mean(*v),
}


class Ranked(NamedTuple):
    """A rule's pixels: score_N float32, true and given class_N, and whether they lie at a border."""

    score_N: NDArray[np.float32]
    truth_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    border_N: NDArray[np.bool_]


def precision_at(score_N: NDArray[Any], right_N: NDArray[np.bool_], coverage: float) -> float:
    """Share of right ones among the `coverage` surest pixels, in percent; equal scores in the order given."""
    count = max(1, round(coverage * len(score_N)))
    surest = np.argsort(-score_N, kind="stable")[:count]
    return 100 * float(right_N[surest].mean())


def risk(score_N: NDArray[Any], right_N: NDArray[np.bool_]) -> float:
    """Mean error over all coverages in percent (area under the risk-coverage curve); lower ranks better."""
    errors = ~right_N[np.argsort(-score_N, kind="stable")]
    return 100 * float((errors.cumsum() / np.arange(1, len(errors) + 1)).mean())


def told(ranked: Ranked, n_classes: int) -> dict[str, Any]:
    """A rule's row: precision at each coverage, away from borders too, the risk, and mIoU of its labels."""
    right = ranked.truth_N == ranked.label_N
    inside = ~ranked.border_N
    counts = np.bincount(ranked.truth_N * n_classes + ranked.label_N, minlength=n_classes**2)
    return {
        **{f"at {coverage:.0%}": precision_at(ranked.score_N, right, coverage) for coverage in COVERAGES},
        "at 80%, inside": precision_at(ranked.score_N[inside], right[inside], 0.8),
        "risk": risk(ranked.score_N, right),
        "mIoU": float(scores.miou(counts.reshape(n_classes, n_classes))),
    }


@torch.no_grad()
def views_of(model: nn.Module, image_HWC: Tensor, stride: int) -> Views:
    """What the teacher says of the whole image, and of it mirrored and at the two scales, brought back to its pixels."""

    def prob(image: Tensor) -> Tensor:
        return inference.logits_of(model, image, stride).float().softmax(0)[None]

    def scaled(factor: float) -> Tensor:
        height, width = image_HWC.shape[:2]
        planes = image_HWC.permute(2, 0, 1)[None].float()
        size = (round(height * factor), round(width * factor))
        resized = F.interpolate(planes, size, mode="bilinear", antialias=factor < 1, align_corners=False)
        pixels = resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
        return F.interpolate(prob(pixels), (height, width), mode="bilinear", align_corners=False)

    return Views(prob(image_HWC), prob(image_HWC.flip(1)).flip(-1), *(scaled(factor) for factor in SCALES))


def borders(label_HW: Tensor, ignore: int, distance: int = NEAR_BORDER) -> Tensor:
    """Pixels with another class within `distance` (Chebyshev); `ignore` is no class."""
    known = label_HW != ignore
    size = 2 * distance + 1

    def highest(value_HW: Tensor) -> Tensor:
        return F.max_pool2d(value_HW[None].float(), size, stride=1, padding=distance)[0]

    lowest = -highest(torch.where(known, -label_HW, -(1 << 16)))
    return known & (highest(torch.where(known, label_HW, -1)) != lowest)


def pixels_of(model: nn.Module, images: Images, stride: int, ignore: int) -> Iterator[dict[str, Ranked]]:
    """Every image's pixels under every rule."""
    drawn = torch.Generator().manual_seed(0)
    for index in range(len(images)):
        sample = images[index]
        truth_HW = sample.label_HW.long()
        looked_HW = (truth_HW != ignore) & (torch.rand(truth_HW.shape, generator=drawn) < PIXELS)
        where = [truth_HW[looked_HW].numpy(), borders(truth_HW, ignore)[looked_HW].numpy()]
        views = views_of(model, sample.image_HWC, stride)

        found = {"maximum": ranked(s4mc.max_probability(views.plain), views.plain, looked_HW, *where)}
        for name, rule in RULES.items():
            refined = rule(views)
            found[name] = ranked(s4mc.margin(refined), refined, looked_HW, *where)
        yield found


def ranked(
    score_1HW: Tensor, map_1KHW: Tensor, looked_HW: Tensor, truth_N: NDArray[Any], border_N: NDArray[Any]
) -> Ranked:
    """The looked-at pixels of one image; the map's largest class labels them."""
    return Ranked(score_1HW[0][looked_HW].numpy(), truth_N, map_1KHW[0].argmax(0)[looked_HW].numpy(), border_N)


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--every", type=int, default=1, help="look at every n-th unlabelled image")
    parser.add_argument("--out", type=Path, help="a JSON file; the rows of this project are added to it")
    arguments = parser.parse_args()
    params = config.load()
    rows = manifest.read(paths.SPLIT_MANIFEST)
    data = SplitData.read(rows, atomic.read_json(paths.SPLIT_SUMMARY))

    model = segmenter.build(params.model, len(data.classes))
    model.load_state_dict(weights(arguments.weights))
    pool = [row for row in rows if row.split == "unlabelled" and row.mask_shard is not None][:: arguments.every]
    if not pool:
        parser.error("no unlabelled image has a hidden mask: nothing says where the teacher is right")
    images = Images(pool, params.input, ignore=data.ignore, max_pixels=params.ingest.max_pixels)

    parts = list(pixels_of(model.eval(), images, params.input.stride, data.ignore))
    joined = {
        name: Ranked(*map(np.concatenate, zip(*(part[name] for part in parts), strict=True))) for name in parts[0]
    }
    found = {name: told(ranked, len(data.classes)) for name, ranked in joined.items()}

    table = Table("rule", *found["maximum"], title=f"precision in percent of the surest pixels, {len(pool)} images")
    for name, row in found.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    Console(width=140).print(table)
    if arguments.out:
        kept = atomic.read_json(arguments.out) if arguments.out.exists() else {}
        about = {"images": len(pool), "weights": arguments.weights.name, "commit": commit()}
        rounded = {name: {column: round(value, 3) for column, value in row.items()} for name, row in found.items()}
        atomic.write_json(arguments.out, {**kept, str(Path(params.data.path).name): {"about": about, "rules": rounded}})


if __name__ == "__main__":
    main()
