"""How often a test set has judged, and how much surer the gate must be for it: champions/comparisons.jsonl.

Every challenger that is compared on one test set is one more chance for luck to look like progress. `gate.sequential:
spend` shares one budget, alpha = 1 - `gate.confidence`, over all comparisons that will ever be made on a test hash: the
k-th may promote by chance with probability alpha / (k (k + 1)). These sum to alpha, however many follow, and the first
is alpha / 2: what the lower end of a central interval at `gate.confidence` allows, so the first comparison is as it would
be without. (Alpha spending: Lan and DeMets, Biometrika 70, 1983; for reused test sets, Blum and Hardt, "The Ladder", ICML
2015: challengers that are made knowing nothing of the test set but the verdicts so far are fixed in advance up to the first
false promotion, so the union bound holds. Who tunes on reports/scores.json spends more than is counted here.)

A percentile of the bootstrap cannot show tails much thinner than one over its draws. So the first comparison's interval is
widened about the observed delta by the ratio of the two tails' quantiles, Student's for the number of test images: 1 at
k = 1; for 100 images 1.2 at 2, 1.7 at 10, 1.9 at 20. With fewer than about 50 test images the percentile interval is too
narrow to begin with, and the budget is overdrawn by as much.

The same pair on the same test set is one comparison, however often the gate runs. Another test hash starts anew; a test set
that only gained an image has another hash too and is not fresh, which no hash can know.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import config
from pipeline.champions import store
from pipeline.storage import atomic

FILE = "comparisons.jsonl"
WORN = 20  # comparisons: a gain must then be twice as clear as what convinced at first

Pair = tuple[str, str, str]  # test hash, challenger, champion


def widening(gate: config.Gate, comparison: int, images: int) -> float:
    """By how much the k-th comparison's interval is wider than the first's over the same `images`; counts from 1."""
    if gate.sequential == "none":
        return 1.0
    alpha = 1 - gate.confidence
    tails = alpha / (comparison * (comparison + 1)), alpha / 2
    now, first = (_student(-NormalDist().inv_cdf(tail), max(1, images - 1)) for tail in tails)
    return now / first


def _student(z: float, freedom: int) -> float:
    """Student's quantile at the normal quantile z (D. L. Wallace, Ann. Math. Stat. 30, 1959, turned round; within 1 % from
    10 degrees of freedom on)."""
    scaled = z * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(scaled**2 / freedom))


class GateComparison(BaseModel):
    """One line of comparisons.jsonl; lines of older versions may lack what followed from it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    test_hash: str
    challenger: str
    champion: str  # "" where there was none
    at: str | None = None
    verdict: str | None = None
    delta: int | float | None = None

    @property
    def pair(self) -> Pair:
        return self.test_hash, self.challenger, self.champion

    def to_line(self) -> str:
        return json.dumps(self.model_dump(mode="json", exclude_unset=True), sort_keys=True) + "\n"


def read_comparisons(home: Path) -> list[GateComparison]:
    """Oldest first. Raises ChampionError that names a damaged line."""
    file = home / FILE
    comparisons = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else [], 1):
        try:
            comparisons.append(GateComparison.model_validate(json.loads(line)))
        except ValueError as error:  # no JSON, or no such record
            wrong = store.first_problem(error) if isinstance(error, ValidationError) else error
            raise store.ChampionError(
                f"{file}: line {number} is no comparison ({wrong}); mend or remove that line, then run "
                "`dvc repro -f -s gate`"
            ) from error
    return comparisons


def comparison_number(comparisons: Sequence[GateComparison], pair: Pair) -> int:
    """Which comparison on its test set this pair is, from 1; one that was made already keeps its number."""
    known = list(dict.fromkeys(made.pair for made in comparisons if made.test_hash == pair[0]))
    return known.index(pair) + 1 if pair in known else len(known) + 1


def add_comparison(home: Path, comparisons: Sequence[GateComparison], comparison: GateComparison) -> None:
    """Write one more line, unless the pair has one. Before the pointer moves: what was looked at is never forgotten."""
    if comparison.pair not in [made.pair for made in comparisons]:
        atomic.write_text(home / FILE, "".join(made.to_line() for made in [*comparisons, comparison]))


def worn(gate: config.Gate, comparison: int, images: int, test_hash: str) -> str | None:
    """What to tell when a test set has judged too often."""
    if comparison < WORN:
        return None
    wider = widening(gate, comparison, images)
    price = f"a gain must be {wider:.1f} times as clear as at first" if wider > 1 else "chance alone promotes by now"
    return (
        f"test set {test_hash[:12]} has judged {comparison} challengers, so {price}: label a fresh test set, then run "
        "`marginalia rescore` and `dvc repro`"
    )
