"""The bundle: one folder that anyone can run.

    model.onnx      uint8 image in, class ids and confidence out
    bundle.json     `Manifest`: classes, colours, input policy, metrics, where it came from
    MODEL_CARD.md   for people
    SHA256SUMS      of the three, as `sha256sum -c` reads it

Nothing else may lie in it. Everything is checked against SHA256SUMS before anything is parsed.
"""

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from export.external_data import external_references
from pipeline import files, fit

MODEL, MANIFEST, CARD, SUMS = "model.onnx", "bundle.json", "MODEL_CARD.md", "SHA256SUMS"
_LISTED = (CARD, MANIFEST, MODEL)
_TEXT_LIMIT = 8 << 20
_MODEL_LIMIT = 2 << 30  # protobuf's own limit

Byte = Annotated[int, Field(ge=0, le=255)]
Positive = Annotated[int, Field(gt=0)]


class BundleError(ValueError):
    """A bundle that must not be run; the message names the file and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassInfo(_Part):
    id: Annotated[int, Field(ge=0, le=254)]
    name: Annotated[str, Field(min_length=1)]
    color: tuple[Byte, Byte, Byte]


class InputPolicy(_Part):
    """What the graph takes, and how `pipeline.fit` brings any image to it."""

    layout: Literal["NHWC"] = "NHWC"
    dtype: Literal["uint8"] = "uint8"
    channels: Literal["RGB"] = "RGB"
    long_side: Positive
    stride: Positive


class Outputs(_Part):
    label: Literal["uint8 NHW"] = "uint8 NHW"
    confidence: Literal["uint8 NHW (0..255 = 0..1)"] = "uint8 NHW (0..255 = 0..1)"


class Manifest(_Part):
    """bundle.json. `id` is the first 16 hex digits of SHA-256 over the model, the classes and the input policy."""

    format: Literal[1] = 1
    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    name: str
    created: str
    classes: Annotated[tuple[ClassInfo, ...], Field(min_length=1)]
    ignore: Byte = 255
    input: InputPolicy
    outputs: Outputs = Outputs()
    metrics: dict[str, Any]
    data_hash: str
    split_hash: str
    test_hash: str
    commit: str
    opset: Positive
    ir_version: Positive
    method: str

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> "Manifest":
        ids, names = [c.id for c in self.classes], [c.name for c in self.classes]
        if ids != sorted(set(ids)) or len(set(names)) != len(names):
            raise ValueError("class ids must rise and class names must differ")
        if self.ignore in ids:
            raise ValueError(f"{self.ignore} means ignore and cannot be a class")
        return self

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """Colours indexed by class id; unused ids are black."""
        table = [(0, 0, 0)] * (self.classes[-1].id + 1)
        for item in self.classes:
            table[item.id] = item.color
        return table


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder."""

    folder: Path
    manifest: Manifest
    model_sha256: str

    def fit(self, height: int, width: int) -> fit.Fit:
        """The input policy for an image of `height` x `width` pixels."""
        policy = self.manifest.input
        return fit.plan(height, width, long_side=policy.long_side, stride=policy.stride)

    def read_model(self) -> bytes:
        """model.onnx, checked once more: what is run is what was verified. Raises BundleError."""
        model = (self.folder / MODEL).read_bytes()
        if files.sha256(model) != self.model_sha256:
            raise BundleError(f"{self.folder / MODEL}: changed after it was verified; restore the bundle")
        return model


