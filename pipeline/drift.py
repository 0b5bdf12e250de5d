"""How far is each later dump from what the model was trained on? Two-sample energy distance with a permutation test.

Twice in the flow, same arithmetic. Before training (`--screen`, reports/screen.json): image descriptors that need no
network (`pipeline.pool.descriptor`), so that a night dump in a day set is flagged before it can do harm. After predict
(reports/drift.json): the student's features, with the shifts of its confidence and class areas.

Reference = labelled images and unlabelled ones of the first dump, `base`. A dump is drifted if p < `pool.drift_p`,
where

- "groups": with known groups on both sides and enough of them that p could get that small, whole groups are
  permuted, since frames of one video are not independent draws;
- "images above group spread": with too few groups for that, images are permuted, and the distance must also exceed
  that of every reference group (of at least 5 images) from the rest of the reference, or each new site would raise
  the alarm;
- "images": without groups, images are permuted.

`reports/screen.pass` lists the dumps that may train, one a line, and nothing else: training depends on that, not
on the numbers beside it.

`pool.policy`: `warn` records the verdict, `hold` also fails the stage, which stops what depends on it.
Source: Szekely and Rizzo, "Testing for equal distributions in high dimension" (InterStat 2004); p = (1 + #{E* >= E})
/ (1 + B).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline import config, files, manifest, pool, progress
from pipeline.pool import Floats, Names, Pool, PoolError

BASE = "base"
PASS = Path("reports/screen.pass")
SIDE = 600  # images of one side that enter the test; more cost time squared and change little
SMALLEST_GROUP = 5
SEED = 0


@dataclass(frozen=True)
class Cloud:
    """Points of images: feature_ND, dump, group ("" where unknown), split."""

    feature_ND: Floats
    dump: Names
    group: Names
    split: Names


@dataclass(frozen=True)
class Finding:
    """One dump against the reference. `spread` is the largest group-to-rest energy of the reference, None if not
    used.
    """

    energy: float
    p: float
    rule: str
    spread: float | None
    drifted: bool
    images: int
    reference: int


def distances(point_ND: Floats) -> Floats:
    """Euclidean N x N, exactly 0 on the diagonal."""
    length = (point_ND**2).sum(1)
    square: Floats = length[:, None] + length[None] - 2 * point_ND @ point_ND.T
    np.fill_diagonal(square, 0.0)  # rounding would leave noise that the root makes large
    np.maximum(square, 0.0, out=square)
    np.sqrt(square, out=square)
    return square


def energies(distance_NN: Floats, member_BN: NDArray[np.bool_]) -> Floats:
    """Energy distance between the members and the others, for each of B labelings: 2 E|X-Y| - E|X-X'| - E|Y-Y'|.

    Every labeling needs a member and an other. Means inside a side are over distinct pairs (0 for a single image), so
    that sides of different size can be compared: equal distributions give about 0, sometimes below.
    """
    z = member_BN.astype(np.float64)
    n = z.sum(1)
    m = z.shape[1] - n
    within = ((z @ distance_NN) * z).sum(1)
    reach = z @ distance_NN.sum(1)
    between = reach - within
    rest = distance_NN.sum() - 2 * reach + within
    pairs = (np.maximum(side * (side - 1), 1.0) for side in (n, m))
    energy: Floats = 2 * between / (n * m) - within / next(pairs) - rest / next(pairs)
    return energy


def _permuted(
    unit_N: NDArray[np.int64], member_N: NDArray[np.bool_], count: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """`count` random labelings that move whole units and keep how many units are members."""
    units = np.unique(unit_N)
    inside = len(np.unique(unit_N[member_N]))
    order = np.argsort(rng.random((count, len(units))), axis=1) < inside
    return order[:, np.searchsorted(units, unit_N)]


def _take(rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= SIDE else np.sort(rng.choice(rows, SIDE, replace=False))


def _fewest(drift_p: float) -> int:
    """Smallest count of permutations whose 1 / (1 + count) is below `drift_p`."""
    count = max(1, math.floor(1 / drift_p) - 2)
    while 1 / (1 + count) >= drift_p:
        count += 1
    return count


def compare(cloud: Cloud, dump: str, settings: config.Pool) -> Finding:
    """The rule of the module's docstring for one dump; seeded.

    Raises:
        PoolError: a side has no image, or too few permutations for any p below `drift_p`.
    """
    if 1 / (1 + settings.permutations) >= settings.drift_p:
        raise PoolError(
            f"pool.permutations {settings.permutations} can flag nothing: the smallest p is 1 / (1 + permutations), "
            f"which is not below pool.drift_p {settings.drift_p:g}; set it to {_fewest(settings.drift_p)} or more"
        )
    rng = np.random.default_rng(SEED)
    is_reference = (cloud.split == "labelled") | (cloud.dump == BASE)
    sides = [_take(np.flatnonzero(mask), rng) for mask in (is_reference, (cloud.dump == dump) & ~is_reference)]
    if not len(sides[0]) or not len(sides[1]):
        raise PoolError(
            f"dump {dump!r}: {len(sides[1])} images against {len(sides[0])} of the reference; nothing to compare"
        )
    rows = np.concatenate(sides)
    member = np.arange(len(rows)) >= len(sides[0])
    spread = cloud.feature_ND[sides[0]].std(0)
    # One scale for all dimensions keeps the descriptor's own weighting; the median keeps a dead dimension from
    # mattering.
    scale = float(np.sqrt((spread**2).sum())) or 1.0
    place = cloud.feature_ND[rows] / scale
    distance = distances(place)
    names = np.array([f"{cloud.dump[i]}\0{cloud.group[i]}" for i in rows])
    units = np.unique(names, return_inverse=True)[1].astype(np.int64)
    grouped = bool((cloud.group[rows] != "").all())
    inside, total = len(np.unique(units[member])), len(np.unique(units))
    many = grouped and math.comb(total, inside) >= 2 / settings.drift_p
    observed = float(energies(distance, member[None])[0])
    moved = units if many else np.arange(len(rows), dtype=np.int64)
    drawn = energies(distance, _permuted(moved, member, settings.permutations, rng))
    p = float((1 + (drawn >= observed - 1e-12).sum()) / (1 + settings.permutations))
    natural = None if many or not grouped else _group_spread(distance, units, member)
    rule = "groups" if many else "images" if natural is None else "images above group spread"
    drifted = p < settings.drift_p and (natural is None or observed > natural)
    return Finding(observed, p, rule, natural, drifted, len(sides[1]), len(sides[0]))


def _group_spread(distance_NN: Floats, units: NDArray[np.int64], member: NDArray[np.bool_]) -> float | None:
    """Largest energy between one reference group and the rest of the reference; None with fewer than two such
    groups.
    """
    inside, own = distance_NN[np.ix_(~member, ~member)], units[~member]
    groups = [u for u in np.unique(own) if (own == u).sum() >= SMALLEST_GROUP]
    if len(groups) < 2:
        return None
    return float(energies(inside, np.stack([own == u for u in groups])).max())


def shifts(seen: Pool, dump: str) -> dict[str, Any]:
    """How the student's own behaviour moves: means of both sides, and the difference in reference standard
    deviations.
    """
    reference = (seen.split == "labelled") | (seen.dump == BASE)
    there = (seen.dump == dump) & ~reference
    values: dict[str, Any] = {}
    for key in ("confidence", "margin", "entropy"):
        ours, theirs = getattr(seen, key)[reference], getattr(seen, key)[there]
        deviation = float(ours.std())
        change = float(theirs.mean() - ours.mean())
        values[key] = {
            "reference": float(ours.mean()),
            "dump": float(theirs.mean()),
            "deviations": change / deviation if deviation else 0.0,
        }
    means = seen.area[reference].mean(0), seen.area[there].mean(0)
    values["area"] = {
        str(name): {"reference": float(a), "dump": float(b)} for name, a, b in zip(seen.classes, *means, strict=True)
    }
    return values


def later_dumps(cloud: Cloud) -> list[str]:
    return [
        d
        for d in dict.fromkeys(map(str, cloud.dump))
        if d != BASE and ((cloud.dump == d) & (cloud.split != "labelled")).any()
    ]


def look(rows: Sequence[manifest.Row], max_pixels: int) -> Cloud:
    """Descriptors of the images that can enter the test (a seeded sample of each side); nothing is read without
    later dumps.
    """
    rows = [row for row in rows if row.split in ("labelled", "unlabelled")]
    columns = [np.array([getattr(r, key) or "" for r in rows], dtype=np.str_) for key in ("dump", "group", "split")]
    whole = Cloud(np.zeros((len(rows), pool.DESCRIPTOR)), *columns)
    dumps = later_dumps(whole)
    rng = np.random.default_rng(SEED)
    reference = (whole.split == "labelled") | (whole.dump == BASE)
    masks = [reference, *((whole.dump == d) & ~reference for d in dumps)] if dumps else []
    kept = [int(i) for mask in masks for i in _take(np.flatnonzero(mask), rng)]
    features = []
    with progress.bar("look at images", len(kept)) as bar:
        for i in kept:
            features.append(pool.descriptor(manifest.open_image(rows[i], max_pixels)))
            bar.advance()
    return Cloud(np.array(features, dtype=np.float64).reshape(len(kept), pool.DESCRIPTOR), *(c[kept] for c in columns))


def picture(cloud: Cloud, findings: dict[str, Finding], path: Path) -> None:
    """Images on the two main axes of the reference's spread, coloured by dump; drifted dumps are crosses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reference = (cloud.split == "labelled") | (cloud.dump == BASE)
    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    if len(cloud.feature_ND) > 1:
        centred = cloud.feature_ND - cloud.feature_ND.mean(0)
        flat = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
        axes.scatter(flat[reference, 0], flat[reference, 1], s=12, color="0.6", label="reference")
        for dump, finding in findings.items():
            here = (cloud.dump == dump) & ~reference
            label = f"{dump}: energy {finding.energy:.3f}, p {finding.p:.3f}"
            axes.scatter(flat[here, 0], flat[here, 1], s=18, marker="x" if finding.drifted else "o", label=label)
        axes.legend()
    axes.set(title="images on their two main axes" if findings else "no later dump to compare")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        canvas: Any = FigureCanvasAgg(figure)
        canvas.print_png(file, metadata={"Software": None})


