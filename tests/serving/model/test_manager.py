"""model.manager: what is held, what goes, and what a rollback or a failure in between leaves."""

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from export.bundle.bundle import BundleError
from export.runtime.runtime import Runtime
from serving.http.models import in_thread
from serving.model import champion, loader
from serving.model.checks import CandidateRefused
from serving.settings import Settings
from serving.telemetry import metrics
from tests.support import live_server, tiny_onnx
from tests.support.serving.champions_folder import current_name, last_event, watched, write_champions


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A champions folder. Events are not logged."""
    monkeypatch.setattr(metrics, "event", lambda kind, **facts: None)
    return write_champions(tmp_path)


def test_one_previous_is_kept_and_an_older_model_goes_with_its_last_request(home: Path) -> None:
    models, _ = watched(home)
    request = models.current  # what a request that runs holds
    first = weakref.ref(request)
    second_thing = None
    gc.disable()  # the service freezes its objects: counting references has to be enough
    try:
        for other in ("b", "c"):
            models.load(home / other)
            second_thing = second_thing or weakref.ref(models.current)
        assert current_name(models) == "c"
        assert models.previous is not None
        assert models.previous is second_thing()
        assert first() is not None
        del request
        assert first() is None
    finally:
        gc.enable()


def test_a_refused_candidate_is_let_go(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Runtime]] = []
    opened = loader.open_runtime

    def remembering(*arguments: Any, **more: Any) -> Runtime:
        runtime = opened(*arguments, **more)
        seen.append(weakref.ref(runtime))
        return runtime

    monkeypatch.setattr(loader, "open_runtime", remembering)
    models, watcher = watched(home)
    classes = [{**item, "name": item["name"] + "s"} for item in tiny_onnx.CLASSES]
    tiny_onnx.write(home / "other", classes=classes)
    live_server.point(home, home / "other")
    watcher.refresh()
    assert last_event(models)["cause"] == "classes"
    gc.collect()
    assert [ref() is None for ref in seen] == [False, True]
    for _ in range(3):  # the verdict is final: it is not opened again before the pointer changes
        watcher.refresh()
    assert len(seen) == 2


@pytest.mark.parametrize("by", ["load", "pointer"])
def test_a_rollback_waits_for_no_load_and_is_not_undone_by_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    begun, go = threading.Event(), threading.Event()
    models, watcher = watched(home)
    models.load(home / "b")
    opened = loader.open_runtime

    def hanging(*arguments: Any, **more: Any) -> Runtime:
        begun.set()
        assert go.wait(60)
        return opened(*arguments, **more)

    monkeypatch.setattr(loader, "open_runtime", hanging)
    live_server.point(home, home / "c")
    loading = in_thread(watcher.refresh if by == "pointer" else lambda: models.load(home / "c"))
    assert begun.wait(60)
    models.rollback()
    assert (current_name(models), models.candidate is None) == ("a", False)
    go.set()
    assert isinstance(loading.exception(60), CandidateRefused if by == "load" else type(None))
    for _ in range(2):  # nor does the watcher follow what was rolled back from
        event = last_event(models)
        assert (current_name(models), event["event"], event["cause"]) == ("a", "bundle-refused", "late")
        watcher.refresh()
    live_server.point(home, home / "b")
    watcher.refresh()
    assert current_name(models) == "b"


def test_a_shadow_that_fails_verification_leaves_the_one_that_runs(home: Path) -> None:
    models, _ = watched(home)
    models.start_shadow(home / "b")
    running = models.shadow
    (home / "c" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match="SHA256SUMS"):
        models.start_shadow(home / "c")
    assert models.shadow is running is not None
    assert (last_event(models)["source"], last_event(models)["cause"]) == ("shadow", "bundle")
    models.close()


def test_the_allowed_folder_can_be_set(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "store" / "deep" / "x")
    chosen = Settings(champions=tmp_path / "else" / "champions" / "champion.json", bundles=tmp_path / "store")
    assert champion.named(chosen, "deep/x") == made.folder.resolve()
    assert champion.shown(chosen, f"{made.folder}: bad") == "deep/x: bad"
    with pytest.raises(FileNotFoundError):
        champion.named(chosen, "store/deep/x")
