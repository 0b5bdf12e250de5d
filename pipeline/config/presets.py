"""Presets: named overlays of the settings that differ from params.yaml, merged over it."""

import difflib
import io
import itertools
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.config.load import parse
from pipeline.config.section import ConfigError

FOLDER = Path(__file__).with_name("presets")  # in the repository a link, in the package a copy


def names(folder: Path = FOLDER) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read(name: str, folder: Path = FOLDER) -> str:
    """The text of preset `name`. Raises ConfigError, with the nearest name, where there is none so called."""
    if name not in (known := names(folder)):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(known)}"
        raise ConfigError(f"no preset {name!r}; {hint}")
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


def purpose(name: str, folder: Path = FOLDER) -> str:
    """The first sentence of the preset's comment."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), read(name, folder).splitlines())
    return " ".join(line.removeprefix("# ") for line in comment).partition(". ")[0]


def compose(name: str, base: Path = paths.PARAMS, folder: Path = FOLDER) -> str:
    """The text of a params.yaml: `base` with the preset's values in their place. Comments and the order of keys stay.

    Raises:
        ConfigError: no such preset, no `base`, or settings that do not go together.
    """
    from ruamel.yaml import YAML  # comes with DVC; only this command needs it

    text = read(name, folder)
    if not base.exists():
        raise ConfigError(f"{base}: not found; run from the project's folder or pass --params")

    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 4096  # never folds a line
    editor.representer.add_representer(type(None), _null)
    settings = editor.load(base.read_text(encoding="utf-8"))
    _put(settings, editor.load(text))

    out = io.StringIO()
    editor.dump(settings, out)
    parse(out.getvalue(), base)
    return out.getvalue()


def _put(settings: MutableMapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Set values in place, so that the comments beside them stay."""
    for key, value in changes.items():
        below = settings.get(key)
        if isinstance(below, MutableMapping) and isinstance(value, Mapping):
            _put(below, value)
        elif isinstance(below, list) and isinstance(value, list):
            below[:] = value
        else:
            settings[key] = value


def _null(representer: Any, value: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")
