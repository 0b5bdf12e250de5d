"""4-connected components of equal values in a map, by runs of its rows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Runs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def runs(value_HW: NDArray[Any]) -> Runs:
    """(start, end, component) of every run of equal values within a row; start and end count pixels row by row.

    Runs of one component have the same number, that of one of them.
    """
    flat = value_HW.ravel()
    begins = np.ones(flat.size, bool)
    begins[1:] = flat[1:] != flat[:-1]
    begins[:: value_HW.shape[1]] = True
    start = np.flatnonzero(begins)
    end = np.append(start[1:], flat.size)
    return start, end, _connected(start, end, flat[start], value_HW.shape[1])


def components(value_HW: NDArray[Any]) -> NDArray[np.int64]:
    """Numbers from 0 for the components, H x W."""
    start, end, component = runs(value_HW)
    number = np.unique(component, return_inverse=True)[1].astype(np.int64)
    return np.repeat(number, end - start).reshape(value_HW.shape)


def _connected(start: NDArray[np.int64], end: NDArray[np.int64], value: NDArray[Any], width: int) -> NDArray[np.int64]:
    """For each run (cut at row ends) the number of a run of its region, the same for all of them.

    Runs that touch runs of the row below are joined by taking the smaller number, at both ends and at what these point
    to, until nothing changes (Shiloach and Vishkin 1982, without the parallel machine).
    """
    first = np.searchsorted(end, start + width, side="right")  # the runs below that overlap: end > start + width ...
    last = np.searchsorted(start, end + width, side="left")  # ... and start < end + width
    count = np.maximum(last - first, 0)
    above = np.repeat(np.arange(len(start)), count)
    below = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
    same = value[above] == value[below]
    above, below = above[same], below[same]
    root = np.arange(len(start))
    while True:
        lower = np.minimum(root[above], root[below])
        new = root.copy()
        for place in (above, below, root[above], root[below]):
            np.minimum.at(new, place, lower)
        new = new[new]
        if np.array_equal(new, root):
            return root
        root = new
