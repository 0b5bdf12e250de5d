"""Weak and strong views and CutMix as batched tensor code on the device that trains.

Weak: random scale, crop, flip. Strong: colour jitter, grey, blur on the weak view, so that pixels correspond
(the recipe of UniMatch and its family). All randomness comes from the generator that is passed in.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class Window:
    """Where a view lies in its source images: y_BH and x_BW in source pixels, half a pixel inside the photograph at least.

    valid_BHW: pixel lies in the photo.
    """

    y_BH: Tensor
    x_BW: Tensor
    valid_BHW: Tensor


@dataclass(frozen=True)
class View:
    """A cropped batch. image_BCHW float in 0..255; label_BHW int64 with ignore outside; valid_BHW: pixel lies in the photo.

    window: where it was cut. weight_BHW: what each labelled pixel counts, float in 0..1; None: all in full.
    """

    image_BCHW: Tensor
    label_BHW: Tensor
    valid_BHW: Tensor
    window: Window | None = None
    weight_BHW: Tensor | None = None


def send(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device` without making the host wait: from pinned memory if the device has a queue of its own."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def stack(images_HWC: list[Tensor], labels_HW: list[Tensor], ignore: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images and masks of different sizes -> one batch padded right/bottom, and sizes_B2 (height, width)."""
    sizes = torch.tensor([image.shape[:2] for image in images_HWC])
    height, width = (int(v) for v in sizes.amax(0))
    image = torch.zeros(len(images_HWC), 3, height, width, dtype=torch.uint8)
    label = torch.full((len(images_HWC), height, width), ignore, dtype=torch.int32)
    for i, (one, mask) in enumerate(zip(images_HWC, labels_HW, strict=True)):
        h, w = one.shape[:2]
        image[i, :, :h, :w] = one.permute(2, 0, 1)
        label[i, :h, :w] = mask
    return image, label, sizes


def crop(
    image_BCHW: Tensor,
    label_BHW: Tensor,
    sizes_B2: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    ignore: int,
    generator: Generator,
    *,
    flip: bool = True,
    weight_BHW: Tensor | None = None,
    centres_B2: Tensor | None = None,
) -> View:
    """Scale each image by U(scale), cut a random window of `size` (height, width), flip half of them.

    Where the scaled image is smaller than the window it lies at the top left (right if flipped); the rest is 0, ignored
    and not valid.
    Scale 1 copies source pixels (up to float rounding).

    weight_BHW: what each labelled pixel counts, uint8 with 255 for in full; cut like the labels.
    centres_B2: a source pixel (y, x) that each window holds, anywhere in it as likely; NaN where any window will do.
    """
    n, (out_h, out_w) = len(image_BCHW), size
    device = image_BCHW.device
    factor = _uniform(n, *scale, generator)
    room = (sizes_B2 * factor[:, None] - torch.tensor(size)).clamp_min(0)
    start = torch.rand(n, 2, generator=generator) * room
    if centres_B2 is not None:
        ahead = torch.rand(n, 2, generator=generator) * torch.tensor(size)
        wanted = ((centres_B2 + 0.5) * factor[:, None] - ahead).clamp_min(0).minimum(room)
        start = torch.where(centres_B2.isfinite(), wanted, start)
    if scale[0] == scale[1] == 1.0:
        start = start.round()
    mirrored = (torch.rand(n, generator=generator) < 0.5) & flip
    factor, start, mirrored = (send(v, device) for v in (factor, start, mirrored))
    rows = (torch.arange(out_h, device=device) + 0.5 + start[:, :1]) / factor[:, None]
    columns = torch.arange(out_w, device=device) + 0.5
    columns = torch.where(mirrored[:, None], out_w - columns, columns)
    columns = (columns + start[:, 1:]) / factor[:, None]
    height, width = send(sizes_B2.float(), device).split(1, dim=1)
    valid = ((rows < height)[:, :, None]) & ((columns < width)[:, None, :])

    # Half a pixel inside the photograph: bilinear weights never reach the padding of `stack`.
    window = Window(rows.minimum(height - 0.5), columns.minimum(width - 0.5), valid)
    label = _sample(label_BHW.float()[:, None], window, "nearest")[:, 0].long()
    weight = None if weight_BHW is None else _sample(weight_BHW.float()[:, None] / 255, window, "nearest")[:, 0]
    return View(cut(image_BCHW.float(), window), torch.where(valid, label, ignore), valid, window, weight)


def _sample(value_BCHW: Tensor, window: Window, mode: str) -> Tensor:
    n, out_h, out_w = window.valid_BHW.shape
    grid = torch.stack(
        [
            (2 * window.x_BW / value_BCHW.shape[-1] - 1)[:, None, :].expand(n, out_h, out_w),
            (2 * window.y_BH / value_BCHW.shape[-2] - 1)[:, :, None].expand(n, out_h, out_w),
        ],
        dim=-1,
    )
    return F.grid_sample(value_BCHW, grid, mode=mode, padding_mode="border", align_corners=False)


