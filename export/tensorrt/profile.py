"""What sizes a TensorRT engine takes."""

from dataclasses import dataclass
from typing import Self

from export.runtime import batches
from pipeline.imaging import resize


@dataclass(frozen=True)
class Profile:
    """Images x height x width (pixels) an engine takes: the smallest, the most usual (kernels are chosen for it), the
    largest; heights and widths are multiples of `stride`. Raises ValueError when they are not, or do not rise.
    """

    stride: int
    min_NHW: tuple[int, int, int]
    opt_NHW: tuple[int, int, int]
    max_NHW: tuple[int, int, int]

    def __post_init__(self) -> None:
        for low, usual, high in zip(self.min_NHW, self.opt_NHW, self.max_NHW, strict=True):
            if not 1 <= low <= usual <= high:
                raise ValueError(f"profile sizes must rise: {self.min_NHW}, {self.opt_NHW}, {self.max_NHW}")
        if any(side % self.stride for shape in (self.min_NHW, self.opt_NHW, self.max_NHW) for side in shape[1:]):
            raise ValueError(f"profile heights and widths must be multiples of {self.stride}: {self}")

    @classmethod
    def of(cls, *, long_side: int, stride: int, max_batch: int | None = None, opt_batch: int = 1) -> Self:
        """Every size that `pipeline.imaging.resize` can make (pixels), in batches up to `max_batch`, else to `most_images`.

        Chosen for `opt_batch` photographs of 4:3 at full size: serving runs images one by one as they come.
        Raises ValueError for sizes below 1 or `opt_batch` above `max_batch`.
        """
        usual = resize.plan(3 * long_side, 4 * long_side, long_side=long_side, stride=stride)
        largest = resize.plan(long_side, long_side, long_side=long_side, stride=stride)
        return cls(
            stride,
            (1, stride, stride),
            (opt_batch, usual.padded_height, usual.padded_width),
            (max_batch or batches.most_images(long_side), largest.padded_height, largest.padded_width),
        )

    def check(self, shape_NHW: tuple[int, ...]) -> None:
        """Raises ValueError that names the axis and the bound which `shape_NHW` breaks."""
        for axis, size, low, high in zip(
            ("batch", "height", "width"), shape_NHW, self.min_NHW, self.max_NHW, strict=True
        ):
            if size < low:
                raise ValueError(f"{axis} {size} is below the engine's smallest, {low}")
            if size > high:
                raise ValueError(f"{axis} {size} is above the engine's largest, {high}; build for larger inputs")
            if axis != "batch" and size % self.stride:
                raise ValueError(f"{axis} {size} is not a multiple of {self.stride}; use pipeline.imaging.resize")
