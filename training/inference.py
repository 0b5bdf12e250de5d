"""Rows of the manifest through a network the way a request goes: decode, `resize.apply`, network, arg max and confidence.

Evaluation, parity and prediction share this. Batches are planned once, from sizes alone, and are never padded with
copies: the same batches run whatever the number of processes, so each image is answered exactly once and by the same
arithmetic.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import config
from pipeline.imaging import resize
from pipeline.storage import manifest


class MaskError(ValueError):
    """An image that must be scored has no mask; the message names it."""


@dataclass(frozen=True)
class Sample:
    """One decoded image: as it came, as the network takes it, and its mask if asked for."""

    row: manifest.Row
    fit: resize.Fit
    image_HWC: NDArray[np.uint8]
    input_HWC: NDArray[np.uint8]
    truth_HW: NDArray[np.uint8] | None


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def answer(logits_BKHW: Tensor) -> tuple[Tensor, Tensor]:
    """Logits -> label_BHW and confidence_BHW (round(255 * highest probability), half to even), both uint8.

    The cast goes through float32 because TensorRT documents only that way to uint8; the export traces this very
    function.
    """
    probability, label = torch.softmax(logits_BKHW.float(), dim=1).max(dim=1)
    return label.to(torch.float32).to(torch.uint8), torch.round(probability * 255).to(torch.uint8)


def plan_batches(rows: Iterable[manifest.Row], policy: config.Input, size: int) -> list[list[manifest.Row]]:
    """Rows grouped by padded input shape, then cut into batches of at most `size`; depends on the rows only."""
    shapes: dict[tuple[int, int], list[manifest.Row]] = {}
    for row in rows:
        plan = resize.plan(row.height, row.width, long_side=policy.long_side, stride=policy.stride)
        shapes.setdefault((plan.padded_height, plan.padded_width), []).append(row)
    return [same[i : i + size] for same in shapes.values() for i in range(0, len(same), size)]


def shard(batches: Sequence[list[manifest.Row]], rank: int, world: int) -> list[list[manifest.Row]]:
    """The whole batches of one process: every image once over all ranks, nothing repeated to even the counts out."""
    return list(batches[rank::world])


def read(row: manifest.Row, policy: config.Input, max_pixels: int, *, mask: bool) -> Sample:
    """Decode one row. Raises MaskError or ManifestError when it cannot be; both name the image."""
    image = manifest.open_image(row, max_pixels)
    plan = resize.plan(*image.shape[:2], long_side=policy.long_side, stride=policy.stride)
    truth = None
    if mask:
        truth = manifest.open_mask(row, max_pixels)
        if truth is None:
            raise MaskError(
                f"image {row.name!r} of split {row.split!r} has no mask; only labelled images can be scored"
            )
    return Sample(row, plan, image, resize.apply(image, plan), truth)


def stream(
    batches: Sequence[list[manifest.Row]], policy: config.Input, max_pixels: int, *, mask: bool, workers: int = 2
) -> Iterator[list[Sample]]:
    """Decoded batches in order; threads decode the next one while the caller works on this one."""
    with ThreadPoolExecutor(workers) as pool:

        def submit(batch: list[manifest.Row]) -> list[Any]:
            return [pool.submit(read, row, policy, max_pixels, mask=mask) for row in batch]

        ahead = submit(batches[0]) if batches else []
        for i in range(len(batches)):
            waiting, ahead = ahead, submit(batches[i + 1]) if i + 1 < len(batches) else []
            yield [future.result() for future in waiting]


def to_network(samples: Sequence[Sample], where: torch.device) -> Tensor:
    """Equal padded inputs -> image_BCHW float32 in 0..255."""
    image_BHWC = torch.from_numpy(np.stack([s.input_HWC for s in samples])).to(where)
    return image_BHWC.to(torch.float32).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def logits_of(model: nn.Module, image_HWC: Tensor, stride: int) -> Tensor:
    """logits_KHW of one uint8 image at working scale and of any size: padded as a request is, then cut back."""
    height, width = image_HWC.shape[:2]
    where = next(model.parameters()).device
    image_BCHW = image_HWC.to(where).permute(2, 0, 1)[None].float()
    padded = F.pad(image_BCHW, (0, -width % stride, 0, -height % stride), mode="replicate")
    logits_KHW: Tensor = model(padded)[0, :, :height, :width]
    return logits_KHW


@torch.inference_mode()
def segment(
    model: nn.Module, samples: Sequence[Sample], where: torch.device
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Label and confidence on the padded working grid, uint8 B x h x w."""
    label, confidence = answer(model(to_network(samples, where)))
    return label.cpu().numpy(), confidence.cpu().numpy()
