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

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import config
from pipeline.champions import alpha_spending, metrics, store

SEED = 0
VERDICTS = Literal["promoted", "kept", "refused"]


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


@dataclass(frozen=True)
class Verdict:
    verdict: VERDICTS
    reason: str
    delta: float | None = None
    ci: list[float] | None = None
    per_class: dict[str, dict[str, Any]] = field(default_factory=dict)
    miou: float | None = None
    champion_miou: float | None = None
    comparison: int | None = None


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
            "mIoUs mean different things; start a new line of champions by moving champions/champion.json away"
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
        raise GateError("reports/confusions.npz holds no test image; give the test split images with masks")
    verdict = _judge(challenger, champion, gate, comparison)
    if experiment is None or verdict.verdict != "promoted":
        return verdict
    reason = (
        f"an experiment never moves the champion: `dvc exp apply {experiment}` and then `dvc repro -f -s gate` let it "
        f"compete; judged: {verdict.reason}"
    )
    return replace(verdict, verdict="kept", reason=reason)


def _judge(challenger: Scored, champion: Scored | None, gate: config.Gate, comparison: int) -> Verdict:
    miou = metrics.miou(challenger.confusion_NKK.sum(0))
    if champion is None:
        if not miou >= gate.minimum_miou:
            return Verdict(
                "kept",
                f"no champion yet, and mIoU {miou:.2f} is below gate.minimum_miou {gate.minimum_miou:g}",
                miou=number(miou),
            )
        return Verdict("promoted", f"first champion: mIoU {miou:.2f}", miou=miou)
    rest = _aligned(challenger, champion)
    reason = _incomparable(challenger, champion, rest)
    if reason is not None or rest is None:
        return Verdict("refused", reason or "", miou=number(miou))
    return _compare(challenger, rest, gate, comparison)


def _compare(challenger: Scored, champion_NKK: NDArray[np.int64], gate: config.Gate, comparison: int) -> Verdict:
    pair = (challenger.confusion_NKK, champion_NKK)
    drawn = [metrics.bootstrap(conf, samples=gate.bootstrap, seed=SEED) for conf in pair]
    new, old = (metrics.iou(conf.sum(0)) for conf in pair)
    miou, champion_miou = (metrics.miou(conf.sum(0)) for conf in pair)
    spread = metrics.interval(100 * (metrics.mean_present(drawn[0]) - metrics.mean_present(drawn[1])), gate.confidence)
    delta = miou - champion_miou
    per_class: dict[str, dict[str, Any]] = {}
    fallen = []
    for c, name in enumerate(challenger.classes):
        change = 100 * float(new[c] - old[c])
        ci = metrics.interval(100 * (drawn[0][:, c] - drawn[1][:, c]), gate.confidence)
        blocks = None
        if change < -gate.class_floor:
            blocks = f"{name} falls by {-change:.2f} points (gate.class_floor {gate.class_floor:g})"
        elif name in gate.guarded and change < -gate.class_floor / 2:
            blocks = f"guarded {name} falls by {-change:.2f} points (half of gate.class_floor {gate.class_floor:g})"
        elif name in gate.guarded and ci is not None and ci.high < 0:
            blocks = f"guarded {name} falls by {-change:.2f} points, interval [{ci.low:.2f}, {ci.high:.2f}] below 0"
        if blocks:
            fallen.append(blocks)
        per_class[name] = {
            "delta": number(change), "ci": ci.as_list() if ci else None,
            "challenger": number(100 * float(new[c])), "champion": number(100 * float(old[c])),
            "guarded": name in gate.guarded, "blocks": blocks is not None,
        }  # fmt: skip
    if spread is None or np.isnan(delta):
        return Verdict("kept", "no pixel of the test set could be compared", per_class=per_class)
    wider = alpha_spending.widening(gate, comparison, len(challenger.images))
    low, high = (delta + wider * (end - delta) for end in (spread.low, spread.high))
    told = f"delta mIoU {delta:+.2f}, {100 * gate.confidence:g}% interval [{low:+.2f}, {high:+.2f}]"
    if wider > 1:
        told += f", {wider:.2f} times as wide as at first: challenger {comparison} on this test set"
    if fallen:
        verdict: VERDICTS = "kept"
        reason = f"{'; '.join(fallen)}; {told}"
    elif len(challenger.images) < 2:
        verdict, reason = "kept", f"{told}, but one test image says nothing about the spread: add test images"
    elif low > 0:
        verdict, reason = "promoted", told
    else:
        verdict, reason = "kept", f"not better beyond chance: {told}"
    return Verdict(verdict, reason, delta, [low, high], per_class, miou, champion_miou, comparison)
