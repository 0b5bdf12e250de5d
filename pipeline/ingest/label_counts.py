"""What pull's masks hold: pixels of each class, masks that cannot be used, and whether that is enough to go on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.common.source import SourceError
from pipeline.imaging import decode, label_maps

REASONS = 3  # shown when a source is refused as a whole


@dataclass
class LabelCounts:
    """Pixels by id over all masks that can be used, and the others by name with their reason."""

    classes: int
    pixels_K: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    ids: set[int] = field(default_factory=set)  # of all masks, also of those that cannot be used; 255 apart
    usable: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, data: bytes, max_pixels: int) -> None:
        """Count one mask; what is wrong with it is remembered, and ingest refuses it with the same reason."""
        try:
            ids_HW = label_maps.decode_mask(data, max_pixels=max_pixels)
        except decode.Refused as error:
            self.refused.append((name, str(error)))
            return
        counts = np.bincount(ids_HW.ravel(), minlength=256)
        found = [int(k) for k in np.flatnonzero(counts) if k not in (255, 65535)]
        self.ids.update(found)
        if alien := [k for k in found if k >= self.classes]:
            self.refused.append((name, f"ids outside 0..{self.classes - 1}: {', '.join(map(str, alien[:5]))}"))
        elif not found:
            self.refused.append((name, "every pixel is ignored"))
        else:
            self.usable += 1
            self.pixels_K += counts[:256]

    def shares(self, classes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """Each class's share of the labelled pixels, and of ignored ones among all, as rows of a table."""
        labelled = max(1, int(self.pixels_K[: self.classes].sum()))
        rows = [(f"pixels: {c['name']}", f"{100 * self.pixels_K[c['id']] / labelled:.2f} %") for c in classes]
        ignored = 100 * self.pixels_K[label_maps.IGNORE] / max(1, int(self.pixels_K.sum()))
        return [*rows, ("pixels: ignored", f"{ignored:.2f} % of all")]

    def absent(self, classes: Sequence[Mapping[str, Any]]) -> list[str]:
        """The classes without a pixel in any usable mask."""
        return [str(c["name"]) for c in classes if not self.pixels_K[c["id"]]]


def demand_images(images: int, refused: Sequence[tuple[str, str]], where: str) -> None:
    """Raises SourceError where not one image can be taken; `refused` are (name, reason) of what was not."""
    if not images:
        raise SourceError(f"{where}: not one image can be used{_reasons(refused)}")


def demand_labels(counts: LabelCounts, refused: Sequence[tuple[str, str]], where: str) -> None:
    """Raises SourceError where not one mask can be used; `refused` as in `demand_images`, for masks and labels."""
    if counts.usable:
        return
    hint = ""
    if counts.ids and min(counts.ids) >= 1 and max(counts.ids) == counts.classes:
        hint = (
            f"; the ids run from {min(counts.ids)} to {counts.classes}, and {counts.classes} classes have the ids 0 to "
            f"{counts.classes - 1}: put a line for id 0, such as `background`, before the others"
        )
    raise SourceError(f"{where}: not one label can be used, so there is nothing to learn from{_reasons(refused)}{hint}")


def demand_classes(absent: Sequence[str], listed_in: str | None, policy: str, where: str) -> None:
    """Raises SourceError where a class of a class list has no pixel anywhere.

    Args:
        listed_in: the class list; None where the labels themselves named the classes, some of which nobody drew.
        policy: `data.missing_classes`: stop or allow.
    """
    if absent and listed_in is not None and policy == "stop":
        raise SourceError(
            f"{where}: no pixel in any mask for {', '.join(repr(name) for name in absent[:8])}"
            f"{', ...' * (len(absent) > 8)} of {listed_in}: it cannot be learnt. Correct the list or the masks; if the class "
            "is meant to come later, set data.missing_classes: allow"
        )


def _reasons(refused: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f"\n  {name}: {reason}" for name, reason in refused[:REASONS])
    return f" ({len(refused)} refused):{shown}" if refused else ""
