"""Challenger against champion on the same test images; the champion pointer moves atomically or not at all.

The judgement (pure, `judge`), for a challenger that passed parity and was scored on the champion's test hash and
classes:

- Both models' per-image confusion matrices are resampled with the *same* drawn images (paired bootstrap,
  `gate.bootstrap` draws), which removes the spread that both models share. The interval is the central
  `gate.confidence` one.
- promoted only if the lower bound of delta mIoU is above 0; a tie inside the interval keeps the champion.
- any class whose IoU falls by more than `gate.class_floor` points keeps the champion, whatever the mean says.
- a class named in `gate.guarded` blocks already when its fall exceeds half that floor, or when the upper bound of its
  delta is below 0 (a fall of any size that is not chance).
- without a champion: promoted if mIoU >= `gate.minimum_miou`.
- inside a DVC experiment nothing is promoted: what is tried must not reach the running service. The numbers are told.

The promotion itself is `pipeline.champions.promote`.
"""

import os
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline import champions, config, files, scores

SEED = 0
VERDICTS = Literal["promoted", "kept", "refused"]


class GateError(champions.ChampionError):
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


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _aligned(challenger: Scored, champion: Scored) -> NDArray[np.int64] | None:
    """The champion's matrices in the challenger's image order; None when the images are not the same set."""
    place = {image: i for i, image in enumerate(champion.images)}
    if set(place) != set(challenger.images) or len(place) != len(challenger.images):
        return None
    return champion.confusion_NKK[[place[image] for image in challenger.images]]


def _incomparable(challenger: Scored, champion: Scored, rest: NDArray[np.int64] | None) -> str | None:
    again = "run `python -m training.evaluate --champion` to score the champion on this test split, then `dvc repro`"
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


def judge(challenger: Scored, champion: Scored | None, gate: config.Gate, *, experiment: str | None = None) -> Verdict:
    """The rules above, from counts to a verdict; no file is touched. `experiment` names the DVC experiment, if any.

    Raises:
        GateError: a guarded class that does not exist, or no test image.
    """
    unknown = sorted(set(gate.guarded) - set(challenger.classes))
    if unknown:
        raise GateError(f"gate.guarded names {unknown}, which are not classes; known: {', '.join(challenger.classes)}")
    if not challenger.images:
        raise GateError("reports/confusions.npz holds no test image; give the test split images with masks")
    verdict = _judge(challenger, champion, gate)
    if experiment is None or verdict.verdict != "promoted":
        return verdict
    reason = (
        f"an experiment never moves the champion: `dvc exp apply {experiment}` and then `dvc repro -f -s gate` let it "
        f"compete; judged: {verdict.reason}"
    )
    return replace(verdict, verdict="kept", reason=reason)


def _judge(challenger: Scored, champion: Scored | None, gate: config.Gate) -> Verdict:
    miou = scores.miou(challenger.confusion_NKK.sum(0))
    if champion is None:
        if not miou >= gate.minimum_miou:
            return Verdict(
                "kept",
                f"no champion yet, and mIoU {miou:.2f} is below gate.minimum_miou {gate.minimum_miou:g}",
                miou=_number(miou),
            )
        return Verdict("promoted", f"first champion: mIoU {miou:.2f}", miou=miou)
    rest = _aligned(challenger, champion)
    reason = _incomparable(challenger, champion, rest)
    if reason is not None or rest is None:
        return Verdict("refused", reason or "", miou=_number(miou))
    return _compare(challenger, rest, gate)


