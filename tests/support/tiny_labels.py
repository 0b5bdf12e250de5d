"""Label trees read by a format's reader, with every mask rendered."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.formats.common.source import Source
from pipeline.imaging import decode
from tests.support import tiny_settings

GOLDEN = Path(__file__).parents[1] / "golden"
PIXELS = 1 << 22


def read(reader: Callable[..., Source], root: Path, source: str, **data: Any) -> Source:
    return reader(root, tiny_settings.data(source=source, **data), max_pixels=PIXELS)


def content(source: Source) -> dict[str, bytes | decode.Refused]:
    """Every member's bytes, or why there are none."""
    found: dict[str, bytes | decode.Refused] = {}
    for name, origin in source.files:
        assert name not in found
        try:
            found[name] = origin.read_bytes() if isinstance(origin, Path) else origin()
        except decode.Refused as error:
            found[name] = error
    return found


def labels(source: Source) -> dict[str, np.ndarray]:
    """Name id -> class ids, H x W; a refused mask is an error."""
    found = {}
    for name, data in content(source).items():
        if name.startswith("masks/"):
            assert isinstance(data, bytes), f"{name}: {data}"
            found[name[len("masks/") :].rpartition(".")[0]] = pixels(data)
    return found


def refusals(source: Source) -> dict[str, str]:
    """Member name -> code, of what the reader refused and what its makers did."""
    made = {name: data.code for name, data in content(source).items() if not isinstance(data, bytes)}
    return {name: code for name, code, _ in source.refused} | made


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def golden(path: str) -> np.ndarray:
    return pixels((GOLDEN / path).read_bytes())


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array, mode).save(out, "PNG")
    return out.getvalue()


def palette_png(ids: np.ndarray, colours: list[tuple[int, int, int]]) -> bytes:
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
