"""Which images to label next: those the student doubts where it matters, no two alike, no group favoured.

Per image, doubt = sum over predicted classes of w_c * (1 - refined margin) over all its pixels, w_c = min(4,
sqrt(f_max / f_c)) with f_c the class's share of labelled pixels: a doubtful pixel of a rare class counts up to four
times. From a shortlist by doubt, images are taken greedily by doubt x distance to the nearest labelled or already
taken image in feature space (k-centre, weighted), with at most twice an even share from one group. Pre-labels come
from predict.
"""

import csv
import io
import math
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline import config, files, images, manifest, pool
from pipeline.pool import Floats, Pool, PoolError

SHORTLIST = 4  # candidates per image asked for
RARITY_CAP = 4.0
SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}


@dataclass(frozen=True)
class Choice:
    """Row in the pool, its doubt, and its distance to the nearest labelled or earlier chosen image when it was
    taken.
    """

    index: int
    doubt: float
    distance: float


def label_frequency(summary: Mapping[str, Any], classes: Sequence[str]) -> Floats:
    """Share of labelled pixels per class from data/split/summary.json; all zero when nothing is labelled."""
    pixels = summary.get("pixels", {}).get("labelled", {})
    ids = {c["name"]: str(c["id"]) for c in summary["classes"]}
    counts = np.array([float(pixels.get(name, pixels.get(ids[name], 0))) for name in classes])
    share: Floats = counts / max(counts.sum(), 1.0)
    return share


def rarity(frequency_K: Floats) -> Floats:
    """w_c of the module's docstring; a class without labels has the cap, and all are 1 when nothing is labelled."""
    if not frequency_K.any():
        return np.ones_like(frequency_K)
    with np.errstate(divide="ignore"):
        weight: Floats = np.minimum(RARITY_CAP, np.sqrt(frequency_K.max() / frequency_K))
    return weight


def doubt(seen: Pool, frequency_K: Floats) -> Floats:
    """Rarity-weighted mean of 1 - refined margin per image: N, >= 0."""
    weighted: Floats = seen.doubt @ rarity(frequency_K)
    return weighted


def _by_doubt(seen: Pool, doubt_N: Floats) -> list[int]:
    """Unlabelled rows, most doubtful first; ties by id, so that the order of files decides nothing."""
    rows = np.flatnonzero(seen.split == "unlabelled")
    return [int(i) for i in sorted(rows, key=lambda i: (-doubt_N[i], str(seen.id[i])))]


def _cap(seen: Pool, rows: Sequence[int], count: int) -> int:
    """Most images one group may give: twice an even share; no limit where there are fewer than two groups."""
    groups = {str(seen.group[i]) for i in rows} - {""}
    return max(1, math.ceil(2 * count / len(groups))) if len(groups) > 1 else count


def shortlist(seen: Pool, frequency_K: Floats, count: int) -> list[int]:
    """The 4 x `count` most doubtful unlabelled rows, at most 4 x the group cap from one group (filled up if that is
    too few).
    """
    ordered = _by_doubt(seen, doubt(seen, frequency_K))
    most = SHORTLIST * _cap(seen, ordered, count)
    taken: Counter[str] = Counter()
    within: list[int] = []
    beyond: list[int] = []
    for i in ordered:
        group = str(seen.group[i])
        (within if not group or taken[group] < most else beyond).append(i)
        taken[group] += 1
    return (within + beyond)[: SHORTLIST * count]


def choose(seen: Pool, frequency_K: Floats, count: int) -> list[Choice]:
    """Up to `count` rows to label, in the order they were taken. Deterministic.

    Distances are Euclidean between embeddings scaled to unit variance per dimension over the pool. The group cap is
    lifted only when every group has reached it and images are still wanted.
    """
    doubt_N = doubt(seen, frequency_K)
    rows = np.array(shortlist(seen, frequency_K, count), dtype=int)
    if not rows.size:
        return []
    spread = seen.embedding.std(0)
    place = seen.embedding / np.where(spread > 0, spread, 1.0)
    known = place[seen.split == "labelled"]
    nearest = np.full(len(rows), np.inf)
    for one in known:
        nearest = np.minimum(nearest, np.linalg.norm(place[rows] - one, axis=1))
    most = _cap(seen, list(rows), count)
    taken: Counter[str] = Counter()
    free = np.ones(len(rows), bool)
    choices: list[Choice] = []
    while len(choices) < min(count, len(rows)):
        open_ = free & np.array([not seen.group[i] or taken[str(seen.group[i])] < most for i in rows])
        if not open_.any():
            open_ = free
        # Without any labelled image the first one is simply the most doubtful.
        gain = doubt_N[rows] * (nearest if np.isfinite(nearest).all() else 1.0)
        best = int(np.argmax(np.where(open_, gain, -1.0)))
        distance = float(nearest[best]) if np.isfinite(nearest[best]) else 0.0
        choices.append(Choice(int(rows[best]), float(doubt_N[rows[best]]), distance))
        free[best] = False
        taken[str(seen.group[rows[best]])] += 1
        nearest = np.minimum(nearest, np.linalg.norm(place[rows] - place[rows[best]], axis=1))
    return choices


