"""dumps.yaml: which archives there are, in the order they arrived. Small, in git, the one file a new dump changes."""

import re
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import paths
from pipeline.storage import atomic

FILE = paths.DUMP_REGISTRY
BASE = "base"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_HEAD = """\
# The registry of image archives, in order of arrival. `marginalia add-dump PATH` adds to it; DVC runs one ingest each.
# warm_start: id of the champion whose weights training starts from; null trains from the encoder's own weights.
"""


class RegistryError(ValueError):
    """dumps.yaml cannot be used as it is; the message says why and what to do."""


class DumpEntry(BaseModel):
    """One archive. `sha256` is the content hash over its images, not the archive file's own; null for base."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    archive: str
    sha256: str | None = None
    images: int | None = None
    added: str | None = None


class DumpRegistry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    warm_start: str | None = None
    dumps: dict[str, DumpEntry] = Field(min_length=1)


def parse(text: str, file: Path = FILE) -> DumpRegistry:
    """Raises RegistryError that names the file and the field."""
    try:
        registry = DumpRegistry.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise RegistryError(f"{file}: not valid YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise RegistryError(f"{file}: {'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}") from error
    if bad := [name for name in registry.dumps if not NAME.fullmatch(name)]:
        raise RegistryError(f"{file}: dump name {bad[0]!r}: use a-z, 0-9, '_' and '-', at most 64 characters")
    return registry


def read_dumps(file: Path = FILE) -> DumpRegistry:
    """Raises RegistryError when the file is missing or wrong."""
    try:
        return parse(file.read_text(encoding="utf-8"), file)
    except FileNotFoundError as error:
        raise RegistryError(f"{file}: not found; run from the project's folder") from error


def write_dumps(registry: DumpRegistry, file: Path = FILE) -> None:
    """Replace dumps.yaml atomically."""
    body = yaml.safe_dump(registry.model_dump(), sort_keys=False, allow_unicode=True)
    atomic.write_text(file, _HEAD + body)


def find(registry: DumpRegistry, name: str) -> DumpEntry:
    """Raises RegistryError for an unknown name and lists the known ones."""
    if name not in registry.dumps:
        raise RegistryError(f"no dump {name!r} in {FILE}; known: {', '.join(registry.dumps)}")
    return registry.dumps[name]
