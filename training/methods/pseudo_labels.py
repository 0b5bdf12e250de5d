"""Pseudo-labels from outside: masks with confidence that any other model made of unlabelled images (`train.pseudo_labels`).

PATH/NAME.png              class ids of the image called NAME, 255 where it has no label
PATH/confidence/NAME.png   grey, 0..255 = 0..1: what each pixel counts; without the file every pixel counts in full

`marginalia predict --confidence` writes this layout, so an older champion can teach too. PATH/DUMP/NAME.png goes before
PATH/NAME.png, for a name that several dumps have. The method makes pseudo-labels anew at each step; these stand for the
whole training. They have their share of each labelled batch, half of it at most; the true labels have the rest.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import console
from pipeline.imaging import label_maps, resize
from pipeline.records.training import GivenLabels
from pipeline.storage import manifest
from pipeline.storage.manifest import Row
from training.engine.data import Images, Sample

NONE = 255  # a pixel without a label
CONFIDENCE = "confidence"


class Refused(ValueError):
    """A mask that cannot be used; the message names the file, the reason and what to do."""


class Mask(NamedTuple):
    """A pseudo-label: class ids with NONE, and what each pixel counts, 0..255; both uint8 H x W of the image's size."""

    label_HW: NDArray[np.uint8]
    weight_HW: NDArray[np.uint8]