def _compare(challenger: Scored, champion_NKK: NDArray[np.int64], gate: config.Gate) -> Verdict:
    pair = (challenger.confusion_NKK, champion_NKK)
    drawn = [scores.bootstrap(conf, samples=gate.bootstrap, seed=SEED) for conf in pair]
    new, old = (scores.iou(conf.sum(0)) for conf in pair)
    miou, champion_miou = (scores.miou(conf.sum(0)) for conf in pair)
    spread = scores.interval(100 * (scores.mean_present(drawn[0]) - scores.mean_present(drawn[1])), gate.confidence)
    delta = miou - champion_miou
    per_class: dict[str, dict[str, Any]] = {}
    fallen = []
    for c, name in enumerate(challenger.classes):
        change = 100 * float(new[c] - old[c])
        ci = scores.interval(100 * (drawn[0][:, c] - drawn[1][:, c]), gate.confidence)
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
            "delta": _number(change), "ci": ci.as_list() if ci else None,
            "challenger": _number(100 * float(new[c])), "champion": _number(100 * float(old[c])),
            "guarded": name in gate.guarded, "blocks": blocks is not None,
        }  # fmt: skip
    if spread is None or np.isnan(delta):
        return Verdict("kept", "no pixel of the test set could be compared", per_class=per_class)
    told = f"delta mIoU {delta:+.2f}, {100 * gate.confidence:g}% interval [{spread.low:+.2f}, {spread.high:+.2f}]"
    if fallen:
        verdict: VERDICTS = "kept"
        reason = f"{'; '.join(fallen)}; {told}"
    elif len(challenger.images) < 2:
        verdict, reason = "kept", f"{told}, but one test image says nothing about the spread: add test images"
    elif spread.low > 0:
        verdict, reason = "promoted", told
    else:
        verdict, reason = "kept", f"not better beyond chance: {told}"
    return Verdict(verdict, reason, delta, spread.as_list(), per_class, miou, champion_miou)


