"""champions/: one folder per promoted bundle, the pointer champion.json that the running service watches, the history.

The pointer is the truth. A promotion writes the files into a hidden folder, fsyncs, renames it to champions/ID, then
replaces the pointer by rename, then adds a line of history: a kill at any point leaves the old or the new champion,
both complete.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.champions.champion import Champion
from pipeline.storage import atomic

HISTORY = "history.jsonl"


class ChampionError(ValueError):
    """A bundle or a champion's folder is damaged or missing; the message names the file and what to do."""


def check_bundle(bundle: Path, remedy: str = "run the export stage again") -> str:
    """Id of a bundle whose files all have the checksums it lists (the rest of its rules is `export.bundle.bundle`'s).

    Raises:
        ChampionError: a file is missing, extra or changed; the message names it and ends with `remedy`.
    """
    sums = bundle / "SHA256SUMS"
    if not sums.exists():
        raise ChampionError(f"{sums}: not found; {remedy}")
    listed = {}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name.strip()] = digest
    there = {p.name for p in bundle.iterdir()} - {"SHA256SUMS"}
    if there != set(listed):
        raise ChampionError(f"{bundle}: files {sorted(there ^ set(listed))} are missing or not listed; {remedy}")
    for name, digest in listed.items():
        if not (bundle / name).is_file() or atomic.sha256(bundle / name) != digest:
            raise ChampionError(f"{bundle / name}: differs from its checksum; {remedy}")
    return str(read_record(bundle / "bundle.json", ("id",), remedy)["id"])


def read_record(path: Path, keys: Sequence[str], remedy: str) -> dict[str, Any]:
    """A JSON object that has `keys`, each a non-empty string.

    Raises:
        ChampionError: the file is missing or something else; the message names it and ends with `remedy`.
    """
    try:
        record = atomic.read_json(path)
    except (OSError, ValueError) as error:
        raise ChampionError(f"{path}: cannot be read as JSON ({error.__cause__ or error}); {remedy}") from error
    wrong = [k for k in keys if not isinstance(record.get(k), str) or not record[k]] if isinstance(record, dict) else ""
    if not isinstance(record, dict) or wrong:
        raise ChampionError(f"{path}: {f'lacks {wrong} (text)' if wrong else 'not a JSON object'}; {remedy}")
    return record


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write, 1 << 20)
        write.flush()
        os.fsync(write.fileno())


def promote(champions: Path, id: str, bundle: Path, extra: Sequence[Path], champion: Champion) -> None:
    """Make `bundle` (with the files `extra` beside it) the champion.

    Repeating it after a kill at any point is safe. Readers see the old champion until the pointer is replaced.
    """
    champions.mkdir(parents=True, exist_ok=True)
    for left in champions.glob(".new-*"):
        shutil.rmtree(left)  # what an earlier, killed promotion left behind; nothing points there
    fresh = champions / f".new-{id}"
    (fresh / "bundle").mkdir(parents=True)
    for file in sorted(bundle.iterdir()):
        _copy(file, fresh / "bundle" / file.name)
    for file in extra:
        _copy(file, fresh / file.name)
    check_bundle(fresh / "bundle")
    atomic.sync_folder(fresh / "bundle")
    atomic.sync_folder(fresh)
    home = champions / id
    if home.exists():  # complete but never pointed at (killed before the pointer), or a former champion
        aside = champions / f".new-old-{id}"
        home.rename(aside)
    fresh.rename(home)
    atomic.sync_folder(champions)
    write_pointer(champions, champion)


def write_pointer(champions: Path, champion: Champion) -> None:
    """Move the pointer, and write its line of history."""
    atomic.write_json(champions / "champion.json", champion.to_record())
    settle(champions, champion)


def locked(champions: Path) -> AbstractContextManager[None]:
    """One mover of the pointer at a time; nothing to lock where there is no folder yet."""
    return atomic.locked(champions / ".lock") if champions.is_dir() else nullcontext()


def settle(champions: Path, champion: Champion) -> bool:
    """What follows the pointer, also after a kill right behind it: the champion's line of history, and no leftovers.

    Returns whether the line was missing.
    """
    file = champions / HISTORY
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    line = json.dumps(champion.to_record(), sort_keys=True)
    if missing := line not in lines:
        atomic.write_text(file, "\n".join([*lines, line]) + "\n")
    for left in champions.glob(".new-*"):
        shutil.rmtree(left)
    return missing


def read_pointer(champions: Path) -> Champion | None:
    """What champion.json says, or None before the first champion. Raises ChampionError when it is damaged."""
    file = champions / "champion.json"
    if not file.exists():
        return None
    remedy = (
        f"put the last line of {champions / HISTORY} there, or move the file away to start a new line of "
        "champions; then run `dvc repro -f -s gate`"
    )
    record = read_record(file, ("id", "bundle", "student"), remedy)
    if Path(record["id"]).name != record["id"]:
        raise ChampionError(f"{file}: id {record['id']!r} is no folder name; {remedy}")
    try:
        return Champion.model_validate(record)
    except ValidationError as error:
        raise ChampionError(f"{file}: {first_problem(error)}; {remedy}") from error


def first_problem(error: ValidationError) -> str:
    """Which key of a record is wrong, and how."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def read_champion(champions: Path) -> Champion | None:
    """`read_pointer`, whose bundle is there too. Raises ChampionError when the pointer or the folder it names is not."""
    champion = read_pointer(champions)
    if champion is not None and not (champions / champion.id / "bundle").is_dir():
        raise ChampionError(
            f"{champions / 'champion.json'} names {champion.id}, but {champions / champion.id / 'bundle'} is gone: "
            "restore that folder, or move the pointer away and run `dvc repro -f -s gate`"
        )
    return champion


def check_copy(champions: Path, champion: Champion, student: Path) -> None:
    """The champion's own bundle against its checksums and id, and its weights against `student`.

    Raises:
        ChampionError: a file is missing, extra or changed; named.
    """
    home = champions / champion.id
    found = check_bundle(home / "bundle")
    if found != champion.id:
        raise ChampionError(f"{home / 'bundle'}: holds bundle {found}")
    copy = home / "student.safetensors"
    if not copy.is_file() or atomic.sha256(copy) != atomic.sha256(student):
        raise ChampionError(f"{copy}: missing, or differs from {student}")
