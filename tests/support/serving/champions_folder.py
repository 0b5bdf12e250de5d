"""A champions folder of tiny bundles, and the manager and the watcher over it, in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.model.manager import ModelManager
from serving.model.watcher import ChampionWatcher
from serving.settings import Settings
from tests.support import live_server, tiny_onnx


def write_champions(root: Path) -> Path:
    """`root`/champions, whose pointer names bundle "a"; "b" and "c" are beside it."""
    champions = root / "champions"
    for name, threshold in (("a", 100.0), ("b", 150.0), ("c", 200.0)):
        tiny_onnx.write(champions / name, model_bytes=tiny_onnx.model(threshold))
    live_server.point(champions, champions / "a")
    return champions


def watched(
    champions: Path, clock: Callable[[], float] = lambda: 0.0, **settings: Any
) -> tuple[ModelManager, ChampionWatcher]:
    """The models of a service, and their watcher after its first look."""
    chosen = Settings(champions=champions / "champion.json", provider="cpu", threads=1, **settings)
    models = ModelManager(chosen)
    watcher = ChampionWatcher(models, chosen, clock=clock)
    watcher.refresh()
    return models, watcher


def current_name(models: ModelManager) -> str:
    """The folder of the bundle that is served."""
    assert models.current is not None
    return models.current.bundle.folder.name


def last_event(models: ModelManager) -> dict[str, Any]:
    """As GET /v1/models shows it."""
    return models.events.newest()[-1].model_dump()
