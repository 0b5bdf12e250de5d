"""champions/: one folder per promoted bundle, the pointer champion.json that the running service watches, the history.

The pointer is the truth. A promotion writes the files into a hidden folder, fsyncs, renames it to champions/ID, then
replaces the pointer by rename, then adds a line of history: a kill at any point leaves the old or the new champion,
both complete.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import files


class ChampionError(ValueError):
    """A bundle or a champion's folder is damaged or missing; the message names the file and what to do."""


def check_bundle(bundle: Path) -> str:
    """Id of a bundle whose files all have the checksums it lists (the rest of its rules is `export.bundle`'s).

    Raises:
        ChampionError: a file is missing, extra or changed; named.
    """
    sums = bundle / "SHA256SUMS"
    if not sums.exists():
        raise ChampionError(f"{sums}: not found; run the export stage")
    listed = {}
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        listed[name.strip()] = digest
    there = {p.name for p in bundle.iterdir()} - {"SHA256SUMS"}
    if there != set(listed):
        raise ChampionError(
            f"{bundle}: files {sorted(there ^ set(listed))} are missing or not listed; run the export stage again"
        )
    for name, digest in listed.items():
        if files.sha256(bundle / name) != digest:
            raise ChampionError(f"{bundle / name}: differs from its checksum; run the export stage again")
    return str(files.read_json(bundle / "bundle.json")["id"])


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write, 1 << 20)
        write.flush()
        os.fsync(write.fileno())


def promote(champions: Path, id: str, bundle: Path, extra: Sequence[Path], record: dict[str, Any]) -> None:
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
    files.sync_folder(fresh / "bundle")
    files.sync_folder(fresh)
    home = champions / id
    if home.exists():  # complete but never pointed at (killed before the pointer), or a former champion
        aside = champions / f".new-old-{id}"
        home.rename(aside)
    fresh.rename(home)
    files.sync_folder(champions)
    files.write_json(champions / "champion.json", record)
    settle(champions, record)


def settle(champions: Path, record: dict[str, Any]) -> None:
    """What follows the pointer, also after a kill right behind it: the champion's line of history, and no leftovers."""
    file = champions / "history.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    line = json.dumps(record, sort_keys=True)
    if line not in lines:
        files.write_text(file, "\n".join([*lines, line]) + "\n")
    for left in champions.glob(".new-*"):
        shutil.rmtree(left)


def current(champions: Path) -> dict[str, Any] | None:
    """The pointer's content, or None before the first champion. Raises ChampionError when what it names is not
    there.
    """
    pointer = champions / "champion.json"
    if not pointer.exists():
        return None
    record: dict[str, Any] = files.read_json(pointer)
    home = champions / str(record["id"])
    if not (home / "bundle").is_dir():
        raise ChampionError(
            f"{pointer} names {record['id']}, but {home / 'bundle'} is gone: restore that folder, or move the pointer "
            "away"
        )
    return record
