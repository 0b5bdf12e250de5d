"""The bundle: one folder that anyone can run.

    model.onnx      uint8 image in, class ids and confidence out; float32
    model.*.onnx    the same network in other precisions (`MODELS`), where parity admitted them
    bundle.json     `Manifest`: classes, colours, input policy, options to run it, metrics, where it came from
    MODEL_CARD.md   for people
    SHA256SUMS      of all of these, as `sha256sum -c` reads it

Nothing else may lie in it. Everything is checked against SHA256SUMS before anything is parsed.

A file may be a link, hard or symbolic, to wherever: `cache.type hardlink,symlink` of DVC makes them all links into its
cache. Content decides, not the place: what a link leads to must be a plain file, it is read once, and only bytes with
the right checksum are parsed or run, each time anew. So a bundle that somebody sent gains nothing by links: it can name
only files whose content its sender knew, no message repeats a byte of them, and devices and pipes are not opened. The
models themselves must not refer to any other file.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from export.bundle.external_data import external_references
from export.bundle.manifest import MODEL, MODELS, Description, Manifest, explain, ranked
from pipeline.imaging import resize
from pipeline.storage import atomic

MANIFEST, CARD, SUMS = "bundle.json", "MODEL_CARD.md", "SHA256SUMS"
_TEXT_LIMIT = 8 << 20
_MODEL_LIMIT = 2 << 30  # protobuf's own limit


class BundleError(ValueError):
    """A bundle that must not be run; the message names the file and what to do."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder."""

    folder: Path
    manifest: Manifest
    sha256: dict[str, str]

    def fit(self, height: int, width: int) -> resize.Fit:
        """The input policy for an image of `height` x `width` pixels."""
        policy = self.manifest.input
        return resize.plan(height, width, long_side=policy.long_side, stride=policy.stride)

    def read_model(self, file: str = MODEL) -> bytes:
        """One of its models, checked once more: what is run is what was verified. Raises BundleError."""
        if file not in self.sha256:
            raise BundleError(f"{self.folder / file}: this bundle has no such model; it has {sorted(self.models)}")
        model = _read_file(self.folder / file)
        if atomic.sha256(model) != self.sha256[file]:
            raise BundleError(f"{self.folder / file}: changed after it was verified; restore the bundle")
        return model

    @property
    def models(self) -> list[str]:
        return [name for name in MODELS if name in self.sha256]