def export_names(names: Sequence[str], dumps: Sequence[str]) -> list[str]:
    """File names without extension inside label_next; a name that occurs twice gets its dump as a folder."""
    often = Counter(names)
    return [name if often[name] == 1 else f"{dump}/{name}" for name, dump in zip(names, dumps, strict=True)]


def write_folder(
    folder: Path, choices: Sequence[Choice], seen: Pool, rows: Mapping[str, manifest.Row], prelabels: Path
) -> None:
    """images/, masks/ (pre-labels) and classes.txt, as the `folder` source reads them; replaces the folder as a whole.

    Raises:
        PoolError: a chosen image has no pre-label or no row, because predict and rank saw different data.
    """
    chosen = [c.index for c in choices]
    names = export_names([str(seen.name[i]) for i in chosen], [str(seen.dump[i]) for i in chosen])
    with files.replacing_folder(folder) as fresh, tarfile.open(prelabels) as archive:
        masks = {member.name: member for member in archive}
        for i, name in zip(chosen, names, strict=True):
            id = str(seen.id[i])
            member = masks.get(f"{id}.png")
            if member is None or id not in rows:
                raise PoolError(f"image {seen.name[i]} has no pre-label in {prelabels}; run the predict stage again")
            data = manifest.read_image_bytes(rows[id])
            stream = archive.extractfile(member)
            assert stream is not None
            files.write_bytes(fresh / "images" / f"{name}.{SUFFIX[images.probe(data)[0]]}", data)
            files.write_bytes(fresh / "masks" / f"{name}.png", stream.read())
        files.write_text(fresh / "classes.txt", "".join(f"{name}\n" for name in seen.classes))


def table_csv(choices: Sequence[Choice], seen: Pool) -> str:
    """rank.csv: place, id, name, dump, group, doubt, distance, mean refined margin and the most doubted class."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(("place", "id", "name", "dump", "group", "doubt", "distance", "margin", "most_doubted"))
    for place, c in enumerate(choices, 1):
        i = c.index
        row = (seen.id[i], seen.name[i], seen.dump[i], seen.group[i], f"{c.doubt:.6f}", f"{c.distance:.4f}")
        out.writerow((place, *row, f"{seen.margin[i]:.6f}", seen.classes[int(np.argmax(seen.doubt[i]))]))
    return text.getvalue()


def run(params: config.Params, console: Console) -> None:
    """The stage: data/pool and data/split -> reports/rank.csv and reports/label_next/. Raises PoolError."""
    seen = pool.read()
    summary = files.read_json(Path("data/split/summary.json"))
    choices = choose(seen, label_frequency(summary, list(map(str, seen.classes))), params.pool.label_next)
    rows = {row.id: row for row in manifest.read(Path("data/split/manifest.parquet"))}
    write_folder(Path("reports/label_next"), choices, seen, rows, pool.PRELABELS)
    files.write_text(Path("reports/rank.csv"), table_csv(choices, seen))
    table = Table("", "image", "group", "doubt", "most doubted class", title="label these next: reports/label_next")
    for place, c in enumerate(choices[:10], 1):
        doubted = str(seen.classes[int(np.argmax(seen.doubt[c.index]))])
        table.add_row(str(place), str(seen.name[c.index]), str(seen.group[c.index]), f"{c.doubt:.3f}", doubted)
    if len(choices) > 10:
        table.caption = f"and {len(choices) - 10} more in reports/rank.csv"
    console.print(table)


def main() -> int:
    try:
        run(config.load(), Console())
    except (PoolError, manifest.ManifestError, config.ConfigError) as error:
        Console(stderr=True).print(f"rank: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
