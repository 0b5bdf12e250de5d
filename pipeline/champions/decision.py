"""Challenger against champion on the same test images: from counts to a verdict. Pure; no file is touched.

For a challenger that passed parity and was scored on the champion's test hash and classes:

- Both models' per-image confusion matrices are resampled with the *same* drawn images (paired bootstrap,
  `gate.bootstrap` draws), which removes the spread that both models share. The interval is the central
  `gate.confidence` one, and wider the more challengers the test set has judged (`pipeline.champions.alpha_spending`).
- promoted only if the lower bound of delta mIoU is above 0; a tie inside the interval keeps the champion.
- any class whose IoU falls by more than `gate.class_floor` points keeps the champion, whatever the mean says.
- a class named in `gate.guarded` blocks already when its fall exceeds half that floor, or when the upper bound of its
  delta is below 0 (a fall of any size that is not chance).
- without a champion: promoted if mIoU >= `gate.minimum_miou`.
- inside a DVC experiment nothing is promoted: what is tried must not reach the running service. The numbers are told.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline import config, paths
from pipeline.champions import alpha_spending, metrics
from pipeline.champions.scored import GateError, Scored

SEED = 0
VERDICTS = Literal["promoted", "kept", "refused"]


class ClassComparison(BaseModel):
    """One class's IoU in percent, the challenger's minus the champion's with its interval, and whether it blocks."""

    model_config = ConfigDict(frozen=True)
    delta: float | None
    ci: list[float] | None
    challenger: float | None
    champion: float | None
    guarded: bool
    blocks: bool


class Verdict(BaseModel):
    """What the gate decides and why; mIoU and their difference in percent, None where they were not compared."""

    model_config = ConfigDict(frozen=True)
    verdict: VERDICTS
    reason: str
    delta: float | None = None
    ci: list[float] | None = None
    per_class: dict[str, ClassComparison] = {}
    miou: float | None = None
    champion_miou: float | None = None
    comparison: int | None = None  # which one on this test set, from 1


def number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _aligned(challenger: Scored, champion: Scored) -> NDArray[np.int64] | None:
    """The champion's matrices in the challenger's image order; None when the images are not the same set."""
    place = {image: i for i, image in enumerate(champion.images)}
    if set(place) != set(challenger.images) or len(place) != len(challenger.images):
        return None
    return champion.confusion_NKK[[place[image] for image in challenger.images]]


def _incomparable(challenger: Scored, champion: Scored, rest: NDArray[np.int64] | None) -> str | None:
    again = "run `marginalia rescore` to score the champion on this test split, then `dvc repro`"
    if challenger.classes != champion.classes:
        return (
            f"class lists differ (challenger {list(challenger.classes)}, champion {list(champion.classes)}): the two "
            f"mIoUs mean different things; start a new line of champions by moving {paths.CHAMPION} away"
        )
    if challenger.test_hash != champion.test_hash:
        hashes = f"test_hash {challenger.test_hash[:12]}, champion's {champion.test_hash[:12]}"
        return f"scored on another test set ({hashes}); {again}"
    if rest is None:
        return f"the per-image results are of different images although the test hash is the same; {again}"
    return None


def judge(
    challenger: Scored,
    champion: Scored | None,
    gate: config.Gate,
    *,
    experiment: str | None = None,
    comparison: int = 1,
) -> Verdict:
    """The rules above, from counts to a verdict; no file is touched.

    Args:
        experiment: name of the DVC experiment, if any.
        comparison: which one on this test set it is, from 1.

    Raises:
        GateError: a guarded class that does not exist, or no test image.
    """
    unknown = sorted(set(gate.guarded) - set(challenger.classes))
    if unknown:
        raise GateError(f"gate.guarded names {unknown}, which are not classes; known: {', '.join(challenger.classes)}")
    if not challenger.images:
        raise GateError(f"{paths.CONFUSIONS} holds no test image; give the test split images with masks")
    verdict = _judge(challenger, champion, gate, comparison)
    if experiment is None or verdict.verdict != "promoted":
        return verdict
    reason = (
        f"an experiment never moves the champion: `dvc exp apply {experiment}` and then `dvc repro -f -s gate` let it "
        f"compete; judged: {verdict.reason}"
    )
    return verdict.model_copy(update={"verdict": "kept", "reason": reason})


