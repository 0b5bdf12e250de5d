"""The stage: challenger against champion; the pointer moves atomically or not at all.

The judgement is `pipeline.champions.decision`'s, the promotion `pipeline.champions.store.promote`'s. What is read here
must be one model: bundle, weights, scores and parity report name each other by hashes.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from pipeline import config, paths
from pipeline.champions import alpha_spending, history, store
from pipeline.champions.alpha_spending import GateComparison
from pipeline.champions.challenger import Challenger, added_variants, read_challenger
from pipeline.champions.champion import Champion, origin
from pipeline.champions.decision import VERDICTS, Verdict, judge
from pipeline.champions.scored import GateError, Scored, read_scored
from pipeline.stage import Exit, Result
from pipeline.storage import atomic


class GateReport(Verdict):
    """reports/gate.json: the verdict, between which two, and the rules it was made by."""

    challenger: str
    champion: str | None  # of before
    confidence: float
    sequential: str
    warning: str | None
    draws: int
    test_hash: str
    test_images: int


@dataclass(frozen=True)
class Outcome:
    """The verdict, and what the pointer says from now on; None where it stays."""

    verdict: Verdict
    champion: Champion | None = None


@dataclass(frozen=True)
class Trial:
    """One challenger before the gate. `home` is the champions' folder; inside `experiment` nothing there is written."""

    home: Path
    gate: config.Gate
    challenger: Challenger
    champion: Champion | None
    experiment: str | None
    when: str

    def decide(self) -> Outcome:
        """Raises ChampionError where the champion's own scores are missing or damaged."""
        challenger = self.challenger
        wrong = challenger.inconsistency()
        if wrong is not None:
            return Outcome(Verdict(verdict="refused", reason=wrong))
        if self.champion is not None and self.champion.id == challenger.id:
            return self._champion_again(self.champion)
        if challenger.id in history.withdrawn(history.read_history(self.home)):
            reason = (
                f"bundle {challenger.id} was rolled back from; `marginalia rollback {challenger.id}` makes it the champion "
                "again, a new training may compete"
            )
            return self._outcome("kept", reason)

        if self.champion is None:
            return self._compared(None)
        rival = _champion_scored(self.home, self.champion)
        if self.experiment is None and (added := added_variants(challenger, rival, self.home)) is not None:
            return self._more_variants(self.champion, added)
        return self._compared(rival)

    def _champion_again(self, champion: Champion) -> Outcome:
        """The challenger is the champion: it is kept, and its files are written again where they are damaged."""
        harm = None if self.experiment is not None else _damage(self.home, champion, self.challenger.student)
        reason = f"bundle {champion.id} is the champion already"
        if harm is None:
            return self._outcome("kept", reason)
        repaired = champion.model_copy(update={"repaired_at": self.when, "repaired": harm})
        return self._outcome("kept", f"{reason}; its files were written again, since {harm}", repaired)

    def _more_variants(self, champion: Champion, added: str) -> Outcome:
        """The champion's own network with further variants takes its place, and keeps what that network won by."""
        reason = f"the network of champion {champion.id}, exported anew with {added}"
        verdict = Verdict(verdict="promoted", reason=reason, miou=self.challenger.miou)
        won_by = {"delta": champion.delta, "ci": champion.ci, "comparison": champion.comparison}
        return Outcome(verdict, self._promoted(verdict).model_copy(update=won_by))

    def _compared(self, rival: Scored | None) -> Outcome:
        made = alpha_spending.read_comparisons(self.home)
        challenger = self.challenger
        pair = (challenger.scored.test_hash, challenger.id, self.champion.id if self.champion is not None else "")
        count = alpha_spending.comparison_number(made, pair)
        verdict = judge(challenger.scored, rival, self.gate, experiment=self.experiment, comparison=count)

        if verdict.comparison is not None and self.experiment is None:
            line = GateComparison(
                test_hash=pair[0],
                challenger=pair[1],
                champion=pair[2],
                at=self.when,
                verdict=verdict.verdict,
                delta=verdict.delta,
            )
            alpha_spending.add_comparison(self.home, made, line)
        return Outcome(verdict, self._promoted(verdict) if verdict.verdict == "promoted" else None)

    def _outcome(self, verdict: VERDICTS, reason: str, champion: Champion | None = None) -> Outcome:
        return Outcome(Verdict(verdict=verdict, reason=reason, miou=self.challenger.miou), champion)

    def _promoted(self, verdict: Verdict) -> Champion:
        """The challenger's record as champion."""
        id = self.challenger.id
        trained = self.challenger.student.with_name("train.json")
        return Champion(
            **origin(atomic.read_json(trained) if trained.exists() else {}, self.challenger.scores),
            id=id,
            bundle=(paths.CHAMPIONS / id / "bundle").as_posix(),
            student=(paths.CHAMPIONS / id / "student.safetensors").as_posix(),
            previous=self.champion.id if self.champion else None,
            promoted_at=self.when,
            miou=verdict.miou,
            reason=verdict.reason,
            delta=verdict.delta,
            ci=verdict.ci,
            comparison=verdict.comparison,
        )

    def report(self, verdict: Verdict) -> GateReport:
        scored = self.challenger.scored
        warning = None
        if verdict.comparison is not None:
            warning = alpha_spending.worn(self.gate, verdict.comparison, len(scored.images), scored.test_hash)
        return GateReport(
            **dict(verdict),
            challenger=self.challenger.id,
            champion=self.champion.id if self.champion else None,
            confidence=self.gate.confidence,
            sequential=self.gate.sequential,
            warning=warning,
            draws=self.gate.bootstrap,
            test_hash=scored.test_hash,
            test_images=len(scored.images),
        )


