"""Our mask PNG against Pillow's default, time and size. Bars: 0.30 and 1.20; stretch 0.20 and 1.0.

python benchmarks/ratios/mask_png.py [--masks FOLDER] [--out benchmarks/results/ratios/mask_png.json]

Both sides write the same indexed PNG of the same ids. Maps: regions with ragged borders at sizes that are served, as
the network draws them and as `fit.restore` enlarges them (whole repeated rows), few and many classes; plus real
annotations where a folder of mask PNGs is given.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.support import table
from benchmarks.support.timing import alternate
from pipeline.imaging import label_maps


def regions(height: int, width: int, classes: int, seed: int, scale: int = 1) -> np.ndarray:
    """A label map like a network's: the largest of `classes` smooth random fields, plus noise along the borders."""
    rng = np.random.default_rng(seed)
    h, w = height // scale, width // scale
    fields = []
    for _ in range(classes):
        coarse = Image.fromarray(rng.normal(0, 1, (7, 9)).astype(np.float32))
        fields.append(np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC)) + rng.normal(0, 0.015, (h, w)))
    label = np.argmax(np.stack(fields), axis=0).astype(np.uint8)
    return label.repeat(scale, 0).repeat(scale, 1)


def with_pillow(label_HW: np.ndarray, flat_palette: list[int]) -> bytes:
    image = Image.fromarray(label_HW, "P")
    image.putpalette(flat_palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--masks", type=Path, help="a folder of real annotation PNGs to add")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cases = {
        "512x512, 6 classes": regions(512, 512, 6, 0),
        "512x1024, 19 classes": regions(512, 1024, 19, 1),
        "2048x2048, 6 classes, enlarged x4": regions(2048, 2048, 6, 2, 4),
        "3072x4096, 6 classes, enlarged x8": regions(3072, 4096, 6, 3, 8),
        "3072x4096, 21 classes, enlarged x8": regions(3072, 4096, 21, 4, 8),
    }
    if options.masks:
        for file in sorted(options.masks.glob("*.png"))[::100][:6]:
            cases[f"real {file.stem}"] = label_maps.decode_mask(file.read_bytes(), max_pixels=1 << 28).astype(np.uint8)
    rows = []
    for name, label_HW in cases.items():
        palette = label_maps.palette(int(label_HW[label_HW != 255].max()) + 1)
        flat = [channel for colour in palette for channel in colour]
        if label_HW.max() == 255:
            flat += [0] * (768 - len(flat))  # else Pillow packs four bits and loses 255
        ours, theirs = label_maps.encode_png(label_HW, palette), with_pillow(label_HW, flat)
        for data in (ours, theirs):
            assert (np.asarray(Image.open(io.BytesIO(data))) == label_HW).all()
        timed = alternate(
            {
                "ours": lambda label_HW=label_HW, palette=palette: label_maps.encode_png(label_HW, palette),
                "pillow": lambda label_HW=label_HW, flat=flat: with_pillow(label_HW, flat),
            },
            options.rounds,
        )
        rows.append(table.row(name, timed, size_ratio=len(ours) / len(theirs), bytes=len(ours)))
    columns = {
        "map": lambda r: r["name"],
        "ours ms": lambda r: f"{r['ours_ms']:.2f}",
        "Pillow ms": lambda r: f"{r['base_ms']:.2f}",
        "time ratio": lambda r: "{:.2f} ({:.2f} to {:.2f})".format(r["ratio"], *r["ratio_quartiles"]),
        "size ratio": lambda r: f"{r['size_ratio']:.2f}",
    }
    table.report("mask PNG, ours / Pillow default (bars: time 0.30, size 1.20)", rows, columns, options.out)


if __name__ == "__main__":
    main()
