"""Networks beside segmentation_models_pytorch's: a DPT that takes any grid, and the user's own from the project folder."""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead
from segmentation_models_pytorch.encoders import TimmViTEncoder
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from training.models.pretrained import WeightsError


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


def resize(logits_BKhw: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """logits_BKhw -> logits_BKHW at `size`, bilinear; returned as they are where they have that size."""
    if logits_BKhw.shape[-2:] == torch.Size(size):
        return logits_BKhw
    return F.interpolate(logits_BKhw, tuple(size), mode="bilinear", align_corners=align_corners)


def _place(vit: Any, patches_BHWC: Tensor) -> Tensor:
    """In place of `VisionTransformer._pos_embed`: patches -> B x (prefix + H * W) x C, with their positions added."""
    if vit.pos_embed is None:
        return VisionTransformer._pos_embed(vit, patches_BHWC)
    batch, height, width, channels = patches_BHWC.shape  # not len(), which would fix the batch in an exported graph
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    table_1NC = resample_abs_pos_embed(
        vit.pos_embed, (height, width), vit.patch_embed.grid_size, num_prefix_tokens=prefix, antialias=False
    )
    ahead = [token.expand(batch, -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    patches_BNC = patches_BHWC.reshape(batch, height * width, channels)
    if vit.no_embed_class:
        return vit.pos_drop(torch.cat([*ahead, patches_BNC + table_1NC], 1))
    return vit.pos_drop(torch.cat([*ahead, patches_BNC], 1) + table_1NC)


class VitEncoder(TimmViTEncoder):
    """A timm ViT of any input size in multiples of its patch: image_BCHW -> four feature maps, all B x width x h x w.

    smp's own returns raw block outputs and the prefix tokens beside them. Here the ViT's last norm is applied to each
    map and the tokens are dropped, as DINOv2's `get_intermediate_layers` and UniMatch V2 have it. So is the table of
    positions resized: bicubic without antialiasing, where timm has antialiasing, which TensorRT refuses and OpenVINO
    leaves out without a word.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Other ViTs have rules of their own.
        if getattr(type(self.model), "_pos_embed", None) is VisionTransformer._pos_embed:
            self.model._pos_embed = MethodType(_place, self.model)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.model.forward_intermediates(
            x, indices=self._output_indices, norm=True, intermediates_only=True
        )
        return maps


class AnyGridDecoder(DPTDecoder):
    """smp's DPT decoder for any grid: each map is resized to the next one's size instead of doubled.

    Doubling fits only patches of 16 on an even grid; there the two are the same arithmetic.
    """

    def forward(self, features: list[Tensor]) -> Tensor:
        """Maps of equal size h x w, shallow to deep -> B x fusion channels x 8h x 8w."""
        maps = [assemble(f) for assemble, f in zip(self.reassemble_blocks, features, strict=True)][::-1]
        sizes = [m.shape[-2:] for m in maps[1:]] + [torch.Size([2 * side for side in maps[-1].shape[-2:]])]
        fused: Tensor | None = None
        for block, here, size in zip(self.fusion_blocks, maps, sizes, strict=True):
            here = block.residual_conv_block1(here)
            here = block.residual_conv_block2(here if fused is None else here + fused)
            fused = block.project(F.interpolate(here, size, mode="bilinear", align_corners=True))
        assert fused is not None
        return fused


class Dpt(nn.Module):
    """DPT on a timm ViT, built of smp's parts; prefix tokens are ignored, so all its features are maps.

    Decoder widths follow the ViT's as in UniMatch V2 (S: 64; B: 128) and DPT (L and wider: 256).
    """

    def __init__(self, encoder: str, n_classes: int) -> None:
        super().__init__()
        self.encoder = VitEncoder(encoder, pretrained=False, dynamic_img_size=True, num_classes=0)
        if len(set(self.encoder.output_strides)) > 1:
            raise ValueError("its maps get smaller stage by stage; DPT wants a plain ViT")
        width = self.encoder.out_channels[-1]
        wide = width >= 1024
        fusion = 256 if wide else width // 6
        middle = (256, 512, 1024, 1024) if wide else tuple(width // part for part in (8, 4, 2, 1))
        # Strides of 16 whatever the patch is: 14 would give factors of 3.5 and 1.75, which smp cuts to 3 and 1.
        self.decoder = AnyGridDecoder(self.encoder.out_channels, (16,) * 4, False, "ignore", middle, fusion)
        self.segmentation_head = DPTSegmentationHead(fusion, n_classes).head

    def decode(self, features: list[Tensor], size: Sequence[int]) -> Tensor:
        return resize(self.segmentation_head(self.decoder(features)), size, align_corners=True)


class Ear(nn.Module):
    """Stands in a user's network where others have their encoder: a hook on it hears the features (the logits, where
    there are none), and its parameters are those of the user's `encoder`, if there is one. Registers nothing twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["of"] = module

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        encoder = getattr(self.of, "encoder", None)
        return encoder.parameters(recurse) if isinstance(encoder, nn.Module) else iter(())

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return features


class Own(nn.Module):
    """A user's network: normalised image_BCHW -> logits_BKhw; perhaps with encode and decode of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.encoder = module, Ear(module)
        self.has_features = all(callable(getattr(module, name, None)) for name in ("encode", "decode"))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.module(image_BCHW)
        self.encoder([logits])
        return logits

    def encode(self, image_BCHW: Tensor) -> list[Tensor]:
        module: Any = self.module
        return self.encoder(module.encode(image_BCHW))

    def decode(self, features: list[Tensor], size: Sequence[int]) -> Tensor:
        module: Any = self.module
        return resize(module.decode(features, size), size)


def _own_callable(architecture: str) -> Any:
    """The object that `some.module:Name` names. Only modules of the project folder: a file of weights names one too."""
    dotted, _, name = architecture.partition(":")
    folder = Path.cwd()
    importlib.invalidate_caches()
    if PathFinder.find_spec(dotted.partition(".")[0], [str(folder)]) is None:
        raise WeightsError(
            f"model.architecture: there is no module {dotted!r} in the project folder {folder}; put the file there, or "
            "import an installed package's network into one"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # stays: the network may import more when it runs
    try:
        module = importlib.import_module(dotted)
    except Exception as error:
        raise WeightsError(
            f"model.architecture: {dotted!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).resolve().is_relative_to(folder.resolve()):
        raise WeightsError(
            f"model.architecture: {dotted!r} is {file or 'built in'}, not the project folder's; rename your module"
        )
    if not callable(found := getattr(module, name, None)):
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise WeightsError(f"model.architecture: {file} has no callable {name!r}{hint}")
    return found


def own(architecture: str, n_classes: int) -> tuple[Own, int]:
    """A user's network after one tiny forward pass, and the channels of its deepest feature (0: it shows none)."""
    make = _own_callable(architecture)
    say = f"model.architecture: {architecture}"
    try:
        module = make(n_classes)
    except Exception as error:
        raise WeightsError(
            f"{say}: calling it with {n_classes} classes raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise WeightsError(f"{say} returned a {type(module).__name__}; it must take n_classes and return an nn.Module")
    own, size = Own(module).eval(), (64, 96)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))

    def attempt(what: str, call: Callable[[], Any]) -> Any:
        try:
            with torch.no_grad():
                return call()
        except Exception as error:
            raise WeightsError(
                f"{say}: {what} of a 1 x 3 x 64 x 96 image raised {type(error).__name__}: {error}"
            ) from error

    logits = attempt("forward", lambda: own(image))
    if not isinstance(logits, Tensor):
        raise WeightsError(f"{say}: forward returned a {type(logits).__name__}; it must return logits_BKHW, a tensor")
    if logits.ndim != 4 or logits.shape[:2] != (1, n_classes) or not logits.is_floating_point():
        raise WeightsError(
            f"{say}: forward returned {logits.dtype} of shape {tuple(logits.shape)} for a 1 x 3 x 64 x 96 image; it must "
            f"return floating-point logits of shape 1 x {n_classes} x h x w, one channel for each of the {n_classes} classes"
        )
    if n_classes > 1 and (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(()), atol=1e-3):
        raise WeightsError(f"{say}: forward returned probabilities; leave the softmax out, the loss has its own")
    channels = 0
    if own.has_features:
        features = attempt("encode", lambda: own.encode(image))
        if not isinstance(features, list) or not all(isinstance(f, Tensor) and f.ndim == 4 for f in features):
            raise WeightsError(f"{say}: encode must return a list of B x C x h x w tensors, shallow to deep")
        again = attempt("decode", lambda: own.decode(features, size))
        if not torch.equal(again, resize(logits, size)):
            raise WeightsError(f"{say}: decode(encode(image), (H, W)) must give what forward(image) gives, bit for bit")
        channels = features[-1].shape[1]
    return own.train(), channels
