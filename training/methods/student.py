"""What trains: the segmenter, CorrMatch's head where it is used, and every view of a step in one forward pass.

One pass per step keeps BatchNorm's statistics in one place, lets several processes average gradients in one go, and
leaves nothing to wait for between views: mixed images never depend on the pseudo-labels.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.methods import corrmatch
from training.methods.registry import Method


class NoFeatures(ValueError):
    """The method needs feature maps and the user's own network gives only logits."""


class Rows(NamedTuple):
    """How many images of each kind the batch holds, in this order: labelled, weak, then `streams` strong views."""

    labelled: int
    weak: int = 0
    strong: int = 0
    streams: int = 0

    def split(self, value: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        labelled, weak, rest = value.split([self.labelled, self.weak, self.strong * self.streams])
        return labelled, weak, list(rest.chunk(self.streams)) if self.streams else []


class Outputs(NamedTuple):
    """Logits at image size: labelled, weak (may hold no rows), each strong view, and what the method asked for besides.

    perturbed: the weak views decoded from features with dropped channels. corr: CorrMatch's propagated
    logits of [labelled; weak; strong]. embeddings: of the weak views, detached.
    """

    labelled: Tensor
    weak: Tensor
    strong: list[Tensor]
    perturbed: Tensor | None = None
    corr: tuple[Tensor, Tensor, list[Tensor]] | None = None
    embeddings: corrmatch.Embeddings | None = None


def drop_channels(features: list[Tensor], p: float = 0.5) -> list[Tensor]:
    """UniMatch's feature perturbation: whole channels to zero with probability p, the rest scaled by 1 / (1 - p)."""
    return [F.dropout2d(f, p, training=True) for f in features]


def spared(n: int, generator: torch.Generator) -> Tensor:
    """spared_B, bool on the CPU: which random n // 2 of n samples `complementary` leaves whole."""
    return torch.rand(n, generator=generator).argsort() < n // 2


def complementary(features: list[Tensor], rows: Rows, spared_B: Tensor) -> list[Tensor]:
    """UniMatch V2's dropout on the two strong streams: 2 x Bernoulli(0.5) per sample and channel, and 2 minus that.

    Samples in `spared_B` keep all channels in both streams: half of a whole batch (`spared`), however many of them fall into
    this micro-batch. The rows before the strong ones pass unchanged.
    """
    first, n = rows.labelled + rows.weak, rows.strong
    out = []
    for feature in features:
        mask = 2.0 * (torch.rand(n, feature.shape[1], device=feature.device) < 0.5)
        mask = torch.where(spared_B[:, None], 1.0, mask)
        other = torch.where(spared_B[:, None], 1.0, 2.0 - mask)
        factor = torch.cat([torch.ones(first, feature.shape[1], device=feature.device), mask, other])
        out.append(feature * factor[:, :, None, None].to(feature.dtype))
    return out


class Student(nn.Module):
    """A network and, for CorrMatch, its correlation head.

    Args:
        model: image_BCHW -> logits_BKHW; with `has_features` also encode and decode (`models.Segmenter`).
        head: correlate.Head on the deepest feature, or None.
    """

    def __init__(self, model: nn.Module, head: corrmatch.Head | None = None) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(
        self,
        image_NCHW: Tensor,
        rows: Rows,
        dropout: Literal["none", "perturb", "complementary"] = "none",
        spared_B: Tensor | None = None,
    ) -> Outputs:
        """image_NCHW: rows as `rows` says. With dropout or a head the network must have features (`student_of`).

        spared_B: for complementary dropout, which strong samples it leaves whole.
        """
        if dropout == "none" and self.head is None:
            return Outputs(*rows.split(self.model(image_NCHW)))
        model: Any = self.model
        size = image_NCHW.shape[-2:]
        features = model.encode(image_NCHW)
        if dropout == "complementary":
            assert spared_B is not None
            features = complementary(features, rows, spared_B)
        perturbed = None
        if dropout == "perturb":
            weak = [f[rows.labelled : rows.labelled + rows.weak] for f in features]
            both = [torch.cat(pair) for pair in zip(features, drop_channels(weak), strict=True)]
            logits, perturbed = model.decode(both, size).split([len(image_NCHW), rows.weak])
        else:
            logits = model.decode(features, size)
        if self.head is None:
            return Outputs(*rows.split(logits), perturbed)
        deep = features[-1]
        one, two = self.head(deep)
        grid = (int(deep.shape[-2]), int(deep.shape[-1]))
        value = F.interpolate(logits.detach().float(), deep.shape[-2:], mode="bilinear", align_corners=True)
        spread = corrmatch.propagate(one, two, value.flatten(2)).unflatten(2, deep.shape[-2:])
        corr = corrmatch.upsample(spread, (int(size[0]), int(size[1])))
        _, one_weak, _ = rows.split(one.detach())
        _, two_weak, _ = rows.split(two.detach())
        return Outputs(*rows.split(logits), perturbed, rows.split(corr), corrmatch.Embeddings(one_weak, two_weak, grid))


def student_of(model: nn.Module, method: Method, n_classes: int) -> Student:
    """The network with the head that the method asks for. Raises NoFeatures where the network hides its features."""
    needs = method.correlation is not None or method.feature_dropout != "none"
    if needs and not getattr(model, "has_features", False):
        raise NoFeatures(
            f"train.method needs feature maps and {type(model).__name__} gives logits only; choose supervised, fixmatch "
            "or s4mc, or give the network encode(image) and decode(features, size)"
        )
    if method.correlation is None:
        return Student(model)
    channels: Any = model.channels
    return Student(model, corrmatch.Head(channels, n_classes))
