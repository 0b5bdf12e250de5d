"""model.watcher: a champion is followed once, tried again when it fails, and leaves an operator's choice alone."""

import threading
from pathlib import Path

import pytest

from serving.model.events import Candidate
from serving.model.manager import NoPrevious
from serving.telemetry import metrics
from tests.support import live_server
from tests.support.live_server import until
from tests.support.serving.champions_folder import current_name, last_event, watched, write_champions


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A champions folder. Events are not logged."""
    monkeypatch.setattr(metrics, "event", lambda kind, **facts: None)
    return write_champions(tmp_path)


def test_the_watcher_leaves_a_pointer_alone_that_was_rolled_back_from(home: Path) -> None:
    models, watcher = watched(home)
    with pytest.raises(NoPrevious):
        models.rollback()
    live_server.point(home, home / "b")
    watcher.refresh()
    assert current_name(models) == "b"
    models.rollback()
    for _ in range(3):
        watcher.refresh()
        assert current_name(models) == "a"
    pointer_file = home / "champion.json"
    away = pointer_file.rename(home / "away.json")  # a file system that is gone for a moment
    watcher.refresh()
    away.rename(pointer_file)
    watcher.refresh()
    assert (current_name(models), last_event(models)["cause"]) == ("a", "pointer")
    live_server.point(home, home / "c")
    watcher.refresh()
    assert current_name(models) == "c"
    live_server.point(home, home / "b")  # the one that was rolled back from, promoted anew
    watcher.refresh()
    assert current_name(models) == "b"


def test_back_to_a_pointer_that_was_overruled_is_a_new_choice(home: Path) -> None:
    models, watcher = watched(home)
    models.load(home / "b")
    live_server.point(home, home / "absent")
    watcher.refresh()
    live_server.point(home, home / "a")
    watcher.refresh()
    assert current_name(models) == "a"


@pytest.mark.parametrize("by_hand", ["load", "rollback"])
def test_what_is_done_by_hand_holds_against_a_pointer_that_failed_before(home: Path, by_hand: str) -> None:
    now = [0.0]
    models, watcher = watched(home, lambda: now[0])
    models.load(home / "c")
    away = (home / "b").rename(home / "away")
    live_server.point(home, home / "b")
    watcher.refresh()
    assert last_event(models)["cause"] == "bundle"
    if by_hand == "load":
        models.load(home / "a")
    else:
        models.rollback()
    away.rename(home / "b")
    now[0] = 1000.0
    watcher.refresh()
    assert current_name(models) == "a"
    live_server.point(home, home / "c")
    watcher.refresh()
    assert current_name(models) == "c"


def test_the_shadow_of_the_start_waits_for_a_change_under_way(home: Path) -> None:
    models, watcher = watched(home, shadow="champions/b", poll_s=0.01)
    looks = threading.Semaphore(0)
    watcher.refresh = looks.release  # type: ignore[method-assign]
    with models.changing(Candidate(source="load", path="c")):
        watcher.start()
        for _ in range(3):
            assert looks.acquire(timeout=60)
        assert models.shadow is None
    until(lambda: models.shadow)
    watcher.stop()
    models.close()