def read_scored(id: str, scores_file: Path, confusions_file: Path, remedy: str = "run the evaluate stage") -> Scored:
    """Scores and per-image counts as evaluate left them.

    Raises:
        GateError: a file is missing or damaged, or the two do not belong together; the message ends with `remedy`.
    """
    for file in (scores_file, confusions_file):
        if not file.exists():
            raise GateError(f"{file}: not found; {remedy}")
    said = champions.read_record(scores_file, ("test_hash", "weights"), f"{remedy} again")
    try:
        with np.load(confusions_file, allow_pickle=False) as arrays:
            hashes = str(arrays["test_hash"]), str(arrays["weights"])
            names, images = (tuple(map(str, arrays[key])) for key in ("classes", "ids"))
            counts_NKK = arrays["confusion"]
    except (
        OSError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise GateError(f"{confusions_file}: damaged ({error!r}); {remedy} again") from error
    if hashes != (said["test_hash"], said["weights"]):
        raise GateError(f"{confusions_file} and {scores_file} come from different runs; {remedy} again")
    wanted = (len(images), len(names), len(names))
    if counts_NKK.shape != wanted or counts_NKK.dtype.kind not in "iu":
        found = f"{counts_NKK.dtype} {counts_NKK.shape}"
        raise GateError(f"{confusions_file}: confusion is {found}, not whole numbers {wanted}; {remedy} again")
    return Scored(id, said["test_hash"], names, images, counts_NKK)


def _belongs(bundle_id: str, student: Path, said: dict[str, Any], parity: dict[str, Any]) -> str | None:
    """Why this bundle, these weights, these scores and this parity report are not one model; None when they are."""
    weights = files.sha256(student)
    if parity.get("bundle") != bundle_id:
        return (
            f"reports/parity.json is about bundle {parity.get('bundle')}, not {bundle_id}; run the parity stage again"
        )
    if said["weights"] != weights or parity.get("weights") != weights:
        return f"{student} is not what was evaluated and checked for parity; run `dvc repro` so that all three agree"
    if not parity.get("passed"):
        return f"parity failed: {'; '.join(parity.get('failures', [])) or 'see reports/parity.json'}"
    return None


def _champions_scores(home: Path, champion: dict[str, Any]) -> Scored:
    theirs = home / str(champion["id"])
    remedy = f"restore {theirs}, or move {home / 'champion.json'} away; then run `dvc repro -f -s gate`"
    return read_scored(theirs.name, theirs / "scores.json", theirs / "confusions.npz", remedy)


def _damage(home: Path, champion: dict[str, Any], student: Path) -> str | None:
    """What is wrong with the files of a champion whose weights are `student`, or None."""
    try:
        champions.check_copy(home, champion, student)
        _champions_scores(home, champion)
    except champions.ChampionError as error:
        return str(error).partition("; ")[0]  # the rest is advice that is followed here
    return None


def run(
    root: Path,
    gate: config.Gate,
    *,
    experiment: str | None = None,
    home: Path | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Verdict:
    """The stage: read, judge, promote if so, write reports/gate.json. `home` is the champions' folder, if not in `root`.

    A challenger that is the champion already is kept; when the champion's own files are damaged or gone, they are
    written again from it. Inside `experiment` nothing in `home` is written.

    Raises:
        ChampionError: missing or damaged inputs; the message names the file and what to do.
    """
    home, reports, bundle = home or root / "champions", root / "reports", root / "bundle"
    student = root / "models/student/student.safetensors"
    inputs = [reports / "scores.json", reports / "confusions.npz"]
    for file in (student, reports / "parity.json"):
        if not file.exists():
            raise GateError(f"{file}: not found; run `dvc repro`")
    id = champions.check_bundle(bundle)
    champion = champions.pointer(home)
    if champion is not None and champion["id"] != id:
        champion = champions.current(home)
    if champion is not None and experiment is None:
        champions.settle(home, champion)
    challenger = read_scored(id, inputs[0], inputs[1])
    parity = champions.read_record(reports / "parity.json", (), "run the parity stage again")
    said = champions.read_record(inputs[0], ("weights",), "run the evaluate stage again")
    wrong = _belongs(id, student, said, parity)
    move = False
    if wrong is not None:
        verdict = Verdict("refused", wrong)
    elif champion is not None and champion["id"] == id:
        harm = None if experiment is not None else _damage(home, champion, student)
        reason, move = f"bundle {id} is the champion already", harm is not None
        if harm is not None:
            reason = f"{reason}; its files were written again, since {harm}"
        verdict = Verdict("kept", reason, miou=_number(scores.miou(challenger.confusion_NKK.sum(0))))
    else:
        rival = None
        if champion is not None:
            rival = _champions_scores(home, champion)
        verdict = judge(challenger, rival, gate, experiment=experiment)
        move = verdict.verdict == "promoted"
    if move:
        record = {
            "id": id, "bundle": f"champions/{id}/bundle", "student": f"champions/{id}/student.safetensors",
            "previous": champion["id"] if champion else None, "promoted_at": now().isoformat(timespec="seconds"),
            "miou": verdict.miou, "reason": verdict.reason,
        }  # fmt: skip
        if champion is not None and champion["id"] == id:
            record["previous"] = champion.get("previous")
        champions.promote(home, id, bundle, [student, *inputs], record)
    report = {**verdict.__dict__, "challenger": id, "champion": champion["id"] if champion else None}
    report |= {
        "confidence": gate.confidence,
        "draws": gate.bootstrap,
        "test_hash": challenger.test_hash,
        "test_images": len(challenger.images),
    }
    files.write_json(reports / "gate.json", report)
    return verdict


def _show(verdict: Verdict, console: Console) -> None:
    table = Table(
        "class", "champion", "challenger", "delta", "interval", title=f"gate: {verdict.verdict}", caption=verdict.reason
    )
    for name, row in verdict.per_class.items():
        cells = ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("champion", "challenger", "delta")]
        ci = "-" if row["ci"] is None else f"{row['ci'][0]:+.2f} .. {row['ci'][1]:+.2f}"
        table.add_row(
            f"{name} (guarded)" if row["guarded"] else name, *cells, ci, style="red" if row["blocks"] else None
        )
    if verdict.delta is not None and verdict.ci is not None:
        cells = [f"{value:.2f}" for value in (verdict.champion_miou or 0.0, verdict.miou or 0.0, verdict.delta)]
        table.add_row("mIoU", *cells, f"{verdict.ci[0]:+.2f} .. {verdict.ci[1]:+.2f}", style="bold")
    console.print(table)


def main() -> int:
    """Exit code 0 for promoted and kept, 1 for refused or unusable inputs (the reason is printed)."""
    try:
        # DVC sets both in the stages of `dvc exp run`: in the workspace, with --temp and from the queue. A temporary run
        # lies elsewhere, without champions/; DVC_ROOT is then still the project.
        experiment = os.environ.get("DVC_EXP_NAME") or None
        project = Path(os.environ.get("DVC_ROOT", "")) if experiment else Path()
        verdict = run(Path(), config.load().gate, experiment=experiment, home=project / "champions")
    except (champions.ChampionError, config.ConfigError) as error:
        Console(stderr=True).print(f"gate: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    _show(verdict, Console())
    return 1 if verdict.verdict == "refused" else 0


if __name__ == "__main__":
    sys.exit(main())