def _champion_scored(home: Path, champion: Champion) -> Scored:
    folder = home / champion.id
    remedy = f"restore {folder}, or move {home / 'champion.json'} away; then run `dvc repro -f -s gate`"
    return read_scored(folder.name, folder / "scores.json", folder / "confusions.npz", remedy)


def _damage(home: Path, champion: Champion, student: Path) -> str | None:
    """What is wrong with the files of a champion whose weights are `student`, or None."""
    try:
        store.check_copy(home, champion, student)
        _champion_scored(home, champion)
    except store.ChampionError as error:
        return str(error).partition("; ")[0]  # the rest is advice that is followed here
    return None


def run(
    root: Path,
    gate: config.Gate,
    *,
    experiment: str | None = None,
    home: Path | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> GateReport:
    """The stage: read, judge, promote if so, write reports/gate.json. `home` is the champions' folder, if not in `root`.

    A challenger that is the champion already is kept; when the champion's own files are damaged or gone, they are
    written again from it, and its record keeps what it won by. The champion's own network in a bundle with further
    variants (int8 that was left out before, say) takes its place without a comparison, unless it was rolled back from.
    Inside `experiment` nothing in `home` is written.

    Raises:
        ChampionError: missing or damaged inputs; the message names the file and what to do.
    """
    home = home or root / paths.CHAMPIONS
    with store.locked(home) if experiment is None else nullcontext():
        for file in (root / paths.STUDENT_WEIGHTS, root / paths.PARITY):
            if not file.exists():
                raise GateError(f"{file}: not found; run `dvc repro`")
        id = store.check_bundle(root / paths.BUNDLE)
        champion = _standing(home, id)
        if champion is not None and experiment is None:
            store.settle(home, champion)

        challenger = read_challenger(root, id)
        trial = Trial(home, gate, challenger, champion, experiment, now().isoformat(timespec="seconds"))
        outcome = trial.decide()
        if outcome.champion is not None:
            store.promote(home, id, challenger.bundle, challenger.files, outcome.champion)

        report = trial.report(outcome.verdict)
        atomic.write_json(root / paths.GATE, report.model_dump(mode="json"))
        return report


def _standing(home: Path, challenger: str) -> Champion | None:
    """The champion of now. Its bundle may be gone where the challenger is the same one, and can restore it."""
    champion = store.read_pointer(home)
    return champion if champion is None or champion.id == challenger else store.read_champion(home)


def stage(params: config.Params) -> Result:
    """The stage: bundle, student and their reports -> champions/ and reports/gate.json. A refusal is exit code 3."""
    # DVC sets both in the stages of `dvc exp run`: in the workspace, with --temp and from the queue. A temporary run
    # lies elsewhere, without champions/; DVC_ROOT is then still the project.
    experiment = os.environ.get("DVC_EXP_NAME") or None
    project = Path(os.environ.get("DVC_ROOT", "")) if experiment else Path()
    report = run(Path(), params.gate, experiment=experiment, home=project / paths.CHAMPIONS)

    shown = (_table(report),)
    warnings = [report.warning] if report.warning else []
    record = report.model_dump(mode="json")
    if report.verdict == "refused":
        return Result(shown, warnings, (f"gate: refused: {report.reason}",), Exit.REFUSED, record)
    return Result(shown, warnings, record=record)


def _table(verdict: Verdict) -> Table:
    table = Table(
        "class", "champion", "challenger", "delta", "interval", title=f"gate: {verdict.verdict}", caption=verdict.reason
    )
    for name, row in verdict.per_class.items():
        cells = ["-" if value is None else f"{value:.2f}" for value in (row.champion, row.challenger, row.delta)]
        ci = "-" if row.ci is None else f"{row.ci[0]:+.2f} .. {row.ci[1]:+.2f}"
        table.add_row(f"{name} (guarded)" if row.guarded else name, *cells, ci, style="red" if row.blocks else None)
    if verdict.delta is not None and verdict.ci is not None:
        cells = [f"{value:.2f}" for value in (verdict.champion_miou or 0.0, verdict.miou or 0.0, verdict.delta)]
        table.add_row("mIoU", *cells, f"{verdict.ci[0]:+.2f} .. {verdict.ci[1]:+.2f}", style="bold")
    return table