def find(folder: Path, row: Row) -> Path | None:
    """The mask of an image, or None where it has none."""
    names = (Path(row.dump) / f"{row.name}.png", Path(f"{row.name}.png"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read(folder: Path, mask: Path, row: Row, n_classes: int) -> Mask:
    """The mask of an image and its confidence.

    Raises:
        Refused: a file that does not decode, has another size than the image, or class ids that the project has not.
    """
    label_HW = _decoded(mask, row)
    wrong = np.unique(label_HW[(label_HW >= n_classes) & (label_HW != NONE)])
    if wrong.size:
        raise Refused(
            f"{mask}: class id {wrong[0]}, but the project has {n_classes} classes; use ids 0 to {n_classes - 1}, "
            f"and {NONE} for pixels without a label"
        )

    confidence = folder / CONFIDENCE / mask.relative_to(folder)
    if not confidence.is_file():
        return Mask(label_HW, np.full(label_HW.shape, 255, np.uint8))
    return Mask(label_HW, _decoded(confidence, row))


def _decoded(file: Path, row: Row) -> NDArray[np.uint8]:
    try:
        values_HW = label_maps.decode_mask(file.read_bytes(), max_pixels=row.height * row.width)
    except (OSError, ValueError) as error:
        raise Refused(f"{file}: {error}") from error
    if values_HW.shape != (row.height, row.width):
        height, width = values_HW.shape
        raise Refused(
            f"{file}: {width} x {height} pixels, but the image has {row.width} x {row.height}; resize the file"
        )
    if values_HW.dtype != np.uint8:
        raise Refused(f"{file}: 16 bits a pixel; save it with 8")
    return values_HW.astype(np.uint8, copy=False)


class Labelled(Images):
    """Images with pseudo-labels in place of their own; read from the folder each time, so no mask stays in memory."""

    def __init__(self, images: Images, folder: Path, masks: Sequence[Path], n_classes: int) -> None:
        super().__init__(images.rows, images.policy, ignore=images.ignore, max_pixels=images.max_pixels)
        self._folder, self._masks, self._n_classes = folder, list(masks), n_classes

    def __getitem__(self, index: int) -> Sample:
        """Raises what `Images` raises, and Refused where a mask is no longer what it was when training began."""
        image_HWC = super().__getitem__(index).image_HWC
        row = self.rows[index]
        mask = read(self._folder, self._masks[index], row, self._n_classes)

        plan = resize.plan(row.height, row.width, long_side=self.policy.long_side, stride=self.policy.stride)
        height, width = plan.scaled_height, plan.scaled_width
        label_HW = resize.nearest(mask.label_HW, height, width).astype(np.int32)
        label_HW[label_HW == NONE] = self.ignore
        weight_HW = resize.nearest(mask.weight_HW, height, width)
        return Sample(image_HWC, torch.from_numpy(label_HW), torch.from_numpy(weight_HW))


@dataclass(frozen=True)
class Given:
    """What a folder gives: images with pseudo-labels, what was measured of them, reasons of the refused, and a digest of
    all files that were read."""

    images: Labelled
    measured: GivenLabels
    refused: tuple[str, ...]
    digest: str


def given(folder: Path, images: Images, n_classes: int) -> Given:
    """The pseudo-labels of `folder` for `images`, each mask looked at once and measured where its image has a hidden label.

    Raises:
        Refused: no such folder, or no mask in it that can be used.
    """
    if not folder.is_dir():
        raise Refused(f"train.pseudo_labels {folder}: no such folder; it holds NAME.png for each image called NAME")
    rows, masks, refused = list[Row](), list[Path](), list[str]()
    tally, digest = Tally(), hashlib.sha256()

    with console.bar("pseudo-labels", len(images)) as bar:
        for row in images.rows:
            bar.advance(1)
            path = find(folder, row)
            if path is None:
                continue
            try:
                mask = read(folder, path, row, n_classes)
            except Refused as error:
                refused.append(str(error))
                continue
            rows.append(row)
            masks.append(path)
            digest.update(f"{row.dump}/{row.name}".encode())
            digest.update(mask.label_HW.tobytes())
            digest.update(mask.weight_HW.tobytes())
            tally.add(mask, manifest.open_mask(row, images.max_pixels), images.ignore)

    if not rows:
        why = f"the first of {len(refused)} refused: {refused[0]}" if refused else _unmatched(folder, images)
        raise Refused(f"train.pseudo_labels {folder}: no mask for any of {len(images)} unlabelled images; {why}")
    chosen = Images(rows, images.policy, ignore=images.ignore, max_pixels=images.max_pixels)
    measured = tally.measured(len(rows), len(refused))
    return Given(Labelled(chosen, folder, masks, n_classes), measured, tuple(refused), digest.hexdigest())


def _unmatched(folder: Path, images: Images) -> str:
    there = next((str(file.relative_to(folder)) for file in sorted(folder.rglob("*.png"))), "no PNG file")
    wanted = f"{images.rows[0].name}.png" if len(images) else "NAME.png"
    return f"the folder holds {there}, and {wanted} would be one"


class Tally:
    """Pixels of pseudo-labels: all, with a label, and where a hidden label is known, weighted or not, the right ones."""

    def __init__(self) -> None:
        self.pixels = self.labelled = self.known = self.right = 0
        self.known_weight = self.right_weight = 0.0

    def add(self, mask: Mask, hidden_HW: NDArray[np.uint8] | None, ignore: int) -> None:
        """Count one mask against the image's hidden label, if it has one."""
        labelled_HW = mask.label_HW != NONE
        self.pixels += labelled_HW.size
        self.labelled += int(labelled_HW.sum())
        if hidden_HW is None:
            return

        known_HW = labelled_HW & (hidden_HW != ignore)
        right_HW = known_HW & (hidden_HW == mask.label_HW)
        self.known += int(known_HW.sum())
        self.right += int(right_HW.sum())
        self.known_weight += float(mask.weight_HW[known_HW].sum(dtype=np.float64))
        self.right_weight += float(mask.weight_HW[right_HW].sum(dtype=np.float64))

    def measured(self, images: int, refused: int) -> GivenLabels:
        """The shares."""
        return GivenLabels(
            images=images,
            refused=refused,
            coverage=self.labelled / self.pixels,
            precision=self.right / self.known if self.known else None,
            weighted_precision=self.right_weight / self.known_weight if self.known_weight else None,
        )
