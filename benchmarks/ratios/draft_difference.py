"""How far a JPEG decoded at a fraction of its size and then resized is from one decoded whole and resized.

python benchmarks/ratios/draft_difference.py FOLDER_OF_PHOTOGRAPHS [--target 512]

Puts 9 x 9 photographs of the folder beside each other as one JPEG (photographs that are small themselves are the hard case:
much detail for each pixel), and reduces it by `pipeline.imaging.large_image` with its decoder stopping at 1, 2 and 4
times the target.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.imaging import decode, large_image

TILE, ACROSS = (480, 360), 9


def mosaic(folder: Path) -> bytes:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    chosen = np.random.default_rng(0).permutation(len(files))[: ACROSS**2]
    sheet = Image.new("RGB", (TILE[0] * ACROSS, TILE[1] * ACROSS))
    for place, number in enumerate(chosen):
        photograph = Image.open(files[number]).convert("RGB").resize(TILE)
        sheet.paste(photograph, (place % ACROSS * TILE[0], place // ACROSS * TILE[1]))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", type=int, default=512)
    options = parser.parse_args()
    data = mosaic(options.folder)
    whole = decode.decode(data, max_pixels=1 << 28)
    size = options.target * whole.shape[0] // whole.shape[1], options.target
    want = np.asarray(Image.fromarray(whole).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    table = Table("decoder stops at", "mean", "root mean square", "99 %", "largest", title="difference in grey levels")
    for spare in (1, 2, 4):
        off = np.abs(large_image._shrink_jpeg(io.BytesIO(data), size, spare) - want)
        numbers = (
            f"{off.mean():.3f}",
            f"{np.sqrt((off**2).mean()):.3f}",
            f"{np.percentile(off, 99):.0f}",
            f"{off.max()}",
        )
        table.add_row(f"{spare} times the target", *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
