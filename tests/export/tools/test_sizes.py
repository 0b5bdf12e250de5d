"""export.tools.sizes: what is taken for a size, a batch, a list."""

import pytest

from export.tools import sizes


def test_a_size_is_width_by_height() -> None:
    for text in ("640x480", "640X480"):
        assert sizes.parse_size(text) == (640, 480)
    assert str(sizes.Size(640, 480)) == "640x480"


@pytest.mark.parametrize("text", ["", "640", "640x", "x480", "640x480x3", "0x480", "640x-1", "axb", "1.5x2", "6²x480"])
def test_what_is_no_size_is_refused_with_the_option_and_an_example(text: str) -> None:
    with pytest.raises(sizes.SizeError, match=r"^--size: .* WIDTHxHEIGHT, such as 640x480"):
        sizes.parse_size(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1.5", "²"])
def test_what_is_no_batch_is_refused(text: str) -> None:
    assert sizes.parse_batch("12") == 12
    with pytest.raises(sizes.SizeError, match=r"^--batches: .* from 1 up"):
        sizes.parse_batch(text)


def test_lists_are_split_at_commas_and_spaces() -> None:
    assert sizes.split_list(["1,4", "8 16"]) == ["1", "4", "8", "16"]
