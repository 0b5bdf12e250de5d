"""Images of the split manifest as tensors, in an order that is a pure function of (seed, position)."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Input
from pipeline.imaging import resize
from pipeline.storage import manifest
from pipeline.storage.manifest import Row
from training.reader.order import order

CACHE_BYTES = 2 << 30


class ReadError(RuntimeError):
    """An image or mask of the split could not be read; the message names it and gives the cause."""


@dataclass(frozen=True)
class Sample:
    """image_HWC uint8 RGB at working size (not padded); label_HW int32 with `ignore` where unknown.

    weight_HW: what each labelled pixel counts, uint8 with 255 for in full; None: all in full.
    """

    image_HWC: Tensor
    label_HW: Tensor
    weight_HW: Tensor | None = None


class Images:
    """Random access to rows of the manifest, decoded and scaled by the input policy, kept in memory while they fit."""

    def __init__(self, rows: Sequence[Row], policy: Input, *, ignore: int, max_pixels: int, cache: int = CACHE_BYTES):
        self.rows = list(rows)
        self.policy, self.ignore, self.max_pixels = policy, ignore, max_pixels
        self._kept: dict[int, Sample] = {}
        self._room = cache

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Raises manifest.ManifestError where the data changed since ingest, ReadError for whatever else goes wrong."""
        if (kept := self._kept.get(index)) is not None:
            return kept
        row = self.rows[index]
        try:
            sample = self._read(row)
        except manifest.ManifestError:
            raise  # names the image
        except Exception as error:
            cause = f"{type(error).__name__} {error}".rstrip()
            raise ReadError(f"{row.shard} ({row.dump}/{row.name}) cannot be read: {cause}") from error
        size = sample.image_HWC.nbytes + sample.label_HW.nbytes
        if size <= self._room:
            self._kept[index] = sample
            self._room -= size
        return sample

    def _read(self, row: Row) -> Sample:
        image = manifest.open_image(row, self.max_pixels)  # verified against the manifest's hash
        label = manifest.open_mask(row, self.max_pixels)
        plan = resize.plan(*image.shape[:2], long_side=self.policy.long_side, stride=self.policy.stride)
        height, width = plan.scaled_height, plan.scaled_width
        scaled = torch.from_numpy(np.ascontiguousarray(resize.apply(image, plan)[:height, :width]))
        if label is None:
            return Sample(scaled, torch.full((height, width), self.ignore, dtype=torch.int32))
        placed = resize.apply_mask(label, plan, ignore=self.ignore)[:height, :width]
        return Sample(scaled, torch.from_numpy(placed.astype(np.int32)))


@dataclass(frozen=True)
class Batch:
    """One step's samples before cropping; `unlabelled` is empty for steps that train on labels alone."""

    labelled: list[Sample]
    unlabelled: list[Sample]
    names: list[str]


class Batches:
    """The batch of any step, with the next one being read while this one trains."""

    def __init__(
        self, labelled: Images, unlabelled: Images, sizes: tuple[int, int], seed: int, rank: int = 0, world: int = 1,
        given: Images | None = None,
    ) -> None:  # fmt: skip
        if not len(labelled):
            raise ValueError(
                "the split has no labelled training image; add masks under masks/ or check data.lists.labelled in params.yaml"
            )
        self.labelled, self.unlabelled, self.sizes, self.seed = labelled, unlabelled, sizes, seed
        # Labels from outside: part of each labelled batch.
        self.given = given if given is not None and len(given) else None
        self.rank, self.world = rank, world  # each rank takes its own stretch of one common order
        self._reader = ThreadPoolExecutor(1)
        self._next: tuple[int, bool, Future[Batch]] | None = None

    def _read(self, step: int, with_unlabelled: bool) -> Batch:
        n_labelled, n_unlabelled = self.sizes
        turn = step * self.world + self.rank
        n_given = 0
        if self.given is not None:  # their share, and half at most
            share = len(self.given) / (len(self.given) + len(self.labelled))
            n_given = min(n_labelled // 2, round(n_labelled * share))
        n_true = n_labelled - n_given
        first = order(len(self.labelled), 2 * self.seed, turn * n_true, n_true)
        third, second = list[int](), list[int]()
        if self.given is not None:
            third = order(len(self.given), self.seed, turn * n_given, n_given, stream=1)
        if with_unlabelled:
            second = order(len(self.unlabelled), 2 * self.seed + 1, turn * n_unlabelled, n_unlabelled)
        parts = [(self.labelled, first), (self.given or self.labelled, third), (self.unlabelled, second)]
        names = [images.rows[i].name for images, chosen in parts for i in chosen]
        true, made, without = ([images[i] for i in chosen] for images, chosen in parts)
        return Batch(true + made, without, names)

    def get(self, step: int, with_unlabelled: bool, next_with: bool) -> Batch:
        """The batch of `step`; starts reading step + 1 (with unlabelled images if `next_with`)."""
        waiting, self._next = self._next, None
        if waiting is not None and waiting[:2] == (step, with_unlabelled):
            batch = waiting[2].result()
        else:
            batch = self._read(step, with_unlabelled)
        self._next = (step + 1, next_with, self._reader.submit(self._read, step + 1, next_with))
        return batch

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
