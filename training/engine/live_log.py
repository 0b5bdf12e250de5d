"""A training's numbers while it runs: DVCLive's curves and the progress bar."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import config, console, paths
from training.engine.trainer import Event


class LiveLog:
    """Logs the events of a training; use it as a context.

    Raises:
        ConfigError: a git repository without a commit, which DVCLive cannot handle.
    """

    def __init__(self, title: str, steps: int, classes: Sequence[Mapping[str, Any]]) -> None:
        self.classes = classes
        self._live = _open_live()
        self._progress = console.bar(title, steps)

    def __enter__(self) -> "LiveLog":
        self._live.__enter__()
        self._bar = self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        self._live.__exit__(*error)

    def __call__(self, event: Event) -> None:
        self._bar.reach(event.step)
        self._live.step = event.step
        for key, value in with_class_names(event.values, self.classes).items():
            if key != "step" and not math.isnan(value):
                self._live.log_metric(key, value)
        self._live.next_step()


def with_class_names(values: Mapping[str, float], classes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Log values with class names in place of class numbers; DVCLive draws one curve per path."""
    names = {}
    for key, value in values.items():
        kind, _, number = key.rpartition("_")
        if kind in ("kept", "precision") and number.isdigit():
            key = f"{kind}_per_class/{classes[int(number)]['name']}"
        names[key] = value
    return names


def _open_live() -> Any:
    from dvclive import Live  # type: ignore[attr-defined]
    from scmrepo.exceptions import SCMError

    try:
        return Live(str(paths.LIVE), report=None, save_dvc_exp=False, dvcyaml=None)
    except SCMError as error:
        raise config.ConfigError(
            f"git: {error}; commit once (`git add -A && git commit -m start`), then run again"
        ) from error