def _judge(challenger: Scored, champion: Scored | None, gate: config.Gate, comparison: int) -> Verdict:
    miou = metrics.miou(challenger.confusion_NKK.sum(0))
    if champion is None:
        if miou >= gate.minimum_miou:
            return Verdict(verdict="promoted", reason=f"first champion: mIoU {miou:.2f}", miou=miou)
        reason = f"no champion yet, and mIoU {miou:.2f} is below gate.minimum_miou {gate.minimum_miou:g}"
        return Verdict(verdict="kept", reason=reason, miou=number(miou))

    champion_NKK = _aligned(challenger, champion)
    wrong = _incomparable(challenger, champion, champion_NKK)
    if wrong is not None or champion_NKK is None:
        return Verdict(verdict="refused", reason=wrong or "", miou=number(miou))
    return _compare(challenger, champion_NKK, gate, comparison)


def _compare(challenger: Scored, champion_NKK: NDArray[np.int64], gate: config.Gate, comparison: int) -> Verdict:
    pair = (challenger.confusion_NKK, champion_NKK)
    new_SK, old_SK = (metrics.bootstrap(counts_NKK, samples=gate.bootstrap, seed=SEED) for counts_NKK in pair)
    miou, champion_miou = (metrics.miou(counts_NKK.sum(0)) for counts_NKK in pair)
    delta = miou - champion_miou
    spread = metrics.interval(100 * (metrics.mean_present(new_SK) - metrics.mean_present(old_SK)), gate.confidence)

    new_K, old_K = (metrics.iou(counts_NKK.sum(0)) for counts_NKK in pair)
    per_class: dict[str, ClassComparison] = {}
    falls = []
    for c, name in enumerate(challenger.classes):
        change = 100 * float(new_K[c] - old_K[c])
        ci = metrics.interval(100 * (new_SK[:, c] - old_SK[:, c]), gate.confidence)
        fall = _unacceptable_fall(name, change, ci, gate)
        if fall is not None:
            falls.append(fall)
        per_class[name] = ClassComparison(
            delta=number(change),
            ci=ci.as_list() if ci else None,
            challenger=number(100 * float(new_K[c])),
            champion=number(100 * float(old_K[c])),
            guarded=name in gate.guarded,
            blocks=fall is not None,
        )
    if spread is None or np.isnan(delta):
        return Verdict(verdict="kept", reason="no pixel of the test set could be compared", per_class=per_class)

    wider = alpha_spending.widening(gate, comparison, len(challenger.images))
    low, high = (delta + wider * (end - delta) for end in (spread.low, spread.high))
    numbers = f"delta mIoU {delta:+.2f}, {100 * gate.confidence:g}% interval [{low:+.2f}, {high:+.2f}]"
    if wider > 1:
        numbers += f", {wider:.2f} times as wide as at first: challenger {comparison} on this test set"
    verdict, reason = _weigh(falls, len(challenger.images), low, numbers)
    return Verdict(
        verdict=verdict,
        reason=reason,
        delta=delta,
        ci=[low, high],
        per_class=per_class,
        miou=miou,
        champion_miou=champion_miou,
        comparison=comparison,
    )


def _unacceptable_fall(name: str, change: float, ci: metrics.Interval | None, gate: config.Gate) -> str | None:
    """Why a class's change, in points, keeps the champion, or None."""
    if change < -gate.class_floor:
        return f"{name} falls by {-change:.2f} points (gate.class_floor {gate.class_floor:g})"
    if name not in gate.guarded:
        return None
    if change < -gate.class_floor / 2:
        return f"guarded {name} falls by {-change:.2f} points (half of gate.class_floor {gate.class_floor:g})"
    if ci is not None and ci.high < 0:
        return f"guarded {name} falls by {-change:.2f} points, interval [{ci.low:.2f}, {ci.high:.2f}] below 0"
    return None


def _weigh(falls: Sequence[str], images: int, low: float, numbers: str) -> tuple[VERDICTS, str]:
    """Verdict and reason, from what speaks against the challenger and the lower end of its gain."""
    if falls:
        return "kept", f"{'; '.join(falls)}; {numbers}"
    if images < 2:
        return "kept", f"{numbers}, but one test image says nothing about the spread: add test images"
    if low > 0:
        return "promoted", numbers
    return "kept", f"not better beyond chance: {numbers}"
