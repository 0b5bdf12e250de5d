"""Where training starts: the encoder's own weights, or the champion that the dump registry names."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline import config, paths
from pipeline.ingest import dump_registry
from pipeline.storage import dvc
from training.models import segmenter

SHORT = 16  # hex digits of an image id kept in a student's description


def champion(known: Path = dump_registry.FILE) -> Path | None:
    """The weights that the registry's `warm_start` names; None for a first training.

    Raises:
        RegistryError: the registry is unusable. ConfigError: it names a champion whose weights are not there.
    """
    name = dump_registry.read_dumps(known).warm_start if known.exists() else None
    if name is None:
        return None
    path = paths.CHAMPIONS / name / "student.safetensors"
    if not path.exists() and not dvc.restore(path.parent):
        raise config.ConfigError(
            f"{known}: warm_start names champion {name!r}, but {path} does not exist; restore it (`dvc pull`, "
            "`dvc checkout`) or set warm_start: null to train from the encoder's weights"
        )
    return path


def short_ids(ids: Iterable[str]) -> str:
    """Image ids as one string for a student's description: what its weights, or those they started from, have seen."""
    return " ".join(sorted({i[:SHORT] for i in ids}))


def seen_by(meta: dict[str, Any]) -> set[str]:
    return set(str(meta.get("trained_on", "")).split())


def refuse_seen(path: Path, meta: dict[str, Any], judged: Iterable[str]) -> None:
    """Raise WeightsError when the weights have seen images of today's val or test: their scores would flatter."""
    seen = seen_by(meta)
    both = [i for i in judged if i[:SHORT] in seen]
    if both:
        raise segmenter.WeightsError(
            f"{path} was trained on {len(both)} images that are in today's val or test split (such as {both[0][:SHORT]}); "
            f"restore the old split (split.seed, data.lists), or set warm_start: null in {dump_registry.FILE} to start afresh"
        )


def load_into(
    model: segmenter.Segmenter, path: Path, classes: Sequence[dict[str, Any]], judged: Iterable[str]
) -> set[str]:
    """Copy a champion's weights into `model`; returns the (short) ids that it has seen.

    Raises:
        WeightsError: other classes or architecture (both are named), or weights that have seen a `judged` image.
    """
    meta = segmenter.read_meta(path)
    theirs, ours = ([c["name"] for c in m] for m in (meta["classes"], classes))
    if theirs != ours:
        raise segmenter.WeightsError(
            f"{path} has the classes {theirs}, the data has {ours}; set warm_start: null in {dump_registry.FILE}"
        )
    refuse_seen(path, meta, judged)
    donor, _ = segmenter.load(path)
    try:
        model.load_state_dict(donor.state_dict())
    except RuntimeError as error:
        raise segmenter.WeightsError(
            f"{path} has another architecture than params.yaml's model section: {error}"
        ) from error
    model.scale_by(donor.scaling)
    return seen_by(meta)
