"""Segmentation networks by name: segmentation_models_pytorch decoders on timm encoders, one preprocessing for all.

A user's own network from the project folder takes their place under the name `some.module:Name`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from pipeline.config import Model as ModelConfig
from pipeline.storage import atomic
from training.models.layers import resize, use_asymmetric_padding
from training.models.own import OwnNetwork, load_own
from training.models.pretrained import IMAGENET, LITE0, Scaling, load_encoder
from training.models.pretrained import WeightsError as WeightsError
from training.models.torchvision_operators import ensure_torchvision


class Segmenter(nn.Module):
    """Image in, logits out; the input scaling is inside so that training, evaluation and the export share it.

    forward: image_BCHW float, RGB in 0..255, H and W multiples of `step` -> logits_BKHW float at the same H, W.
        Where `has_features`, forward(x) is decode(encode(x), x.shape[-2:]), bit for bit in eval mode.
    encode: image_BCHW -> feature maps, shallow to deep, each B x C x h x w; the last one, of `channels` channels, is the
        deepest. Any of them may be multiplied by a B x C x 1 x 1 mask. smp's convolutional networks put the scaled
        image itself first and, for encoders that begin at stride 4, a map of 0 channels second; DPT gives four maps of
        one size and no prefix tokens.
    decode: such a list, and the image's (H, W) -> logits_BKHW. The list is not changed.

    Attributes:
        has_features: False for a user's own network without encode and decode. channels: 0 there.
        scaling: mean and deviation of the input per channel, for values in 0..1.
        frozen: the encoder gets no gradient and stays in eval mode (BatchNorm, dropout) under train().
    """

    net: Any  # OwnNetwork, Dpt, or one of segmentation_models_pytorch's, which have no types
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        step: int = 1,
        freeze: bool = False,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.net, self.step, self.frozen = net, step, freeze
        self.has_features = not isinstance(net, OwnNetwork) or net.has_features
        self.channels: int = net.encoder.out_channels[-1] if channels is None else channels
        self.register_buffer("mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(1, 3, 1, 1), persistent=False)
        self.scale_by((mean, std))
        if freeze:
            for parameter in self.net.encoder.parameters():
                parameter.requires_grad_(False)

    def scale_by(self, scaling: Scaling) -> None:
        """Scale the input by this mean and deviation from now on: those of the weights that are copied in."""
        self.scaling = scaling
        mean, std = scaling
        self.mean.copy_(255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.std.copy_(255 * torch.tensor(std).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.frozen:
            owner: Any = self.net.module if isinstance(self.net, OwnNetwork) else self.net
            owner.encoder.eval()
        return self

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        """Scaled as the encoder's weights want it. Raises ValueError when H or W is no multiple of `step`."""
        height, width = image_BCHW.shape[-2:]
        if not torch.compiler.is_exporting() and (height % self.step or width % self.step):
            raise ValueError(
                f"an image of {height} x {width} reached a network that takes multiples of {self.step}: set input.stride "
                f"and both sides of train.crop to multiples of {self.step}"
            )
        return (image_BCHW - self.mean) / self.std

    def encode(self, image_BCHW: Tensor) -> list[Tensor]:
        image = self.normalise(image_BCHW)
        if not self.has_features:
            raise ValueError(
                "this network gives logits only: offer encode(image) and decode(features, size) beside forward, or choose "
                "a train.method that needs no features"
            )
        features: list[Tensor] = self.net.encode(image) if isinstance(self.net, OwnNetwork) else self.net.encoder(image)
        return features

    def decode(self, features: list[Tensor], size: Sequence[int]) -> Tensor:
        if hasattr(self.net, "decode"):  # a DPT and a user's own network resize in their own way
            logits_BKHW: Tensor = self.net.decode(features, size)
            return logits_BKHW
        return resize(self.net.segmentation_head(self.net.decoder(features)), size)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        size = image_BCHW.shape[-2:]
        if self.has_features:
            return self.decode(self.encode(image_BCHW), size)
        return resize(self.net(self.normalise(image_BCHW)), size)


def build(
    config: ModelConfig, n_classes: int, *, load_weights: bool = True, scaling: Scaling | None = None
) -> Segmenter:
    """The network that `config` names; downloads only where `config.weights` says hub:.

    scaling: mean and deviation of the input in 0..1; None: what the encoder's weights were trained with.

    Raises:
        WeightsError: an unknown or unfit encoder, a user's own network that is missing or does not keep the contract, or
            weights that are missing or do not fit.
    """
    ensure_torchvision()
    if ":" in config.architecture:
        return _build_own(config, n_classes)
    return _build_named(config, n_classes, load_weights, scaling)


def _build_own(config: ModelConfig, n_classes: int) -> Segmenter:
    net, channels = load_own(config.architecture, n_classes)
    if config.freeze and not isinstance(getattr(net.module, "encoder", None), nn.Module):
        raise WeightsError(
            f"model.freeze: {config.architecture} has no submodule called `encoder`; name the part to freeze that, or "
            "set model.freeze: false"
        )
    return Segmenter(net, *IMAGENET, freeze=config.freeze, channels=channels)


def _build_named(config: ModelConfig, n_classes: int, load_weights: bool, scaling: Scaling | None) -> Segmenter:
    from training.models import (
        architectures,  # timm and smp take seconds to import, and need `ensure_torchvision` first
    )

    net: Any = architectures.build_network(config, n_classes)
    lite = config.weights == LITE0
    if lite:
        for module in net.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3  # the value these weights were trained with

    # The lite weights were trained under TensorFlow's padding: on the demo's val 63.9 against 61.2 mIoU (800 supervised steps).
    if config.padding == "asymmetric" or (config.padding == "auto" and lite):
        use_asymmetric_padding(net.encoder)
    if config.weights and load_weights:
        load_encoder(net.encoder, config.weights)

    mean, std = scaling or architectures.scaling(config)
    return Segmenter(net, mean, std, step=net.encoder.output_stride, freeze=config.freeze)


def save(path: Path, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write weights and their description as safetensors, atomically (temporary name, fsync, rename)."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    atomic.write_bytes(path, serialise(tensors, metadata={"marginalia": json.dumps(meta, sort_keys=True)}))


def read_meta(path: Path) -> dict[str, Any]:
    """The description written by `save`. Raises WeightsError when the file is not one of ours."""
    if not path.exists():
        raise WeightsError(f"{path}: no such file; run `dvc repro train` first")
    with safe_open(path, framework="pt") as handle:
        meta = (handle.metadata() or {}).get("marginalia")
    if meta is None:
        raise WeightsError(
            f"{path}: carries no Marginalia description; only weights written by `training.train` can be used"
        )
    return dict(json.loads(meta))


def load(path: Path, device: str | torch.device = "cpu") -> tuple[Segmenter, dict[str, Any]]:
    """A saved student, ready to run (eval mode), and its description."""
    meta = read_meta(path)
    config = ModelConfig.model_validate(meta["params"]["model"])
    noted = meta.get("input_scaling")  # absent from students of the first edition
    scaling = None if noted is None else (tuple(noted["mean"]), tuple(noted["std"]))
    model = build(config, len(meta["classes"]), load_weights=False, scaling=scaling)
    with safe_open(path, framework="pt") as handle:
        model.load_state_dict({key: handle.get_tensor(key) for key in handle.keys()})  # noqa: SIM118
    return model.eval().to(device), meta
