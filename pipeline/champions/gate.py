"""The stage: challenger against champion; the pointer moves atomically or not at all.

The judgement is `pipeline.champions.decision`'s, the promotion `pipeline.champions.store.promote`'s. What is read here
must be one model: bundle, weights, scores and parity report name each other by hashes.
"""

import os
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline import config, paths
from pipeline.champions import alpha_spending, history, metrics, store
from pipeline.champions.decision import GateError, Scored, Verdict, judge, number
from pipeline.stage import Exit, Result
from pipeline.storage import atomic


def read_scored(id: str, scores_file: Path, confusions_file: Path, remedy: str = "run the evaluate stage") -> Scored:
    """Scores and per-image counts as evaluate left them.

    Raises:
        GateError: a file is missing or damaged, or the two do not belong together; the message ends with `remedy`.
    """
    for file in (scores_file, confusions_file):
        if not file.exists():
            raise GateError(f"{file}: not found; {remedy}")
    said = store.read_record(scores_file, ("test_hash", "weights"), f"{remedy} again")
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
    weights = atomic.sha256(student)
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
        store.check_copy(home, champion, student)
        _champions_scores(home, champion)
    except store.ChampionError as error:
        return str(error).partition("; ")[0]  # the rest is advice that is followed here
    return None


def _forms(bundle: Path) -> set[str]:
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


def _added_forms(challenger: Scored, weights: str, bundle: Path, rival: Scored, home: Path) -> str | None:
    """What a bundle of the champion's own weights offers beyond the champion's; None where the weights, the scores or the
    classes differ, it lacks a form (which may be this machine's doing), adds none, or that network was rolled back from."""
    if weights != _weights(home, rival.id) or (challenger.test_hash, challenger.classes) != (
        rival.test_hash,
        rival.classes,
    ):
        return None
    if weights in {_weights(home, id) for id in history.withdrawn(history.read(home))}:
        return None
    if not np.array_equal(challenger.confusion_NKK.sum(0), rival.confusion_NKK.sum(0)):
        return None
    now, before = _forms(bundle), _forms(home / rival.id / "bundle")
    return ", ".join(sorted(now - before)) if now > before > set() else None


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
    written again from it, and its record keeps what it won by. The champion's own network in a bundle with further forms
    (int8 that was left out before, say) takes its place without a comparison, unless it was rolled back from. Inside
    `experiment` nothing in `home` is written.

    Raises:
        ChampionError: missing or damaged inputs; the message names the file and what to do.
    """
    home = home or root / paths.CHAMPIONS
    with store.locked(home) if experiment is None else nullcontext():
        return _run(root, gate, experiment, home, now)


def _run(root: Path, gate: config.Gate, experiment: str | None, home: Path, now: Callable[[], datetime]) -> Verdict:
    reports, bundle = root / "reports", root / "bundle"
    student = root / "models/student/student.safetensors"
    inputs = [reports / "scores.json", reports / "confusions.npz"]
    for file in (student, reports / "parity.json"):
        if not file.exists():
            raise GateError(f"{file}: not found; run `dvc repro`")
    id = store.check_bundle(bundle)
    champion = store.pointer(home)
    if champion is not None and champion["id"] != id:
        champion = store.current(home)
    if champion is not None and experiment is None:
        store.settle(home, champion)
    challenger = read_scored(id, inputs[0], inputs[1])
    miou = number(metrics.miou(challenger.confusion_NKK.sum(0)))
    parity = store.read_record(reports / "parity.json", (), "run the parity stage again")
    said = store.read_record(inputs[0], ("weights",), "run the evaluate stage again")
    wrong = _belongs(id, student, said, parity)
    added: str | None = None
    move, harm, when = False, None, now().isoformat(timespec="seconds")
    if wrong is not None:
        verdict = Verdict("refused", wrong)
    elif champion is not None and champion["id"] == id:
        harm = None if experiment is not None else _damage(home, champion, student)
        reason, move = f"bundle {id} is the champion already", harm is not None
        if harm is not None:
            reason = f"{reason}; its files were written again, since {harm}"
        verdict = Verdict("kept", reason, miou=miou)
    elif id in history.withdrawn(history.read(home)):
        verdict = Verdict(
            "kept",
            f"bundle {id} was rolled back from; `marginalia rollback {id}` makes it the champion again, a new training "
            "may compete",
            miou=miou,
        )
    else:
        rival = _champions_scores(home, champion) if champion is not None else None
        if rival is not None and experiment is None:
            added = _added_forms(challenger, str(said["weights"]), bundle, rival, home)
        if rival is not None and added is not None:
            verdict = Verdict("promoted", f"the network of champion {rival.id}, exported anew with {added}", miou=miou)
        else:
            made = alpha_spending.read(home)
            pair = (challenger.test_hash, id, champion["id"] if champion is not None else "")
            verdict = judge(
                challenger, rival, gate, experiment=experiment, comparison=alpha_spending.number(made, pair)
            )
            if verdict.comparison is not None and experiment is None:
                alpha_spending.add(home, made, pair, {"at": when, "verdict": verdict.verdict, "delta": verdict.delta})
        move = verdict.verdict == "promoted"
    if move:
        trained = student.with_name("train.json")
        record = history.made_from(atomic.read_json(trained) if trained.exists() else {}, said) | {
            "id": id, "bundle": f"champions/{id}/bundle", "student": f"champions/{id}/student.safetensors",
            "previous": champion["id"] if champion else None, "promoted_at": when,
            "miou": verdict.miou, "reason": verdict.reason, "delta": verdict.delta, "ci": verdict.ci,
            "comparison": verdict.comparison,
        }  # fmt: skip
        if champion is not None and added is not None:
            record |= {name: champion.get(name) for name in ("delta", "ci", "comparison")}  # what its network won by
        if champion is not None and harm is not None:
            record = champion | {"repaired_at": when, "repaired": harm}
        store.promote(home, id, bundle, [student, *inputs], record)
    report = {**verdict.__dict__, "challenger": id, "champion": champion["id"] if champion else None}
    report |= {
        "confidence": gate.confidence,
        "sequential": gate.sequential,
        "warning": verdict.comparison
        and alpha_spending.worn(gate, verdict.comparison, len(challenger.images), challenger.test_hash),
        "draws": gate.bootstrap,
        "test_hash": challenger.test_hash,
        "test_images": len(challenger.images),
    }
    atomic.write_json(reports / "gate.json", report)
    return verdict


def stage(params: config.Params) -> Result:
    """The stage: bundle, student and their reports -> champions/ and reports/gate.json. A refusal is exit code 3."""
    # DVC sets both in the stages of `dvc exp run`: in the workspace, with --temp and from the queue. A temporary run
    # lies elsewhere, without champions/; DVC_ROOT is then still the project.
    experiment = os.environ.get("DVC_EXP_NAME") or None
    project = Path(os.environ.get("DVC_ROOT", "")) if experiment else Path()
    verdict = run(Path(), params.gate, experiment=experiment, home=project / paths.CHAMPIONS)

    report = atomic.read_json(paths.GATE)
    shown, warnings = (_table(verdict),), [report["warning"]] if report["warning"] else []
    if verdict.verdict == "refused":
        return Result(shown, warnings, (f"gate: refused: {verdict.reason}",), Exit.REFUSED, report)
    return Result(shown, warnings, record=report)


def _table(verdict: Verdict) -> Table:
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
    return table
