"""Files that are either the old version or the new one, never half of either."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: without it a rename can be lost with the power (POSIX leaves that to the caller)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place when the block ends without an exception; else `path` is untouched.

    The temporary file lies in the same folder, which is made if it is absent, so that the rename stays within one
    file system. Its mode is what open() would give, not mkstemp's 0600.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically and durably."""
    with replacing(Path(path)) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8, newlines as given) atomically and durably."""
    write_bytes(path, text.encode("utf-8"))


def to_json(value: Any) -> str:
    """JSON with sorted keys, indent 2 and a final newline.

    Raises:
        ValueError: `value` holds NaN or an infinity, which JSON cannot say.
    """
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON. Raises ValueError for NaN and infinities, leaving `path` as it was."""
    write_text(path, to_json(value))


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ValueError that names the file when it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); run the stage that writes it again") from error


def sha256(source: Path | bytes) -> str:
    """Hex SHA-256 of bytes, or of a file's content read in pieces."""
    if isinstance(source, bytes | bytearray | memoryview):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    with Path(source).open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold `file`'s exclusive lock; waits for another process that has it. A crash sets it free.

    By flock itself: where a file system has none this fails, while filelock then takes the file's existence for the lock,
    which a killed process leaves behind.
    """
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def sweep(folder: Path, pattern: str) -> None:
    """Remove the folders that killed runs left behind, once they are a day old: a younger one may still be at work."""
    for stale in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another run beside this one has just ended
            if time.time() - stale.stat().st_mtime > 86_400:
                shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new empty folder that takes `path`'s place when the block ends without an exception; else `path` is untouched.

    A folder cannot be renamed over a full one, so the old one steps aside for a moment. Should that moment end badly it
    is put back: at once on an error, by the next call after a kill. Other left-overs of a killed run for the same `path`
    are removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    left = sorted(path.parent.glob(f".{path.name}.*.old.part"), key=lambda aside: aside.stat().st_mtime)
    if left and not path.exists():
        left[-1].replace(path)
    for stale in path.parent.glob(f".{path.name}.*.part"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    aside = temporary.with_suffix(".old.part")
    try:
        yield temporary
        temporary.chmod(0o755)
        sync_folder(temporary)
        if path.exists():
            path.replace(aside)
        temporary.replace(path)
        sync_folder(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.replace(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
