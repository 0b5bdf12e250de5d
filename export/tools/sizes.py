"""Image sizes and batches as they are written on the command line."""

from collections.abc import Sequence
from typing import NamedTuple


class SizeError(ValueError):
    """A malformed size or batch; the message names the option and says what to write."""


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def parse_size(text: str, option: str = "--size") -> Size:
    """Text such as 640x480, width first. Raises SizeError, naming `option`."""
    width, cross, height = text.lower().partition("x")
    if not cross or not (width.isdecimal() and height.isdecimal()) or not int(width) * int(height):
        raise SizeError(f"{option}: {text!r} is no size; write WIDTHxHEIGHT, such as 640x480")
    return Size(int(width), int(height))


def parse_batch(text: str, option: str = "--batches") -> int:
    """Raises SizeError, naming `option`."""
    if not text.isdecimal() or not int(text):
        raise SizeError(f"{option}: {text!r} is no batch size; write a number from 1 up")
    return int(text)


def split_list(texts: Sequence[str]) -> list[str]:
    """["1,4", "8"] -> ["1", "4", "8"]; spaces separate too."""
    return [part for text in texts for part in text.replace(",", " ").split()]
