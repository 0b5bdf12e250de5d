"""Networks by name: segmentation_models_pytorch's on timm encoders, and a DPT that takes any grid.

The only module that imports timm and segmentation_models_pytorch. Call `torchvision_operators.ensure_torchvision` before
importing it; `segmenter.build` does.
"""

import difflib
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead
from segmentation_models_pytorch.encoders import TimmViTEncoder
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.config import Model as ModelConfig
from training.models.layers import resize
from training.models.pretrained import HALF, IMAGENET, LITE0, Scaling, WeightsError, scaling_beside

ARCHITECTURES = {
    "DeepLabV3Plus": smp.DeepLabV3Plus,
    "FPN": smp.FPN,
    "Unet": smp.Unet,
    "Segformer": smp.Segformer,
}
# DeepLab's rule: atrous rates double when the output stride halves.
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}


def _place(vit: Any, patches_BHWC: Tensor) -> Tensor:
    """In place of `VisionTransformer._pos_embed`: patches -> B x (prefix + H * W) x C, with their positions added."""
    placed_BNC: Tensor
    if vit.pos_embed is None:
        placed_BNC = VisionTransformer._pos_embed(vit, patches_BHWC)
        return placed_BNC
    batch, height, width, channels = patches_BHWC.shape  # not len(), which would fix the batch in an exported graph
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    table_1NC = resample_abs_pos_embed(
        vit.pos_embed, (height, width), vit.patch_embed.grid_size, num_prefix_tokens=prefix, antialias=False
    )
    ahead = [token.expand(batch, -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    patches_BNC = patches_BHWC.reshape(batch, height * width, channels)
    if vit.no_embed_class:
        placed_BNC = vit.pos_drop(torch.cat([*ahead, patches_BNC + table_1NC], 1))
    else:
        placed_BNC = vit.pos_drop(torch.cat([*ahead, patches_BNC], 1) + table_1NC)
    return placed_BNC


class VitEncoder(TimmViTEncoder):  # type: ignore[misc]  # smp has no types
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


class AnyGridDecoder(DPTDecoder):  # type: ignore[misc]
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


def scaling(config: ModelConfig) -> Scaling:
    """Mean and deviation of the input that the encoder's weights were trained with, for values in 0..1.

    From the config.json beside the weights; else what timm notes for the tag that `hub:timm/NAME.TAG` or the encoder's
    name carries, or for the encoder's first tag.

    Raises:
        WeightsError: as `pretrained.scaling_beside`, for weights on the hub that no tag of timm's names.
    """
    if config.weights == LITE0:
        return HALF
    encoder = config.encoder.removeprefix("tu-")
    kind, _, name = (config.weights or "").partition(":")
    tagged = name.rpartition("/")[2].partition("@")[0]
    if kind == "hub" and tagged.partition(".")[0] == encoder.partition(".")[0] and (found := _noted(tagged)):
        return found
    beside = scaling_beside(config.weights) if config.weights else None
    return beside or _noted(encoder) or _noted(encoder.partition(".")[0]) or IMAGENET


def _noted(name: str) -> Scaling | None:
    """What timm notes for NAME or NAME.TAG; None for a tag that it does not know."""
    try:
        noted = timm.get_pretrained_cfg(name)
    except RuntimeError:
        return None
    return None if noted is None else (tuple(noted.mean), tuple(noted.std))


def build_network(config: ModelConfig, n_classes: int) -> nn.Module:
    """One of smp's networks on a timm encoder, random weights.

    Raises:
        WeightsError: timm has no such encoder, or it cannot serve this architecture.
    """
    name = config.encoder.removeprefix("tu-")
    if not timm.is_model(name):
        near = difflib.get_close_matches(config.encoder, timm.list_models(), n=3)
        raise WeightsError(f"model.encoder: timm has no {config.encoder!r}; close names: {', '.join(near) or 'none'}")
    extra: dict[str, Any] = {}
    if config.architecture == "DeepLabV3Plus":
        extra = {
            "encoder_output_stride": config.output_stride,
            "decoder_atrous_rates": ATROUS_RATES[config.output_stride],
        }
    try:
        if config.architecture == "DPT":
            return Dpt(name, n_classes)
        build: Callable[..., nn.Module] = ARCHITECTURES[config.architecture]
        return build(f"tu-{name}", encoder_weights=None, classes=n_classes, **extra)
    except Exception as error:  # timm and smp refuse what they cannot combine in many ways
        like = "vit_small_patch14_dinov2" if config.architecture == "DPT" else "resnet50"
        raise WeightsError(
            f"model.encoder: {config.encoder!r} cannot serve as {config.architecture}'s encoder ({type(error).__name__}: "
            f"{error}); choose another, such as {like}, or another model.architecture"
        ) from error
