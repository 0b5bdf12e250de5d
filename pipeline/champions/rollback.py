"""Back to a former champion: its files are checked, then the pointer moves, as whole as at a promotion.

The champion that is left is not promoted again by the gate as it stands (`history.withdrawn`): who rolled back meant
it. What is trained next starts from the champion returned to.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pipeline import paths
from pipeline.champions import history, store
from pipeline.champions.champion import Champion
from pipeline.champions.scored import read_scored
from pipeline.ingest import dump_registry
from pipeline.storage import atomic, dvc


class Moved(NamedTuple):
    """The champion of now, the one left (the same where nothing had to move), and whether dumps.yaml was changed."""

    id: str
    left: str
    warm_start: bool


def run(root: Path, id: str | None = None, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Moved:
    """Point champions/champion.json at `id`, or at the champion before the one of now.

    Killed at any point it may be run again: without `id` it finishes the rollback that was begun and goes no further
    back.

    Raises:
        ChampionError: no such champion, or files of it that are missing or damaged; named. Nothing was moved.
        registry.RegistryError: dumps.yaml is unusable. Nothing was moved.
    """
    home = root / paths.CHAMPIONS
    with store.locked(home):
        here = store.read_pointer(home)
        if here is None:
            raise store.ChampionError(f"{home / 'champion.json'}: no champion yet, so none to go back to")
        begun = store.settle(home, here) and not here.repaired_at and here.rolled_back_from
        if id is None and begun:
            return Moved(here.id, begun, _start_from(root, here.id))

        target = id or here.previous
        if target is None:
            raise store.ChampionError(
                f"{home / 'champion.json'}: {here.id} has no champion before it; name one of "
                f"{home / store.HISTORY} (`marginalia history`)"
            )
        champion = _find(home, target)
        _check(home, champion)

        moved = _start_from(root, target)
        if target != here.id:
            when = now().isoformat(timespec="seconds")
            update = {"rolled_back_from": here.id, "moved_at": when}
            store.write_pointer(home, champion.model_copy(update=update))
        return Moved(target, here.id, moved)


def _find(home: Path, id: str) -> Champion:
    """The newest line of history about `id`, without the own words of an earlier rollback or repair."""
    champions = history.read_history(home)
    found = next((champion for champion in reversed(champions) if champion.id == id), None)
    if found is None:
        known = ", ".join(dict.fromkeys(champion.id for champion in champions)) or "none"
        raise store.ChampionError(f"{home / store.HISTORY}: no champion {id!r}; known: {known}")
    return found.without_later()


def _check(home: Path, champion: Champion) -> None:
    """The bundle against its checksums, the weights against the scores: what serves, trains and judges next."""
    folder = home / champion.id
    remedy = f"restore {folder} (`dvc checkout`, a backup), or name another champion"
    if not folder.is_dir() and not dvc.restore(folder):
        raise store.ChampionError(f"{folder}: is gone; {remedy}")

    bundle, student = folder / "bundle", folder / "student.safetensors"
    found = store.check_bundle(bundle, remedy)
    if found != champion.id:
        raise store.ChampionError(f"{bundle}: holds bundle {found}, not {champion.id}; {remedy}")

    read_scored(folder.name, folder / "scores.json", folder / "confusions.npz", remedy)
    scores = store.read_record(folder / "scores.json", ("weights",), remedy)
    if not student.is_file() or atomic.sha256(student) != scores["weights"]:
        raise store.ChampionError(
            f"{student}: missing, or not the weights that {folder / 'scores.json'} is about; {remedy}"
        )


def _start_from(root: Path, id: str) -> bool:
    """Whether dumps.yaml had to change: a warm start from another champion is moved along, none is left at none."""
    file, home = root / dump_registry.FILE, root / paths.DUMPS
    if not file.exists():
        return False
    home.mkdir(parents=True, exist_ok=True)
    with atomic.locked(home / ".lock"):  # the lock of add-dump
        known = dump_registry.read_dumps(file)
        if known.warm_start in (None, id):
            return False
        dump_registry.write_dumps(known.model_copy(update={"warm_start": id}), file)
        return True
