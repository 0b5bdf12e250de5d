"""Challengers and champions made of counts, and the files that the gate reads."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.champions.scored import Scored
from pipeline.storage import atomic

NAMES = ("road", "tree", "lamp")
WRONG = (1, 0, 0)  # what a missed pixel is called instead: nothing is taken for a lamp
IMAGES = tuple(f"{i:02d}" for i in range(30))


def counts(recall: tuple[float, float, float], *, seed: int = 0, images: int = 30) -> np.ndarray:
    """N x 3 x 3: classes of 500, 300 and 60 pixels an image, right with their recall (one seed: the same luck)."""
    luck = np.random.default_rng(seed).normal(0, 0.03, (images, 3))
    out = np.zeros((images, 3, 3), np.int64)
    for i in range(images):
        for c, size in enumerate((500, 300, 60)):
            right = round(size * float(np.clip(recall[c] + luck[i, c], 0, 1)))
            out[i, c, c], out[i, c, WRONG[c]] = right, size - right
    return out


def scored(id: str, conf: np.ndarray, *, test_hash: str = "t1", images: tuple[str, ...] = IMAGES) -> Scored:
    return Scored(id, test_hash, NAMES, images[: len(conf)], conf)


def write_run(
    root: Path,
    name: str,
    conf: np.ndarray,
    *,
    test_hash: str = "t1",
    passed: bool = True,
    weights_of: str | None = None,
    forms: Sequence[str] = (),
) -> str:
    """bundle/, models/ and reports/ of a run called `name`, consistent with each other; returns the bundle's id.

    weights_of: another run whose network it exports. forms: "runtime device precision" of what the bundle offers.
    """
    id = hashlib.sha256(name.encode()).hexdigest()[:16]
    content = {"model.onnx": f"graph {name}".encode(), "MODEL_CARD.md": b"card"}
    content["bundle.json"] = atomic.to_json(
        {"id": id, "options": [dict(zip(("runtime", "device", "precision"), f.split(), strict=True)) for f in forms]}
    ).encode()
    for file, data in content.items():
        atomic.write_bytes(root / "bundle" / file, data)
    sums = "".join(f"{atomic.sha256(data)}  {file}\n" for file, data in sorted(content.items()))
    atomic.write_text(root / "bundle/SHA256SUMS", sums)
    student = root / "models/student/student.safetensors"
    atomic.write_bytes(student, f"weights {weights_of or name}".encode())
    weights = atomic.sha256(student)
    atomic.write_json(root / "reports/scores.json", {"test_hash": test_hash, "weights": weights})
    with atomic.replacing(root / "reports/confusions.npz") as file:
        arrays = {"confusion": conf, "ids": np.array(IMAGES[: len(conf)]), "groups": np.array([""] * len(conf))}
        np.savez(file, **arrays, classes=np.array(NAMES), test_hash=np.array(test_hash), weights=np.array(weights))
    failures = [] if passed else ["class 'lamp' agrees on 0.5"]
    report = {"bundle": id, "weights": weights, "passed": passed, "failures": failures}
    atomic.write_json(root / "reports/parity.json", report)
    return id
