"""What methods gain over labels alone, against the scatter of seeds and the most that more labels could bring."""

import math
import statistics
from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict

BASELINE = "supervised"
CEILING = "ceiling"
# A ceiling this many times the scatter above labels alone, or more, leaves something for a method to show.
ENOUGH = 2.0


class Gain(BaseModel):
    """One method in a comparison. Scores and gains are mIoU in percent; None where it cannot be known.

    Attributes:
        scatter: standard deviation of the method over its seeds.
        gain: mean over the seeds that it shares with the baseline of the difference to the baseline of that seed.
        gain_to_scatter: `gain` over the comparison's scatter.
        share: of the headroom, closed by the method; 1 is the ceiling. None where there is no headroom.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    seeds: int
    miou: float
    scatter: float | None
    gain: float | None
    gain_to_scatter: float | None
    share: float | None


class Comparison(BaseModel):
    """Methods beside each other.

    Attributes:
        scatter: standard deviation between the seeds of one method, pooled over the methods; None with one seed each.
        headroom: gain of the ceiling; None where no ceiling was run.
    """

    model_config = ConfigDict(frozen=True)

    baseline: str
    scatter: float | None
    headroom: float | None
    rows: tuple[Gain, ...]

    @property
    def has_headroom(self) -> bool | None:
        """Whether the ceiling is above the baseline by at least twice the scatter; None where either is not known."""
        return None if self.headroom is None else _leaves_room(self.headroom, self.scatter)

    @property
    def verdict(self) -> str:
        """One sentence on the headroom, for the foot of a table."""
        if self.headroom is None:
            return f"no ceiling was run: how much of {self.baseline}'s distance to it a method closes is not known"
        found = f"ceiling {self.headroom:+.2f} over {self.baseline}"
        match self.has_headroom:
            case None:
                return f"{found}; one seed has no scatter to hold it against"
            case False:
                return f"no headroom here: {found}, scatter of seeds {self.scatter or 0.0:.2f}"
        return f"headroom {self.headroom:.2f}, scatter of seeds {self.scatter:.2f}"


def compare(scores: Mapping[str, Mapping[int, float]], baseline: str = BASELINE, ceiling: str = CEILING) -> Comparison:
    """Gains of every method over `baseline`, paired by seed.

    Args:
        scores: method -> seed -> mIoU in percent. `ceiling` may be absent.
    Raises:
        ValueError: `baseline` was not run, or a method has no score.
    """
    if not scores.get(baseline):
        raise ValueError(f"gains are over {baseline}, which was not run; add it to the methods")
    if empty := [method for method, by_seed in scores.items() if not by_seed]:
        raise ValueError(f"no scores of {', '.join(empty)}")

    scatter = pooled_scatter([by_seed.values() for by_seed in scores.values()])
    headroom = _paired_gain(scores[ceiling], scores[baseline]) if ceiling in scores else None
    room = headroom is not None and _leaves_room(headroom, scatter) is not False

    rows = []
    for method, by_seed in scores.items():
        gain = _paired_gain(by_seed, scores[baseline])
        rows.append(
            Gain(
                method=method,
                seeds=len(by_seed),
                miou=statistics.mean(by_seed.values()),
                scatter=statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None,
                gain=gain,
                gain_to_scatter=gain / scatter if gain is not None and scatter else None,
                share=gain / headroom if gain is not None and headroom and room else None,
            )
        )
    return Comparison(baseline=baseline, scatter=scatter, headroom=headroom, rows=tuple(rows))


def pooled_scatter(groups: Iterable[Iterable[float]]) -> float | None:
    """Standard deviation within groups, each about its own mean; None where no group has two values."""
    squares, degrees = 0.0, 0
    for group in groups:
        values = list(group)
        mean = statistics.mean(values)
        squares += sum((value - mean) ** 2 for value in values)
        degrees += len(values) - 1
    return math.sqrt(squares / degrees) if degrees else None


def _leaves_room(headroom: float, scatter: float | None) -> bool | None:
    if headroom <= 0:
        return False
    return None if scatter is None else headroom >= ENOUGH * scatter


def _paired_gain(scores: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """Mean difference over the seeds that both have; None without such a seed."""
    common = scores.keys() & baseline.keys()
    return statistics.mean(scores[seed] - baseline[seed] for seed in sorted(common)) if common else None