def bundle_id(models: Mapping[str, bytes], description: Description) -> str:
    """First 16 hex digits of SHA-256 over all that shapes an answer.

    That is the bytes of `model.onnx` and the canonical JSON of classes, input policy, the names and checksums of the other
    models, and the options in the order in which they are preferred: two bundles that may answer differently have two
    ids. Of the measured speeds only this order is part of it.
    """
    rest: dict[str, Any] = {
        "classes": [c.model_dump(mode="json") for c in description.classes],
        "input": description.input.model_dump(mode="json"),
    }
    if len(models) > 1:
        rest["models"] = {name: atomic.sha256(data) for name, data in models.items() if name != MODEL}
    if description.options:
        rest["options"] = [[str(o), o.file, o.speedup is not None] for o in ranked(description.options)]

    digest = hashlib.sha256(models[MODEL])
    digest.update(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()[:16]


def create(folder: Path, models: Mapping[str, bytes], description: Description, card: str) -> Bundle:
    """Write a bundle to `folder`, replacing what is there, and verify it as a reader would before it takes the name.

    Args:
        models: by file name, `model.onnx` among them; each other one must be used by some option.
        card: MODEL_CARD.md.

    Raises:
        BundleError: the parts do not make a valid bundle; `folder` is then as it was.
    """
    manifest = Manifest(id=bundle_id(models, description), **dict(description))
    content = {
        CARD: card.encode("utf-8"),
        MANIFEST: atomic.to_json(manifest.model_dump(mode="json")).encode("utf-8"),
        **models,
    }
    content[SUMS] = _sums({name: atomic.sha256(data) for name, data in content.items()})

    with atomic.replacing_folder(folder) as fresh:
        for file, data in content.items():
            atomic.write_bytes(fresh / file, data)
        verify(fresh)
    return open_bundle(folder)


def open_bundle(folder: Path) -> Bundle:
    """Verify `folder` and return it. Checksums come first; only then is anything parsed.

    Raises:
        BundleError: names the file that is missing, extra, no plain file, changed or malformed.
    """
    folder = Path(folder)
    content = {name: _read_file(folder / name) for name in _check_names(folder)}
    sums = content.pop(SUMS)
    digests = {name: atomic.sha256(data) for name, data in content.items()}
    _check_sums(folder, digests, sums)

    try:
        manifest = Manifest.model_validate_json(content[MANIFEST])
    except ValidationError as error:
        raise BundleError(f"{folder / MANIFEST}: {explain(error)}") from error
    models = {name: content[name] for name in MODELS if name in content}
    _check_models(folder, manifest, models)
    return Bundle(folder, manifest, digests)


def verify(folder: Path) -> Manifest:
    """Check a bundle folder and return its manifest. Raises BundleError as `open_bundle` does."""
    return open_bundle(folder).manifest


def _sums(digests: Mapping[str, str]) -> bytes:
    """SHA256SUMS of files by name."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def _check_names(folder: Path) -> list[str]:
    """All of a bundle's files and no others; returns their names, sorted. Raises BundleError naming the first wrong one."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: no bundle folder here; run the export stage or name another folder")
    present = {entry.name for entry in os.scandir(folder)}
    for name in sorted({CARD, MANIFEST, MODEL, SUMS} - present):
        raise BundleError(f"{folder / name}: missing; restore the bundle")
    for name in sorted(present - {CARD, MANIFEST, SUMS, *MODELS}):
        raise BundleError(f"{folder / name}: does not belong into a bundle; remove it")
    return sorted(present)


def _read_file(path: Path) -> bytes:
    """The bytes of a bundle's file, through links.

    Raises:
        BundleError: it leads nowhere, to something that is no plain file, or to too large a one.
        OSError: it cannot be read for another reason, such as missing rights.
    """
    try:
        _check_plain(path, path.stat())  # before it is opened: that alone has an effect on some devices
        # What took the file's place since then must not hold us, as a pipe without a writer would.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        advice = "restore the bundle, under DVC by `dvc checkout`"
        raise BundleError(f"{path}: is a link that leads nowhere; {advice}") from error

    with open(handle, "rb") as file:  # noqa: PTH123  (a descriptor)
        facts = os.fstat(handle)
        _check_plain(path, facts)
        data = file.read(facts.st_size + 1)
    if len(data) != facts.st_size:  # also the kernel's own files, which state no size
        raise BundleError(f"{path}: has another size than stated; restore the bundle")
    return data


def _check_plain(path: Path, facts: os.stat_result) -> None:
    """Raises BundleError where it is no plain file, or a too large one."""
    if not stat.S_ISREG(facts.st_mode):
        leads = "is a link to something that is no plain file" if path.is_symlink() else "is no plain file"
        raise BundleError(f"{path}: {leads}; put the file itself there")
    if facts.st_size > (_MODEL_LIMIT if path.name in MODELS else _TEXT_LIMIT):
        raise BundleError(f"{path}: {facts.st_size} bytes is too large")


def _check_sums(folder: Path, digests: Mapping[str, str], stored: bytes) -> None:
    """SHA256SUMS, `stored`, has exactly these lines. Raises BundleError naming the first file that differs."""
    expected = _sums(digests)
    if stored == expected:
        return
    lines = stored.split(b"\n")
    for name, line in zip(sorted(digests), expected.split(b"\n"), strict=False):
        if line not in lines:
            raise BundleError(f"{folder / name}: does not match its line in {SUMS}; restore the bundle")
    for name in MODELS:
        if name not in digests and f"  {name}\n".encode() in stored:
            raise BundleError(f"{folder / name}: missing; restore the bundle")
    raise BundleError(f"{folder / SUMS}: has lines beyond the bundle's files; restore the bundle")


def _check_models(folder: Path, manifest: Manifest, models: Mapping[str, bytes]) -> None:
    """The models are those that the manifest means, and none refers to another file. Raises BundleError."""
    if manifest.id != bundle_id(models, manifest):
        raise BundleError(f"{folder / MANIFEST}: id {manifest.id} is not that of this model; export it again")

    used = {MODEL, *(option.file for option in manifest.options)}
    if wrong := sorted(used ^ set(models)):
        raise BundleError(
            f"{folder / wrong[0]}: the options in {MANIFEST} and the models do not match; export it again"
        )

    for name, model in models.items():
        try:
            references = external_references(model)
        except ValueError as error:
            raise BundleError(f"{folder / name}: not an ONNX file ({error}); export it again") from error
        if references:
            raise BundleError(f"{folder / name}: refers to other files ({references[0]}); export it as a single file")
