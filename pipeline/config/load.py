"""params.yaml -> Params, or what is wrong with it in terms of its keys."""

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline import paths
from pipeline.config.overlay import merge
from pipeline.config.params import Params
from pipeline.config.renamed import renamed
from pipeline.config.section import ConfigError

SHIPPED = Path(__file__).with_name("shipped.yaml")
Loc = tuple[str | int, ...]


def _known_keys(path: Loc) -> list[str]:
    """Field names of the section that `path`'s last element would belong to."""
    section: Any = Params
    for part in path[:-1]:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        section = field.annotation
    return list(section.model_fields)


def _nearest(path: Loc) -> Loc | None:
    """The known key that an unknown one was probably meant to be."""
    near = difflib.get_close_matches(str(path[-1]), _known_keys(path), n=1, cutoff=0.5)
    return (*path[:-1], near[0]) if near else None


def _explain(error: Any) -> str:
    path: Loc = error["loc"]
    key = ".".join(map(str, path))
    if error["type"] == "missing":
        return f"missing key {key!r}; add it{_as_shipped(path)}"
    if error["type"] == "extra_forbidden":
        near = _nearest(path)
        hint = f"did you mean {near[-1]!r}?" if near else f"known keys here: {', '.join(_known_keys(path))}"
        return f"unknown key {key!r}; {hint}"

    got = "" if error["type"] == "value_error" else f" (got {error['input']!r})"
    return f"{key + ': ' if key else ''}{error['msg'].removeprefix('Value error, ')}{got}"


def _as_shipped(path: Loc) -> str:
    """What the params.yaml of this version has at `path`."""
    value: Any = shipped()
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict):
        return " with all its keys, as the params.yaml of this version has it"
    return f", as shipped: {path[-1]}: {json.dumps(value)}"


def _problems(error: ValidationError) -> list[str]:
    """One sentence a mistake: a mistyped key is not also reported as missing."""
    errors: list[Any] = error.errors()
    mistyped = {_nearest(e["loc"]) for e in errors if e["type"] == "extra_forbidden"}
    return [_explain(e) for e in errors if not (e["type"] == "missing" and e["loc"] in mistyped)]


def check(raw: dict[str, Any], file: Path = paths.PARAMS) -> Params:
    """The content of `file`, as YAML gives it -> Params. Raises ConfigError as `parse` does."""
    if problems := list(renamed(raw)):
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in _problems(error))) from error


def parse(text: str, file: Path = paths.PARAMS) -> Params:
    """YAML text -> Params.

    Raises:
        ConfigError: not YAML, a key that is missing, unknown (with the nearest known one) or renamed, or a value out of
            range; one line each, naming file and key.
    """
    return check(_read(text, file), file)


def load(file: Path = paths.PARAMS) -> Params:
    """Read and check params.yaml.

    A key that the file leaves out has the value of the params.yaml that this version was shipped with, the one set of
    defaults: a command alone may run on a file that says only what differs. `dvc repro` asks for every key that a stage
    tracks, so no result can rest on a value that DVC does not see.

    Raises:
        ConfigError: as `parse`, also when the file is missing.
    """
    if not file.exists():
        raise ConfigError(f"{file}: not found; run from the project's folder or pass --params")
    return check(merge(shipped(), _read(file.read_text(encoding="utf-8"), file)), file)


@cache
def shipped() -> dict[str, Any]:
    """The content of the params.yaml of this version (in the repository a link, in the package a copy)."""
    return _read(SHIPPED.read_text(encoding="utf-8"), SHIPPED)


def _read(text: str, file: Path) -> dict[str, Any]:
    """YAML text of sections. Raises ConfigError for anything else."""
    try:
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected sections like 'data:' and 'train:', got {type(raw).__name__}")
    return raw
