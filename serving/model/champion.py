"""Where bundles lie: the one that the champion pointer names, and those that may be named in a request."""

import re
from pathlib import Path, PurePosixPath

from pipeline.storage import atomic
from serving.settings import Settings

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST = 400  # characters of a path in a request


class PointerError(ValueError):
    """The champion pointer cannot be followed; the message names the file."""


class PathError(ValueError):
    """A path that must not be looked at; the message says what to send."""


def bundle_folder(settings: Settings) -> Path:
    """The folder to serve: the pinned bundle, else the one that the champion pointer names.

    The pointer's paths are relative to the folder that holds `champions/`, wherever the service was started.

    Raises:
        PointerError: no pointer, or one that is not ours.
    """
    if settings.bundle is not None:
        return settings.bundle
    pointer = settings.champions
    if not pointer.is_file():
        raise PointerError(
            f"{pointer}: no champion yet; run `dvc repro`, or `dvc repro -f -s gate` where that says nothing has "
            "changed, or name a bundle in MARGINALIA_BUNDLE"
        )
    try:
        named = Path(atomic.read_json(pointer)["bundle"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        advice = "move it away and run `dvc repro -f -s gate`"
        raise PointerError(f"{pointer}: not a champion pointer ({error!r}); {advice}") from error
    return named if named.is_absolute() else pointer.absolute().parent.parent / named


def read_pointer(settings: Settings) -> bytes:
    """What the pointer file holds, to see it change; as if it never did where a bundle is pinned."""
    if settings.bundle is not None:
        return b""
    try:
        return settings.champions.read_bytes()
    except OSError:
        return b"absent"


def root(settings: Settings) -> Path:
    """The folder below which a request may name bundles: MARGINALIA_BUNDLES, else the one that holds `champions/`."""
    return (settings.bundles or settings.champions.absolute().parent.parent).resolve()


def named(settings: Settings, path: str) -> Path:
    """The folder that `path` means, really below the allowed root; links are followed first, so none leads out.

    Raises:
        PathError: absolute, with `..` or control characters, too long, or it leads out.
        FileNotFoundError: no folder there.
    """
    advice = "send the path of a bundle's folder relative to the allowed folder, as in champions/ID/bundle"
    parts = PurePosixPath(path).parts
    if not parts or len(path) > _LONGEST or _CONTROL.search(path) or path.startswith("/") or ".." in parts:
        raise PathError(f"not a plain relative path; {advice}")
    top = root(settings)
    try:
        real = top.joinpath(*parts).resolve()
        inside, there = real.is_relative_to(top), real.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long a name, a loop of links, characters no file system has
        inside, there = True, False
    if not inside:
        raise PathError(f"leads out of the allowed folder; {advice}")
    if not there:
        raise FileNotFoundError(f"no folder of that name below the allowed folder; {advice}")
    return real


def shown(settings: Settings, text: object) -> str:
    """A path, or a message with paths, as callers may see it: without where the allowed folder lies."""
    short = str(text)
    for top in {str(root(settings)), str(settings.champions.absolute().parent.parent)}:
        short = short.replace(f"{top}/", "")
    return short[:500]