def cut(value_BCHW: Tensor, window: Window) -> Tensor:
    """Float planes of the source images (padded right/bottom as by `stack`) -> the view's planes, 0 where it is not valid."""
    return _sample(value_BCHW, window, "bilinear") * window.valid_BHW[:, None]


def _luma(image_BCHW: Tensor) -> Tensor:
    red, green, blue = image_BCHW.split(1, dim=1)
    luma: Tensor = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma


def _hue_matrix(turn_B: Tensor) -> Tensor:
    """Rotation of the chroma plane (YIQ) by `turn` of a full circle, as B x 3 x 3 matrices on RGB."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    angle = 2 * torch.pi * turn_B
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rotate = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    matrix: Tensor = torch.linalg.inv(to_yiq) @ rotate @ to_yiq
    return matrix


def strong(image_BCHW: Tensor, generator: Generator) -> Tensor:
    """Colour jitter (0.5, 0.5, 0.5, hue 0.25) with p 0.8, grey with p 0.2, Gaussian blur (sigma 0.1..2) with p 0.5.

    image_BCHW float in 0..255 -> the same range. Each image draws its own strengths; the order is fixed
    (brightness, contrast, saturation, hue), hue as a rotation of the chroma plane.
    """
    n, device = len(image_BCHW), image_BCHW.device

    def draw(low: float, high: float) -> Tensor:
        return _uniform(n, low, high, generator)

    jitter = draw(0, 1) < 0.8
    brightness, contrast, saturation = (torch.where(jitter, draw(0.5, 1.5), torch.ones(n)) for _ in range(3))
    turn = torch.where(jitter, draw(-0.25, 0.25), torch.zeros(n))
    saturation = torch.where(draw(0, 1) < 0.2, torch.zeros(n), saturation)
    sigma = torch.where(draw(0, 1) < 0.5, draw(0.1, 2.0), torch.full((n,), 1e-3))

    def each(value: Tensor) -> Tensor:
        return send(value.view(n, 1, 1, 1), device)

    image = (image_BCHW * each(brightness)).clamp(0, 255)
    mean = _luma(image).mean((2, 3), keepdim=True)
    image = (mean + (image - mean) * each(contrast)).clamp(0, 255)
    grey = _luma(image)
    image = (grey + (image - grey) * each(saturation)).clamp(0, 255)
    image = torch.einsum("bij,bjhw->bihw", send(_hue_matrix(turn), device), image).clamp(0, 255)
    return blur(image, send(sigma, device))


def blur(image_BCHW: Tensor, sigma_B: Tensor, radius: int = 6) -> Tensor:
    """Gaussian blur with one sigma (pixels) per image, edges replicated; separable, radius 3 sigma at most 2."""
    n, channels = image_BCHW.shape[:2]
    offsets = torch.arange(-radius, radius + 1, device=image_BCHW.device)
    kernel = torch.exp(-0.5 * (offsets / sigma_B[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(image_BCHW.reshape(1, n * channels, *image_BCHW.shape[2:]), (radius,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
    return F.conv2d(flat, kernel[:, None, None, :], groups=n * channels).view_as(image_BCHW)


def boxes(
    n: int,
    size: tuple[int, int],
    probability: float,
    generator: Generator,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """CutMix boxes as box_BHW bool: with `probability` a rectangle of U(area) of the image, aspect U(aspect), placed uniformly.

    A rectangle too long for the image is cut to its side (the papers draw again until it fits).
    """
    height, width = size
    pixels = _uniform(n, *area, generator) * height * width
    ratio = _uniform(n, *aspect, generator)
    box_h = (pixels / ratio).sqrt().round().clamp(1, height)
    box_w = (pixels * ratio).sqrt().round().clamp(1, width)
    top = (torch.rand(n, generator=generator) * (height - box_h + 1)).floor()
    left = (torch.rand(n, generator=generator) * (width - box_w + 1)).floor()
    used = torch.rand(n, generator=generator) < probability
    y, x = torch.arange(height), torch.arange(width)
    inside_y = (y >= top[:, None]) & (y < (top + box_h)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + box_w)[:, None])
    return inside_y[:, :, None] & inside_x[:, None, :] & used[:, None, None]


def mix(value: Tensor, box_BHW: Tensor, other: Tensor | None = None) -> Tensor:
    """CutMix: inside its box each sample takes its left neighbour in the batch (roll by one), or `other`'s sample.

    value, other: B x H x W or B x C x H x W of any dtype; the same box must be used for images, labels, masks and targets.
    Raises:
        ValueError: a batch of one, which would be mixed with itself and so not perturbed at all.
    """
    if other is None and len(value) < 2:
        raise ValueError("in-batch CutMix needs at least 2 images a batch: raise train.batch_unlabelled to 2 or more")
    box = box_BHW if value.dim() == 3 else box_BHW[:, None]
    return torch.where(box, value.roll(1, 0) if other is None else other, value)
