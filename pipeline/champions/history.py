"""What champions/history.jsonl says: every champion, what it was made from, what changed and why it won.

A line is the pointer's record at the moment that the pointer moved: at a promotion, or at a rollback (then with
`rolled_back_from` and `moved_at`); or that the champion's damaged files were written again (then with what was wrong,
`repaired`, and `repaired_at`). Lines of older versions lack what is newer and are shown with gaps.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from pipeline.champions import store
from pipeline.champions.champion import Champion

Changes = dict[str, list[Any]]  # setting -> [before, after]


class HistoryEntry(Champion):
    """A line of history, with the settings that differ from the line before; None where one did not record its own."""

    changed: Changes | None


class History(BaseModel):
    """Every champion, oldest first, and the id of the one of now."""

    model_config = ConfigDict(frozen=True)
    current: str | None
    champions: list[HistoryEntry]

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON, with the keys that the lines have."""
        return self.model_dump(mode="json", exclude_unset=True)


def read_history(home: Path) -> list[Champion]:
    """Every line, oldest first, and the pointer's own record where a kill kept its line from being written.

    Raises:
        ChampionError: a line, or the pointer, is damaged; names the file and the line.
    """
    file = home / store.HISTORY
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    champions = [_parse_line(line, f"{file}: line {number}") for number, line in enumerate(lines, 1)]
    now = store.read_pointer(home)
    return champions if now is None or now in champions else [*champions, now]


def _parse_line(line: str, where: str) -> Champion:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise store.ChampionError(f"{where} is not JSON ({error}); mend or remove that line") from error
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise store.ChampionError(f"{where} names no champion; mend or remove that line")
    try:
        return Champion.model_validate(record)
    except ValidationError as error:
        raise store.ChampionError(f"{where}: {store.first_problem(error)}; mend or remove that line") from error


def withdrawn(champions: Sequence[Champion]) -> set[str]:
    """Champions that were rolled back from and have not come back since."""
    found: set[str] = set()
    for champion in champions:
        if champion.rolled_back_from:
            found.add(champion.rolled_back_from)
        found.discard(champion.id)
    return found


def flat(params: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in (params or {}).items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def changed_settings(before: Champion | None, after: Champion) -> Changes | None:
    """Settings that differ: key -> [before, after]; None where one of the two did not record its settings."""
    if before is None or not before.params or not after.params:
        return None
    old, new = flat(before.params), flat(after.params)
    return {key: [old.get(key), new.get(key)] for key in sorted(old | new) if old.get(key) != new.get(key)}


def summarize(home: Path) -> History:
    """All of it, each champion with what changed against the line before it. Raises as `read_history`."""
    champions = read_history(home)
    entries = []
    for before, champion in zip([None, *champions], champions, strict=False):
        entries.append(HistoryEntry(**champion.to_record(), changed=changed_settings(before, champion)))
    now = store.read_pointer(home)
    return History(current=now.id if now else None, champions=entries)


def _data(champion: Champion) -> str:
    data = champion.data
    if data is None or not data.dumps:
        return "-"
    dumps = ", ".join(f"{name} {count}" for name, count in data.dumps.items())
    labelled = "" if champion.labelled is None else f"; {champion.labelled} labelled"
    split = f"; split {data.split_hash[:12]}" if data.split_hash else ""
    return f"{dumps}{labelled}{split}"


def _settings(changes: Changes | None) -> str:
    if changes is None:
        return "-"
    return "\n".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items()) or "none"


def _miou(champion: Champion) -> str:
    if champion.miou is None:
        return "-"
    low, high = (champion.scores.miou_ci if champion.scores else None) or (None, None)
    return f"{champion.miou:.2f}" + ("" if low is None or high is None else f"\n[{low:.1f}, {high:.1f}]")


def _why(champion: Champion) -> str:
    if champion.repaired:
        return f"no new champion: its files were written again, since {champion.repaired}"
    source = champion.rolled_back_from
    return f"rolled back from {source}" if source else champion.reason or "-"


def table(history: History) -> Table:
    """One row a move of the pointer or a repair, oldest first; the champion of now is bold."""
    shown = Table(
        "when", "champion", "mIoU", "data", "settings changed", "from", "why it won", title="champions", show_lines=True
    )
    latest = max((i for i, entry in enumerate(history.champions) if entry.id == history.current), default=None)
    for place, entry in enumerate(history.champions):
        when = entry.repaired_at or entry.moved_at or entry.promoted_at or "-"
        cells = (_miou(entry), _data(entry), _settings(entry.changed), entry.warm_start or "-")
        shown.add_row(when, entry.id, *cells, _why(entry), style="bold" if place == latest else None)
    return shown
