"""The last run's model as it comes before the gate: bundle, weights, scores and parity report, which must be one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipeline import paths
from pipeline.champions import history, metrics, store
from pipeline.champions.decision import number
from pipeline.champions.parity_report import ParityVerdict
from pipeline.champions.scored import Scored, read_scored
from pipeline.storage import atomic


@dataclass(frozen=True)
class Challenger:
    """The bundle of the last run with its weights, scores and parity report."""

    root: Path
    id: str
    scored: Scored
    scores: dict[str, Any]
    parity: ParityVerdict

    @property
    def bundle(self) -> Path:
        return self.root / paths.BUNDLE

    @property
    def student(self) -> Path:
        return self.root / paths.STUDENT_WEIGHTS

    @property
    def files(self) -> list[Path]:
        """What a champion's folder holds beside the bundle."""
        return [self.student, self.root / paths.SCORES, self.root / paths.CONFUSIONS]

    @property
    def miou(self) -> float | None:
        return number(metrics.miou(self.scored.confusion_NKK.sum(0)))

    def inconsistency(self) -> str | None:
        """Why this bundle, these weights, these scores and this parity report are not one model; None when they are."""
        weights = atomic.sha256(self.student)
        parity = self.parity
        if parity.bundle != self.id:
            return f"{paths.PARITY} is about bundle {parity.bundle}, not {self.id}; run the parity stage again"
        if self.scores["weights"] != weights or parity.weights != weights:
            return f"{self.student} is not what was evaluated and checked for parity; run `dvc repro` so that all three agree"
        if not parity.passed:
            return f"parity failed: {'; '.join(parity.failures) or f'see {paths.PARITY}'}"
        return None


def read_challenger(root: Path, id: str) -> Challenger:
    """The run in `root`, whose bundle is `id`. Raises ChampionError: a file is missing or damaged."""
    scores, confusions = root / paths.SCORES, root / paths.CONFUSIONS
    return Challenger(
        root=root,
        id=id,
        scored=read_scored(id, scores, confusions),
        parity=_read_verdict(root / paths.PARITY),
        scores=store.read_record(scores, ("weights",), "run the evaluate stage again"),
    )


def _read_verdict(path: Path) -> ParityVerdict:
    remedy = "run the parity stage again"
    try:
        return ParityVerdict.model_validate(store.read_record(path, (), remedy))
    except ValidationError as error:
        raise store.ChampionError(f"{path}: {error.errors()[0]['loc']} is malformed; {remedy}") from error


def _variants(bundle: Path) -> set[str]:
    """What a bundle offers; nothing where that cannot be read."""
    try:
        return {
            f"{o['runtime']} {o['device']} {o['precision']}"
            for o in atomic.read_json(bundle / "bundle.json")["options"]
        }
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _weights(home: Path, id: str) -> str | None:
    try:
        return str(atomic.read_json(home / id / "scores.json")["weights"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def added_variants(challenger: Challenger, rival: Scored, home: Path) -> str | None:
    """What a bundle of the champion's own weights offers beyond the champion's.

    None where the weights, the scores or the classes differ, it lacks a variant (which may be this machine's doing), adds
    none, or that network was rolled back from.
    """
    weights, scored = str(challenger.scores["weights"]), challenger.scored
    if weights != _weights(home, rival.id):
        return None
    if (scored.test_hash, scored.classes) != (rival.test_hash, rival.classes):
        return None
    if weights in {_weights(home, id) for id in history.withdrawn(history.read_history(home))}:
        return None
    if not np.array_equal(scored.confusion_NKK.sum(0), rival.confusion_NKK.sum(0)):
        return None
    now, before = _variants(challenger.bundle), _variants(home / rival.id / "bundle")
    return ", ".join(sorted(now - before)) if now > before > set() else None
