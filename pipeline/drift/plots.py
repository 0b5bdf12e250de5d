"""Pictures of a drift: the points on their two main axes, and a page of the images that lie farthest out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.drift.records import Finding
from pipeline.drift.two_sample import Cloud
from pipeline.storage import atomic
from pipeline.storage.predictions import Floats

SHOWN, COLUMNS, SIDE = 24, 6, 180
NEAREST = 5
_LINE = 15


class Far(NamedTuple):
    """Row of the cloud, its dump, and its mean distance from the `NEAREST` images of the reference, in units of what an
    image of the reference has to its own at the median."""

    row: int
    dump: str
    distance: float


def farthest(points: Cloud, dumps: Sequence[str], limit: int = SHOWN) -> list[Far]:
    """Those images of the dumps that are least like any of the reference, the farthest first."""
    reference = np.flatnonzero(points.reference)
    there = np.flatnonzero(~points.reference & np.isin(points.dump, list(dumps)))
    if not len(reference) or not len(there):
        return []
    feature_ND = points.feature_ND
    own = _nearest(feature_ND[reference], feature_ND[reference], itself=True)
    unit = float(np.median(own)) or 1.0
    away = _nearest(feature_ND[there], feature_ND[reference]) / unit
    order = np.argsort(-away, kind="stable")[:limit]
    return [Far(int(there[i]), str(points.dump[there[i]]), float(away[i])) for i in order]


def _nearest(point_ND: Floats, other_MD: Floats, *, itself: bool = False) -> Floats:
    """Mean distance of each point from the nearest of the others; `itself`: the point is among them and does not count."""
    square = (point_ND**2).sum(1)[:, None] + (other_MD**2).sum(1)[None] - 2 * point_ND @ other_MD.T
    sorted_NM = np.sort(np.sqrt(np.maximum(square, 0.0)), axis=1)
    wanted = sorted_NM[:, int(itself) : NEAREST + int(itself)]
    found: Floats = wanted.mean(1) if wanted.shape[1] else np.zeros(len(point_ND))
    return found


def page(
    far: Sequence[Far],
    title: str,
    name: Callable[[int], str],
    open_image: Callable[[int], NDArray[np.uint8]],
    path: Path,
) -> None:
    """A JPEG grid of the images, each with its name and distance; `name` and `open_image` take the cloud's row."""
    rows = max(1, -(-len(far) // COLUMNS))
    cell = SIDE + 2 * _LINE + 8
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 8) + 8, rows * cell + 2 * _LINE if far else 3 * _LINE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((8, 6), title, "black", font)
    for n, item in enumerate(far):
        x, y = 8 + n % COLUMNS * (SIDE + 8), 2 * _LINE + n // COLUMNS * cell
        image = Image.fromarray(open_image(item.row))
        image.thumbnail((SIDE, SIDE))
        sheet.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
        label = f"{item.dump}/{name(item.row)}"
        draw.text((x, y + SIDE + 2), label if len(label) < 29 else f"...{label[-26:]}", "black", font)
        draw.text((x, y + SIDE + 2 + _LINE), f"distance {item.distance:.2f}", "dimgrey", font)
    with atomic.replacing(path) as file:
        sheet.save(file, "JPEG", quality=85)


def axes(points: Cloud, findings: Mapping[str, Finding], path: Path) -> None:
    """Images on the two main axes of all, coloured by dump; drifted dumps are crosses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reference = points.reference
    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    place = figure.add_subplot()
    if len(points.feature_ND) > 1:
        centred = points.feature_ND - points.feature_ND.mean(0)
        flat = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
        place.scatter(flat[reference, 0], flat[reference, 1], s=12, color="0.6", label="reference")
        for dump, finding in findings.items():
            here = (points.dump == dump) & ~reference
            label = f"{dump}: energy {finding.energy:.3f}, p {finding.p:.3f}"
            place.scatter(flat[here, 0], flat[here, 1], s=18, marker="x" if finding.drifted else "o", label=label)
        place.legend()
    place.set(title="images on their two main axes" if findings else "no later dump to compare")
    with atomic.replacing(path) as file:
        canvas: Any = FigureCanvasAgg(figure)
        canvas.print_png(file, metadata={"Software": None})
