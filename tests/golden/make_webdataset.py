"""Made tests/golden/webdataset/*.tar with webdataset 1.0 (not a dependency): KEY.jpg or .png, .cls, .json, .seg.png."""

from pathlib import Path

import numpy as np
import webdataset

rng = np.random.default_rng(0)
home = Path(__file__).parent / "webdataset"
with webdataset.ShardWriter(f"{home}/shard-%06d.tar", maxcount=2, mtime=0) as sink:
    for n in range(4):
        key = f"{n % 2:06d}"  # the second shard repeats the first one's keys
        image = rng.integers(0, 256, (16, 24, 3)).astype(np.uint8)
        mask = np.repeat(np.uint8(n), 16 * 24).reshape(16, 24)
        extra = {"seg.png": mask} if n < 2 else {}
        sink.write({"__key__": key, "png" if n % 2 else "jpg": image, "cls": n, "json": {"n": n}, **extra})
