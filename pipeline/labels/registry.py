"""labels.yaml: which corrected labels came back, in order of arrival. Small, in git, append-only.

Each import is data/labels/NAME.tar: index PNGs named by image id, and provenance.json. Of several imports for one image
the last one counts. `attach` puts them over the manifest's own masks, wherever the image came from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import paths
from pipeline.storage import atomic, manifest, shards

FILE, HOME = paths.LABEL_REGISTRY, paths.LABELS
PROVENANCE = "provenance.json"
_HEAD = (
    "# Corrected labels, in order of arrival; a later one for the same image wins. `marginalia import-labels` adds.\n"
)


class LabelsError(ValueError):
    """labels.yaml or an archive of labels cannot be used; the message names it and says what to do."""


class LabelEntry(BaseModel):
    """One import. `sha256` is the content hash over its pairs of image id and mask digest; `by` who gave it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    archive: str
    sha256: str
    images: int
    added: str
    tool: str
    by: str


class LabelRegistry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    labels: dict[str, LabelEntry] = {}


class MaskPlace(NamedTuple):
    """Where the mask that counts for an image lies, the digest of its ids, and which import brought it."""

    archive: str
    offset: int
    length: int
    digest: str
    name: str


def read_labels(file: Path = FILE) -> LabelRegistry:
    """An absent file has no entries. Raises LabelsError that names the file and the field."""
    try:
        return LabelRegistry.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        return LabelRegistry()
    except yaml.YAMLError as error:
        raise LabelsError(f"{file}: not valid YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise LabelsError(f"{file}: {'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}") from error


def write_labels(registry: LabelRegistry, file: Path = FILE) -> None:
    """Replace labels.yaml atomically."""
    atomic.write_text(file, _HEAD + yaml.safe_dump(registry.model_dump(), sort_keys=False, allow_unicode=True))


def content_hash(digests: Mapping[str, str]) -> str:
    """Names a set of masks: image id -> mask digest, in any order."""
    return manifest.set_hash(f"{id_} {digest}" for id_, digest in digests.items())


def places(registry: LabelRegistry, classes: Sequence[str], root: Path = Path()) -> dict[str, MaskPlace]:
    """Image id -> the mask that counts. Only headers and provenance are read: `manifest.open_mask` checks the pixels.

    Args:
        classes: the source's class names today; those of an import must be the first of them, in the same order,
            because its masks hold ids.

    Raises:
        LabelsError: an archive is absent, damaged, not the one that was registered, or of other classes.
    """
    found: dict[str, MaskPlace] = {}
    for name, entry in registry.labels.items():
        path = root / entry.archive
        if not path.exists():
            raise LabelsError(
                f"{path}: not found, though {FILE} names it; fetch it with `dvc pull {entry.archive}.dvc`"
            )
        try:
            members = {member.name: member for member in shards.members(path)}
            about = json.loads(shards.read(path, *members[PROVENANCE][1:]))
            digests = {id_: str(item["digest"]) for id_, item in about["images"].items()}
            lie = {id_: members[f"{id_}.png"] for id_ in digests}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LabelsError(f"{path}: no archive of labels ({error!r}); fetch it again") from error
        if content_hash(digests) != entry.sha256:
            raise LabelsError(f"{path}: not the labels that {FILE} registered as {name!r}; fetch it again")
        if list(classes[: len(about["classes"])]) != about["classes"]:
            raise LabelsError(
                f"{path}: its masks hold ids of the classes {', '.join(about['classes'])}, but the source now has "
                f"{', '.join(classes)}; add new classes at the end, or take {name!r} out of {FILE} and import again"
            )
        found |= {id_: MaskPlace(entry.archive, m.offset, m.length, digests[id_], name) for id_, m in lie.items()}
    return found


def attach(rows: Sequence[manifest.Row], found: Mapping[str, MaskPlace]) -> list[manifest.Row]:
    """Rows whose image has imported labels get that mask in place of their own, and the import's name."""
    out = []
    for row in rows:
        if place := found.get(row.id):
            archive, offset, length, digest, name = place
            own = row.mask_shard is not None
            row = replace(
                row, mask_shard=archive, mask_offset=offset, mask_length=length, mask_digest=digest, mask_import=name,
                mask_replaced=own,
            )  # fmt: skip
        out.append(row)
    return out


def provenance(classes: Sequence[str], images: Mapping[str, Mapping[str, Any]], **about: str) -> bytes:
    """provenance.json. `images`: image id -> {"digest", "name" in the tool, "image" as DUMP/NAME}."""
    return (
        json.dumps({**about, "classes": list(classes), "images": images}, indent=1, ensure_ascii=False) + "\n"
    ).encode()
