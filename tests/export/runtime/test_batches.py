"""export.runtime.batches: what runs together, and how many."""

import pytest

from export.runtime import batches


@pytest.mark.parametrize(
    ("long_side", "images"), [(64, 8), (1024, 8), (1025, 4), (1448, 4), (1449, 2), (2048, 2), (2049, 1), (9000, 1)]
)
def test_large_images_run_together_in_smaller_numbers(long_side: int, images: int) -> None:
    assert batches.most_images(long_side) == images


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8, 100])
def test_images_are_split_into_few_batches_of_known_sizes(most: int) -> None:
    for images in range(20):
        found = batches.parts(images, most)
        assert [i for part in found for i in range(images)[part]] == list(range(images))
        sizes = [part.stop - part.start for part in found]
        assert set(sizes) <= set(batches.BATCH_SIZES)
        assert max(sizes, default=1) <= most
        assert sizes == sorted(sizes, reverse=True)
