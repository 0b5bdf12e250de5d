"""Settings for tests: the repository's params.yaml with what a test changes merged over it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline import config

FILE = Path(__file__).parents[2] / "params.yaml"
SHIPPED: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
# A training of a test starts with unlabelled images at once, on batches and crops that suit generated images.
TRAIN = {
    "steps": 600, "batch_labelled": 6, "batch_unlabelled": 6, "crop": (192, 192), "scale": (0.5, 2.0), "warmup_steps": 0,
    "ramp_steps": 0, "val_every": 100,
}  # fmt: skip


def raw(**sections: Any) -> dict[str, Any]:
    """The content of a params.yaml; `train` is what small trainings need, other sections are the repository's."""
    return config.merge(config.merge(SHIPPED, {"train": TRAIN}), sections)


def write(path: Path, **sections: Any) -> None:
    """A params.yaml at `path`; it may be wrong."""
    path.write_text(yaml.safe_dump(plain(raw(**sections))), encoding="utf-8")


def plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, Mapping):
        return {key: plain(below) for key, below in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def params(**sections: Any) -> config.Params:
    return config.Params.model_validate(raw(**sections))


def data(**changes: Any) -> config.Data:
    return config.Data.model_validate(raw(data=changes)["data"])


def lists(**changes: Any) -> config.Lists:
    return data(lists=changes).lists


def ingest(**changes: Any) -> config.Ingest:
    return config.Ingest.model_validate(raw(ingest=changes)["ingest"])


def scale(**changes: Any) -> config.Scale:
    return config.Scale.model_validate(raw(scale=changes)["scale"])


def split(**changes: Any) -> config.Split:
    return config.Split.model_validate(raw(split=changes)["split"])


def model(**changes: Any) -> config.Model:
    return config.Model.model_validate(raw(model=changes)["model"])


def train(**changes: Any) -> config.Train:
    return config.Train.model_validate(raw(train=changes)["train"])


def export(**changes: Any) -> config.Export:
    return config.Export.model_validate(raw(export=changes)["export"])


def parity(**changes: Any) -> config.Parity:
    return config.Parity.model_validate(raw(parity=changes)["parity"])


def gate(**changes: Any) -> config.Gate:
    return config.Gate.model_validate(raw(gate=changes)["gate"])


def pool(**changes: Any) -> config.Pool:
    return config.Pool.model_validate(raw(pool=changes)["pool"])
