"""Plain tar shards with known offsets: few large files, any member readable by one seek.

Members carry WebDataset-style names (`KEY.ext`), so other tools can stream the shards too.
"""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from pipeline.storage import atomic

BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """One regular file of an uncompressed tar: its name and where its bytes lie."""

    name: str
    offset: int
    length: int


def _append(file: IO[bytes], name: str, data: bytes | Path) -> int:
    """Write one tar member, from memory or from a file, at the file's position; returns its first byte's offset."""
    info = tarfile.TarInfo(name)
    info.size = data.stat().st_size if isinstance(data, Path) else len(data)
    info.mode = 0o644  # owner, times and modes are constants: equal content gives equal archives
    file.write(info.tobuf(tarfile.PAX_FORMAT))
    offset = file.tell()
    if isinstance(data, Path):
        with data.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
    else:
        file.write(data)
    if file.tell() != offset + info.size:
        raise ValueError(f"{name}: its size changed while it was read; wait until it is written, then run again")
    file.write(bytes(-info.size % BLOCK))
    return offset


@contextmanager
def replacing_tar(path: Path) -> Iterator[Callable[[str, bytes | Path], int]]:
    """Yields add(name, data) -> offset; the finished uncompressed tar replaces `path` when the block ends well."""
    with atomic.replacing(path) as file:
        yield lambda name, data: _append(file, name, data)
        file.write(bytes(2 * BLOCK))


def write_tar(path: Path, members: Iterable[tuple[str, bytes | Path]]) -> int:
    """Write (name, data) pairs in the order given; returns how many. Atomic; the bytes depend on the pairs alone."""
    count = 0
    with replacing_tar(path) as add:
        for name, data in members:
            add(name, data)
            count += 1
    return count


def members(path: Path) -> list[Member]:
    """Regular files of an uncompressed tar, in archive order; headers only, no data is read.

    Raises:
        ValueError: not a tar, compressed, or cut short; names the file.
    """
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            found = [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: not a readable uncompressed tar ({error}); fetch or register it again") from error
    if any(m.offset + m.length > size for m in found):
        raise ValueError(f"{path}: cut short: its last file ends past the archive's {size} bytes; fetch it again")
    return found


def read(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`, by one pread: the cost does not depend on the position or on the shard's size.

    Raises:
        ValueError: the file ends earlier than the manifest says.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
    if len(data) != length:
        raise ValueError(
            f"{path}: {length} bytes expected at offset {offset}, {len(data)} found; "
            "the shard changed after the manifest was written: run `dvc repro` again"
        )
    return data


class Shards:
    """Writes PREFIX-00000.tar, PREFIX-00001.tar, ... into a folder; a new one starts when `limit` bytes are reached.

    The folder is meant to be a temporary one that its owner renames when all is written, so single shards are
    synced but not renamed.
    """

    def __init__(self, folder: Path, prefix: str, limit: int) -> None:
        self.folder, self.prefix, self.limit = folder, prefix, limit
        self.count = 0
        self._file: IO[bytes] | None = None

    def add(self, name: str, data: bytes) -> tuple[str, int, int]:
        """Append one member; returns (shard file name, offset, length)."""
        if self._file is not None and self._file.tell() + len(data) + BLOCK > self.limit:
            self.close()
        if self._file is None:
            self._name = f"{self.prefix}-{self.count:05d}.tar"
            self._file = (self.folder / self._name).open("wb")
            self.count += 1
        return self._name, _append(self._file, name, data), len(data)

    def close(self) -> None:
        """Finish the open shard: end-of-archive blocks, fsync."""
        if self._file is None:
            return
        self._file.write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
