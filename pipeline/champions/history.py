"""What champions/history.jsonl says: every champion, what it was made from, what changed and why it won.

A line is the pointer's record at the moment that the pointer moved: at a promotion, or at a rollback (then with
`rolled_back_from` and `moved_at`); or that the champion's damaged files were written again (then with what was wrong,
`repaired`, and `repaired_at`). Lines of older versions lack what is newer and are shown with gaps.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.champions import store

Record = dict[str, Any]
DATA = ("dumps", "counts", "split_hash", "data_hash", "label_hash")
LATER = ("rolled_back_from", "moved_at", "repaired", "repaired_at")  # of one line, not of the champion
SCORES = ("miou_ci", "boundary_iou", "pixel_accuracy", "ece", "test_images")


def made_from(trained: Mapping[str, Any], scores: Mapping[str, Any]) -> Record:
    """What a champion's record says besides the pointer: data, params, start, commit and scores.

    Args:
        trained: models/student/train.json. scores: reports/scores.json. Missing values become None.
    """
    start = trained.get("warm_start")
    return {
        "data": {key: trained.get(key) for key in DATA},
        "labelled": trained.get("labelled"),
        "test_hash": scores.get("test_hash"),
        "params": trained.get("params"),
        "warm_start": Path(start).parent.name if start else None,
        "commit": scores.get("commit"),
        "scores": {key: scores.get(key) for key in SCORES},
    }


def read(home: Path) -> list[Record]:
    """Every line, oldest first, and the pointer's own record where a kill kept its line from being written.

    Raises:
        ChampionError: a line, or the pointer, is damaged; names the file and the line.
    """
    file = home / store.HISTORY
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise store.ChampionError(
                f"{file}: line {number} is not JSON ({error}); mend or remove that line"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise store.ChampionError(f"{file}: line {number} names no champion; mend or remove that line")
        records.append(record)
    now = store.pointer(home)
    return records if now is None or now in records else [*records, now]


def withdrawn(records: Sequence[Record]) -> set[str]:
    """Champions that were rolled back from and have not come back since."""
    found: set[str] = set()
    for record in records:
        if record.get("rolled_back_from"):
            found.add(str(record["rolled_back_from"]))
        found.discard(record["id"])
    return found


def flat(params: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in (params or {}).items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def changed(before: Record | None, after: Record) -> dict[str, list[Any]] | None:
    """Settings that differ: key -> [before, after]; None where one of the two did not record its settings."""
    if before is None or not before.get("params") or not after.get("params"):
        return None
    old, new = flat(before["params"]), flat(after["params"])
    return {key: [old.get(key), new.get(key)] for key in sorted(old | new) if old.get(key) != new.get(key)}


def told(home: Path) -> Record:
    """All of it as plain values: {"current", "champions": [record with "changed" against the line before it]}."""
    records = read(home)
    pairs = zip([None, *records], records, strict=False)
    now = store.pointer(home)
    return {
        "current": now["id"] if now else None,
        "champions": [record | {"changed": changed(before, record)} for before, record in pairs],
    }


def _data(record: Record) -> str:
    data = record.get("data") or {}
    dumps = ", ".join(f"{name} {count}" for name, count in (data.get("dumps") or {}).items())
    labelled = "" if record.get("labelled") is None else f"; {record['labelled']} labelled"
    split = f"; split {data['split_hash'][:12]}" if data.get("split_hash") else ""
    return f"{dumps}{labelled}{split}" if dumps else "-"


def _settings(changes: Mapping[str, Sequence[Any]] | None) -> str:
    if changes is None:
        return "-"
    return "\n".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items()) or "none"


def _miou(record: Record) -> str:
    if record.get("miou") is None:
        return "-"
    low, high = (record.get("scores") or {}).get("miou_ci") or (None, None)
    return f"{record['miou']:.2f}" + ("" if low is None or high is None else f"\n[{low:.1f}, {high:.1f}]")


def _why(record: Record) -> str:
    if record.get("repaired"):
        return f"no new champion: its files were written again, since {record['repaired']}"
    source = record.get("rolled_back_from")
    return f"rolled back from {source}" if source else str(record.get("reason", "-"))


def table(said: Record) -> Table:
    """One row a move of the pointer or a repair, oldest first; the champion of now is bold."""
    shown = Table(
        "when", "champion", "mIoU", "data", "settings changed", "from", "why it won", title="champions", show_lines=True
    )
    latest = max((i for i, r in enumerate(said["champions"]) if r["id"] == said["current"]), default=None)
    for place, record in enumerate(said["champions"]):
        when = str(record.get("repaired_at") or record.get("moved_at") or record.get("promoted_at") or "-")
        cells = (_miou(record), _data(record), _settings(record["changed"]), record.get("warm_start") or "-")
        shown.add_row(when, record["id"], *cells, _why(record), style="bold" if place == latest else None)
    return shown
