"""A model's per-image result on the test split, as evaluate left it: reports/scores.json and reports/confusions.npz."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.champions import store

_DAMAGED = (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


class GateError(store.ChampionError):
    """An input of the gate is missing or does not belong to the others; the message names the file and what to do."""


@dataclass(frozen=True)
class Scored:
    """One model's result: id, test hash, class names, image ids and per-image confusion matrices N x K x K."""

    id: str
    test_hash: str
    classes: tuple[str, ...]
    images: tuple[str, ...]
    confusion_NKK: NDArray[np.int64]


def read_scored(id: str, scores_file: Path, confusions_file: Path, remedy: str = "run the evaluate stage") -> Scored:
    """Scores and per-image counts as evaluate left them.

    Raises:
        GateError: a file is missing or damaged, or the two do not belong together; the message ends with `remedy`.
    """
    for file in (scores_file, confusions_file):
        if not file.exists():
            raise GateError(f"{file}: not found; {remedy}")
    scores = store.read_record(scores_file, ("test_hash", "weights"), f"{remedy} again")

    try:
        with np.load(confusions_file, allow_pickle=False) as arrays:
            hashes = str(arrays["test_hash"]), str(arrays["weights"])
            names, images = (tuple(map(str, arrays[key])) for key in ("classes", "ids"))
            counts_NKK = arrays["confusion"]
    except _DAMAGED as error:
        raise GateError(f"{confusions_file}: damaged ({error!r}); {remedy} again") from error

    if hashes != (scores["test_hash"], scores["weights"]):
        raise GateError(f"{confusions_file} and {scores_file} come from different runs; {remedy} again")
    wanted = (len(images), len(names), len(names))
    if counts_NKK.shape != wanted or counts_NKK.dtype.kind not in "iu":
        found = f"{counts_NKK.dtype} {counts_NKK.shape}"
        raise GateError(f"{confusions_file}: confusion is {found}, not whole numbers {wanted}; {remedy} again")
    return Scored(id, scores["test_hash"], names, images, counts_NKK)