def bundle_id(model: bytes, classes: tuple[ClassInfo, ...], policy: InputPolicy) -> str:
    """First 16 hex digits of SHA-256 over the model's bytes and the canonical JSON of classes and input policy."""
    rest = {"classes": [c.model_dump(mode="json") for c in classes], "input": policy.model_dump(mode="json")}
    digest = hashlib.sha256(model)
    digest.update(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()[:16]


def _sums(digests: dict[str, str]) -> bytes:
    return "".join(f"{digests[name]}  {name}\n" for name in _LISTED).encode()


def create(
    folder: Path,
    model: bytes,
    *,
    classes: list[dict[str, Any]],
    long_side: int,
    stride: int,
    card: str,
    opset: int,
    ir_version: int,
    name: str = "marginalia",
    ignore: int = 255,
    metrics: dict[str, Any] | None = None,
    data_hash: str = "",
    split_hash: str = "",
    test_hash: str = "",
    commit: str = "",
    method: str = "",
    created: str | None = None,
) -> Bundle:
    """Write a bundle to `folder`, replacing what is there, and verify it as a reader would before it takes the name.

    `classes` are {"id", "name", "color"} in rising id order; `created` is an ISO time, now if None.

    Raises:
        BundleError: the parts do not make a valid bundle; `folder` is then as it was.
    """
    try:
        infos = tuple(ClassInfo.model_validate(item) for item in classes)
        policy = InputPolicy(long_side=long_side, stride=stride)
        manifest = Manifest(
            id=bundle_id(model, infos, policy),
            name=name,
            created=created or datetime.now(UTC).isoformat(timespec="seconds"),
            classes=infos,
            ignore=ignore,
            input=policy,
            metrics=metrics or {},
            data_hash=data_hash,
            split_hash=split_hash,
            test_hash=test_hash,
            commit=commit,
            opset=opset,
            ir_version=ir_version,
            method=method,
        )
    except ValidationError as error:
        raise BundleError(f"{folder}: {_explain(error)}") from error
    content = {
        CARD: card.encode("utf-8"),
        MANIFEST: files.to_json(manifest.model_dump(mode="json")).encode("utf-8"),
        MODEL: model,
    }
    content[SUMS] = _sums({name: files.sha256(content[name]) for name in _LISTED})
    with files.replacing_folder(folder) as fresh:
        for file, data in content.items():
            files.write_bytes(fresh / file, data)
        verify(fresh)
    return open_bundle(folder)


def _check_files(folder: Path) -> None:
    """Exactly the four plain files, none a link, none too large; names the first that is wrong."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: no bundle folder here; run the export stage or name another folder")
    present = {entry.name for entry in os.scandir(folder)}
    wanted = {*_LISTED, SUMS}
    for name in sorted(wanted - present):
        raise BundleError(f"{folder / name}: missing; restore the bundle")
    for name in sorted(present - wanted):
        raise BundleError(f"{folder / name}: does not belong into a bundle; remove it")
    for name in sorted(wanted):
        facts = (folder / name).lstat()
        if not stat.S_ISREG(facts.st_mode):
            raise BundleError(f"{folder / name}: is a link or no plain file; put the file itself there")
        if facts.st_nlink != 1:
            raise BundleError(f"{folder / name}: has a second name (hard link) that could change it; copy the file")
        if facts.st_size > (_MODEL_LIMIT if name == MODEL else _TEXT_LIMIT):
            raise BundleError(f"{folder / name}: {facts.st_size} bytes is too large")


def open_bundle(folder: Path) -> Bundle:
    """Verify `folder` and return it. Checksums come first; only then is anything parsed.

    Raises:
        BundleError: names the file that is missing, extra, a link, changed or malformed.
    """
    folder = Path(folder)
    _check_files(folder)
    content = {name: (folder / name).read_bytes() for name in _LISTED}
    digests = {name: files.sha256(data) for name, data in content.items()}
    expected, stored = _sums(digests), (folder / SUMS).read_bytes()
    if stored != expected:
        lines = stored.split(b"\n")
        for name, line in zip(_LISTED, expected.split(b"\n"), strict=False):
            if line not in lines:
                raise BundleError(f"{folder / name}: does not match its line in {SUMS}; restore the bundle")
        raise BundleError(f"{folder / SUMS}: has lines beyond its three files; restore the bundle")
    try:
        manifest = Manifest.model_validate_json(content[MANIFEST])
    except ValidationError as error:
        raise BundleError(f"{folder / MANIFEST}: {_explain(error)}") from error
    if manifest.id != bundle_id(content[MODEL], manifest.classes, manifest.input):
        raise BundleError(f"{folder / MANIFEST}: id {manifest.id} is not that of this model; export it again")
    try:
        references = external_references(content[MODEL])
    except ValueError as error:
        raise BundleError(f"{folder / MODEL}: not an ONNX file ({error}); export it again") from error
    if references:
        raise BundleError(f"{folder / MODEL}: refers to other files ({references[0]}); export it as a single file")
    return Bundle(folder, manifest, digests[MODEL])


def verify(folder: Path) -> Manifest:
    """Check a bundle folder and return its manifest. Raises BundleError as `open_bundle` does."""
    return open_bundle(folder).manifest


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'manifest'}: {first['msg']}"
