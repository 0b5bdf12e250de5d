"""A champion as champions/champion.json and the lines of champions/history.jsonl say it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

Number = int | float
LATER = frozenset({"rolled_back_from", "moved_at", "repaired", "repaired_at"})  # of one line, not of the champion


class ChampionData(BaseModel):
    """What it was trained on: images of each dump, images of each split, and the hashes of data, split and labels."""

    model_config = ConfigDict(frozen=True, extra="allow")
    dumps: dict[str, int] | None = None
    counts: dict[str, int] | None = None
    split_hash: str | None = None
    data_hash: str | None = None
    label_hash: str | None = None


class ChampionScores(BaseModel):
    """On the test split, in percent; the calibration error in 0..1."""

    model_config = ConfigDict(frozen=True, extra="allow")
    miou_ci: tuple[Number | None, Number | None] | None = None
    boundary_iou: Number | None = None
    pixel_accuracy: Number | None = None
    ece: Number | None = None
    test_images: int | None = None


class Champion(BaseModel):
    """The pointer's record, and one line of history each time the pointer moved or the files were written again.

    Records of older versions lack what is newer, and keep what this version does not know: `to_record` gives back the keys
    that were read.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    id: str
    bundle: str = ""  # paths from the project's folder
    student: str = ""
    previous: str | None = None  # the champion before it
    promoted_at: str | None = None

    # Why it won.
    miou: Number | None = None
    reason: str | None = None
    delta: Number | None = None
    ci: list[Number] | None = None
    comparison: int | None = None

    # What it was made from.
    data: ChampionData | None = None
    labelled: int | None = None
    test_hash: str | None = None
    params: dict[str, Any] | None = None
    warm_start: str | None = None  # the champion whose weights its training started from
    commit: str | None = None
    scores: ChampionScores | None = None

    # Of a line written at a rollback, or when damaged files were written again.
    rolled_back_from: str | None = None
    moved_at: str | None = None
    repaired: str | None = None
    repaired_at: str | None = None

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON, with the keys that were given."""
        return self.model_dump(mode="json", exclude_unset=True)

    def without_later(self) -> "Champion":
        """Without the own words of a rollback or repair."""
        return Champion.model_validate(self.model_dump(exclude_unset=True, exclude=set(LATER)))


def origin(trained: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a champion that say what it was made from.

    Args:
        trained: models/student/train.json. scores: reports/scores.json. Missing values become None.
    """
    start = trained.get("warm_start")
    return {
        "data": ChampionData(**{key: trained.get(key) for key in ChampionData.model_fields}),
        "labelled": trained.get("labelled"),
        "test_hash": scores.get("test_hash"),
        "params": trained.get("params"),
        "warm_start": Path(start).parent.name if start else None,
        "commit": scores.get("commit"),
        "scores": ChampionScores(**{key: scores.get(key) for key in ChampionScores.model_fields}),
    }
