"""What training takes of a card's memory, estimated on a CPU without training: one row for each preset.

    python benchmarks/memory.py [PRESET ...] [--classes 21]

Counted: what autograd saves in one forward pass with its loss, measured on two small images and scaled by pixels and
images; weights, gradients, AdamW's two moments and the teacher, at 4 bytes a number. bf16 halves what the network saves,
not the loss, and adds a bf16 copy of the weights. Not counted: CUDA's context (about 0.5 GB), convolution workspaces,
the teacher's own pass, CorrMatch's correlation maps, the allocator's gaps. Leave a fifth free.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import config
from pipeline.config import presets
from training.methods import registry
from training.models import segmenter

ROOT = Path(__file__).parents[1]
GB = 1e9


class Activations(NamedTuple):
    """Bytes saved for the backward pass in fp32 for one image: by the encoder, the decoder, the loss."""

    encoder: float
    decoder: float
    loss: float


class Images(NamedTuple):
    """Images in one micro-batch of the student: through the whole network, and again through the decoder alone."""

    whole: int
    decoded_again: int


def network(model: config.Model, n_classes: int = 21) -> segmenter.Segmenter:
    """The network with random weights: nothing is read or fetched."""
    return segmenter.build(model, n_classes, load_weights=False)


def activations(model: config.Model, n_classes: int, size: tuple[int, int]) -> Activations:
    """Measured in train mode on two images of `size` (H, W), which BatchNorm needs; per image."""
    torch.manual_seed(0)
    net = network(model, n_classes).train()
    own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}
    seen: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    totals = [0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        image = torch.rand(2, 3, *size) * 255
        features = net.encode(image)
        totals.append(sum(seen.values()))
        logits = net.decode(features, size)
        totals.append(sum(seen.values()))
        loss = F.cross_entropy(logits, torch.zeros(2, *size, dtype=torch.long))
        totals.append(sum(seen.values()))
    del loss  # the graph had to live until here: a freed address would be counted as one already seen
    return Activations(*((after - before) / 2 for before, after in pairwise(totals)))


def fixed(net: segmenter.Segmenter) -> int:
    """Bytes that do not depend on the batch: weights, gradients and AdamW's moments where they train, the teacher."""
    weights = sum(value.numel() for value in net.state_dict().values())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return 4 * (2 * weights + 3 * trained)


def images(train: config.Train, n_classes: int) -> Images:
    method = registry.build(train, n_classes=n_classes, total=1, epoch_steps=1)
    one = train.batch_unlabelled // train.accumulate
    whole = train.batch_labelled // train.accumulate
    if method.threshold is None:
        return Images(whole, 0)
    again = one if method.feature_dropout == "perturb" else 0
    return Images(whole + one * (method.streams + method.weak), again)


def row(name: str, n_classes: int) -> tuple[str, ...]:
    """One preset's line of the table."""
    params = config.parse(presets.compose(name, ROOT / "params.yaml"))
    net = network(params.model, n_classes)
    side = net.step * max(2, 112 // net.step)
    saved = activations(params.model, n_classes, (side, side))
    height, width = params.train.crop
    count, scale = images(params.train, n_classes), height * width / side**2
    passes = scale * (count.whole * (saved.encoder + saved.decoder) + count.decoded_again * saved.decoder)
    losses = scale * (count.whole + count.decoded_again) * saved.loss
    still, weights = fixed(net), sum(p.numel() for p in net.parameters())
    values = (passes + losses, still, passes + losses + still, passes / 2 + losses + still + 2 * weights)
    again = f"+{count.decoded_again}" if count.decoded_again else ""
    return (
        name, params.model.encoder, f"{weights / 1e6:.1f}", params.train.method, f"{height}x{width}",
        f"{count.whole}{again}", *(f"{value / GB:.1f}" for value in values),
    )  # fmt: skip


HEAD = ("preset", "encoder", "M weights", "method", "crop", "images", "saved GB", "fixed GB", "fp32 GB", "bf16 GB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="*", default=presets.names())
    parser.add_argument("--classes", type=int, default=21)
    args = parser.parse_args()
    rows = [HEAD, *(row(name, args.classes) for name in args.preset)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print(
            "  ".join(c.ljust(w) if i < 5 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        )
    print(
        "images: of one micro-batch through the student (+: through its decoder once more); fp32, bf16: saved + fixed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
