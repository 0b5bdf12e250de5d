"""How many images run together: the sizes that reach a runtime, and the largest for a bundle's resolution."""

BATCH_SIZES = (8, 4, 2, 1)  # engines, kernels and buffers are made for each shape, so there are few; the largest first
PIXELS = (
    8 << 20
)  # of one batch; TensorRT builds no engine for 8 of 2048 x 2048 (ResNet-50, stride 8) in 4 GiB of scratch


def most_images(long_side: int) -> int:
    """Images that run together on a card at most: 8 of 1024 x 1024 pixels, of larger ones fewer, at least 1."""
    return next(size for size in BATCH_SIZES if size == 1 or size * long_side**2 <= PIXELS)


def parts(images: int, most: int) -> list[slice]:
    """So many images in the fewest batches of `BATCH_SIZES` that are no larger than `most`, which is at least 1."""
    found, start = [], 0
    while start < images:
        size = next(size for size in BATCH_SIZES if size <= min(most, images - start))
        found.append(slice(start, start + size))
        start += size
    return found
