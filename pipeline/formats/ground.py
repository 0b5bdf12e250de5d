"""Which georeferenced images show the same ground: two years of one site must not stand on two sides of a split."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Place(NamedTuple):
    """Where an image or a tile lies: its box in the units of its projection, and the sides of a pixel there."""

    crs: str
    west: float
    south: float
    east: float
    north: float
    pixel_x: float
    pixel_y: float


def place(dataset: Any, window: tuple[int, int, int, int] | None = None) -> Place | None:
    """The box around an open rasterio dataset, or around a window (first row, first column, rows, columns) of it.

    Returns:
        None without a georeference. A projection that is not named is one of its own.
    """
    transform = dataset.transform
    if transform.is_identity:
        return None
    row, column, height, width = window or (0, 0, dataset.height, dataset.width)
    corners = [(x, y) for x in (column, column + width) for y in (row, row + height)]
    xs = [transform.a * x + transform.b * y + transform.c for x, y in corners]
    ys = [transform.d * x + transform.e * y + transform.f for x, y in corners]
    pixel = (abs(transform.a) + abs(transform.b), abs(transform.d) + abs(transform.e))
    return Place(str(dataset.crs or ""), min(xs), min(ys), max(xs), max(ys), *pixel)


def joined(places: Mapping[str, Place | None]) -> dict[str, str]:
    """Name -> the first name, in alphabetical order, of all that are connected to it by overlaps in one projection.

    Boxes that share a line of pixels or less, as neighbouring sheets do, do not overlap.
    """
    first = {name: name for name in places}

    def root(name: str) -> str:
        while first[name] != name:
            first[name] = first[first[name]]
            name = first[name]
        return name

    by_crs: dict[str, dict[str, Place]] = {}
    for name, where in places.items():
        if where is not None:
            by_crs.setdefault(where.crs, {})[name] = where
    for same in by_crs.values():
        for one, other in _overlaps(same):
            low, high = sorted((root(one), root(other)))
            first[high] = low
    return {name: root(name) for name in places}


def _overlaps(places: Mapping[str, Place]) -> Iterator[tuple[str, str]]:
    """Pairs of boxes that overlap by more than a pixel. Each is compared with those that begin before its eastern side."""
    names = sorted(places, key=lambda name: places[name].west)
    box_NC: NDArray[np.float64] = np.array([places[name][1:] for name in names], np.float64)
    west, south, east, north, pixel_x, pixel_y = box_NC.T
    ends = np.searchsorted(west, east)
    for here, end in enumerate(ends.tolist()):
        later = slice(here + 1, end)
        x = np.minimum(east[here], east[later]) - west[later]
        y = np.minimum(north[here], north[later]) - np.maximum(south[here], south[later])
        # half a pixel more, because coordinates are rounded
        over = (x > 1.5 * np.minimum(pixel_x[here], pixel_x[later])) & (
            y > 1.5 * np.minimum(pixel_y[here], pixel_y[later])
        )
        yield from ((names[here], names[here + 1 + int(n)]) for n in np.flatnonzero(over))


def groups(
    parents: Mapping[str, str], images: Mapping[str, Place | None], tiles: Mapping[str, Place | None]
) -> tuple[dict[str, str], list[str]]:
    """The groups of tiles, and what was decided.

    A tile's group is its image, and images that overlap on the ground are one group. Where that leaves one group, which says
    nothing, tiles that lie on the same ground are a group.

    Args:
        parents: tile -> image. images, tiles: where each lies.
    """
    of_image = joined(images)
    names = set(of_image.values())
    if len(names) > 1:
        together = sorted(name for name, group in of_image.items() if name != group)
        notes = []
        if together:
            pair = f"{together[0]} is of the group {of_image[together[0]]}"
            notes.append(
                f"GeoTIFFs that overlap another one on the ground and share its group: {len(together)}, the first: {pair}"
            )
        return {tile: of_image[parent] for tile, parent in parents.items()}, notes
    if not names:
        return {}, []
    what = "all GeoTIFFs overlap on the ground" if len(images) > 1 else "there is one GeoTIFF"
    note = (
        f"{what}: tiles of the same ground are a group, and tiles beside each other may stand on two sides of the split"
    )
    return joined(tiles), [f"{note}; data.lists or data.group say it better"]
