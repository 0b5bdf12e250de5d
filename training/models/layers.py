"""Small layers that any network here may use: TensorFlow's padding, and logits at another size."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
            height, width = child.kernel_size
            new = AsymmetricConv2d(
                child.in_channels,
                child.out_channels,
                (height, width),
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