def run(params: config.Params, screen: bool, console: Console) -> bool:
    """Either stage; False when a drifted dump is held back. The report and picture are written in every case."""
    if screen:
        cloud = look(manifest.read(Path("data/split/manifest.parquet")), params.ingest.max_pixels)
        seen, target = None, Path("reports/screen.json")
    else:
        seen, target = pool.read(), Path("reports/drift.json")
        cloud = Cloud(seen.embedding, seen.dump, seen.group, seen.split)
    findings = {dump: compare(cloud, dump, params.pool) for dump in later_dumps(cloud)}
    drifted = [dump for dump, finding in findings.items() if finding.drifted]
    report = {
        "space": "image descriptor" if screen else "student features",
        "drift_p": params.pool.drift_p, "permutations": params.pool.permutations, "policy": params.pool.policy,
        "dumps": {d: f.__dict__ | ({"shifts": shifts(seen, d)} if seen else {}) for d, f in findings.items()},
        "drifted": drifted, "held": drifted if params.pool.policy == "hold" else [],
    }  # fmt: skip
    picture(cloud, findings, target.with_suffix(".png"))
    files.write_json(target, report)
    if screen:
        PASS.unlink(missing_ok=True)
        if not report["held"]:
            files.write_text(PASS, "".join(f"{dump}\n" for dump in (BASE, *sorted(findings))))
    table = Table("dump", "images", "energy", "p", "rule", "verdict", title=f"drift in {report['space']}")
    for dump, f in findings.items():
        table.add_row(
            dump, str(f.images), f"{f.energy:.4f}", f"{f.p:.4f}", f.rule, "DRIFTED" if f.drifted else "like the rest"
        )
    console.print(table if findings else "drift: only the first dump is there, nothing to compare")
    return not report["held"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 when `pool.policy: hold` keeps a drifted dump back, or the inputs are unusable."""
    parser = argparse.ArgumentParser(description="distance of later dumps from the training data")
    parser.add_argument("--screen", action="store_true", help="before training, from the images alone")
    screen = parser.parse_args(arguments).screen
    problems = Console(stderr=True)
    try:
        passed = run(config.load(), screen, Console())
    except (PoolError, manifest.ManifestError, config.ConfigError) as error:
        problems.print(f"drift: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    if not passed:
        problems.print(
            "drift: held back by pool.policy: hold. Look at the picture beside the report; then either set "
            "pool.policy: warn to go on with the dump, or take it out of dumps.yaml",
            style="red", markup=False, soft_wrap=True,
        )  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
