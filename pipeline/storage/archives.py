"""Untrusted folders, zips and tars of files, read member by member under caps.

Nothing is ever extracted by a member's own path, and nothing is written here at all. One hostile member refuses the
whole archive: who packs a link or a way out of the folder is not to be trusted with the rest.
"""

import bz2
import gzip
import io
import lzma
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

RATIO_FLOOR = 16 << 20  # small archives may expand this far whatever their ratio: 1 kB of black frames is no bomb
MAX_NAME, MAX_PART = 1024, 255
# Taken as images by name, so that what is wrong with each can be said; other names when their content is an image.
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2")
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_KINDS = (
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (257, b"ustar", "tar"),
)  # fmt: skip


class DumpRefused(ValueError):
    """The whole archive is refused; the message names the archive, the member and what to do."""


class ArchiveLimits(NamedTuple):
    """Caps on the sum of unpacked bytes, on one file's bytes, on the number of members, and unpacked / packed."""

    total_bytes: int
    file_bytes: int
    files: int
    ratio: int


class ArchiveMember(NamedTuple):
    """A regular file. `data` is None when it is larger than `ArchiveLimits.file_bytes`; `size` is its unpacked length."""

    name: str
    size: int
    data: bytes | None


def safe_name(name: str, archive: Path | str) -> str:
    """Member name with forward slashes and without `.` parts.

    Raises:
        DumpRefused: absolute, with a drive letter, with `..`, with control characters, or too long.
    """
    shown = ascii(name[:120])
    path = name.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        raise DumpRefused(f"{archive}: member {shown} has an absolute path; pack the folder with relative paths")
    if ".." in parts:
        raise DumpRefused(f"{archive}: member {shown} leads out of the archive; pack the folder with plain paths")
    if re.search(r"[\x00-\x1f\x7f]", path):
        raise DumpRefused(f"{archive}: member {shown} has control characters in its name; rename it")
    if len(path) > MAX_NAME or any(len(part.encode("utf-8", "replace")) > MAX_PART for part in parts):
        raise DumpRefused(f"{archive}: member {shown}... has a name of {len(path)} characters; shorten it")
    return "/".join(parts).encode("utf-8", "replace").decode("utf-8")


def read(
    path: Path, limits: ArchiveLimits, seen: Callable[[float], None] = lambda share: None
) -> Iterator[ArchiveMember]:
    """Regular files of a folder, zip or tar (plain, gzip, bzip2, xz, zstd), each read fully before the next.

    Args:
        seen: called with the share of the archive that has been read, 0..1, after each member.

    Raises:
        DumpRefused: not an archive, damaged, encrypted, beyond a cap, a hostile name, a link or a device.
    """
    if path.is_dir():
        return counted(_folder(path, limits), path, limits)
    if not path.is_file():
        raise DumpRefused(f"{path}: no such file or folder")
    kind = _kind(path)
    source = _zip(path, limits, seen) if kind == "zip" else _tar(path, kind, limits, seen)
    return counted(source, path, limits)


def counted(source: Iterator[ArchiveMember], path: Path | str, limits: ArchiveLimits) -> Iterator[ArchiveMember]:
    """The same members, of one delivery, until their number or the sum of their sizes passes a cap: then DumpRefused."""
    total = 0
    for count, member in enumerate(source, 1):
        total += member.size
        if count > limits.files:
            raise DumpRefused(f"{path}: more than {limits.files} files (ingest.dump_max_files); split the dump")
        if total > limits.total_bytes:
            raise too_big(path, limits)
        yield member


def too_big(path: Path | str, limits: ArchiveLimits) -> DumpRefused:
    return DumpRefused(
        f"{path}: unpacks to more than {limits.total_bytes / 2**30:.3g} GiB (ingest.dump_max_gb, or what the disk "
        "has room for); split the dump or raise the cap"
    )


def _too_dense(path: Path, limits: ArchiveLimits) -> DumpRefused:
    return DumpRefused(
        f"{path}: unpacks to more than {limits.ratio} times its size (ingest.dump_max_ratio): this looks like a "
        "decompression bomb"
    )


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    for at, magic, kind in _KINDS:
        if head[at : at + len(magic)] == magic:
            return kind
    if len(head) == tarfile.BLOCKSIZE and not head.strip(b"\0"):
        return "tar"  # of nothing
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")  # V7 tars have no magic, but a checksum
        return "tar"
    except tarfile.HeaderError:
        raise DumpRefused(f"{path}: not a folder, zip or tar; pack the images as one of them") from None


def _folder(path: Path, limits: ArchiveLimits) -> Iterator[ArchiveMember]:
    for item in sorted(path.rglob("*")):
        mode = item.lstat().st_mode
        name = safe_name(item.relative_to(path).as_posix(), path)
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise DumpRefused(f"{path}: {name!a} is a link or a device, not a file; copy the file itself")
        size = item.stat().st_size
        yield ArchiveMember(name, size, item.read_bytes() if size <= limits.file_bytes else None)


def _zip(path: Path, limits: ArchiveLimits, seen: Callable[[float], None]) -> Iterator[ArchiveMember]:
    try:
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
            # zipfile never yields more of a member than its declared size, so the declared sum is a hard bound.
            declared = sum(item.file_size for item in items)
            if declared > max(RATIO_FLOOR, limits.ratio * path.stat().st_size):
                raise _too_dense(path, limits)
            if declared > limits.total_bytes:
                raise too_big(path, limits)
            for number, item in enumerate(items, 1):
                name, mode = safe_name(item.filename, path), item.external_attr >> 16
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise DumpRefused(f"{path}: member {name!a} is a link or a device; pack the files themselves")
                if item.flag_bits & 1:
                    raise DumpRefused(f"{path}: member {name!a} is encrypted; pack the dump without a password")
                if item.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DumpRefused(
                        f"{path}: member {name!a} is packed with method {item.compress_type}; use deflate"
                    )
                if not item.filename.endswith(("/", "\\")):  # .NET writes folders with a backslash
                    yield ArchiveMember(
                        name, item.file_size, unzip(archive, item) if item.file_size <= limits.file_bytes else None
                    )
                seen(number / len(items))
    except DumpRefused:
        raise
    except Exception as error:  # zipfile lets through what its decompressors raise
        raise DumpRefused(f"{path}: damaged or unreadable zip ({error}); deliver it again") from error


def unzip(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> bytes:
    """At most the declared size. ZipFile.read() unpacks the whole member before it cuts it, and with other methods than
    deflate so does every read: a member that lies about its size would fill the memory."""
    with archive.open(item) as file:
        return b"".join(iter(lambda: file.read(1 << 20), b""))


class _Info(tarfile.TarInfo):
    """Refuses oversized extended headers, which tarfile would read into memory whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _HEADERS and self.size > 1 << 20:
            raise DumpRefused(f"{tar.name!s}: an extended header of {self.size} bytes; pack the dump again")
        return super()._proc_member(tar)  # type: ignore[misc]


class _Metered(io.RawIOBase):
    """Unpacked stream that stops at the caps and remembers its last block."""

    def __init__(self, inner: IO[bytes], raw: IO[bytes], path: Path, limits: ArchiveLimits) -> None:
        self.inner, self.raw, self.path, self.limits = inner, raw, path, limits
        self.packed, self.total, self.tail = path.stat().st_size, 0, b""

    def read(self, size: int = -1) -> bytes:
        data = self.inner.read(size if size >= 0 else 1 << 20)
        self.total += len(data)
        self.tail = (self.tail + data)[-tarfile.BLOCKSIZE :]
        if self.inner is not self.raw and self.total > max(RATIO_FLOOR, self.limits.ratio * self.packed):
            raise _too_dense(self.path, self.limits)
        if self.total > self.limits.total_bytes + RATIO_FLOOR:
            raise too_big(self.path, self.limits)
        return data


def _unpacked(raw: IO[bytes], path: Path, kind: str) -> Any:
    """The unpacked stream over an open archive file."""
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if kind == "bzip2":
        return bz2.BZ2File(raw)
    if kind == "xz":
        return lzma.LZMAFile(raw)
    if kind == "zstd":
        try:
            import zstandard  # of the extra `train`: what only serves has no need of it
        except ImportError as error:
            raise DumpRefused(f"{path}: `pip install zstandard` to read zstd, or pack with gzip") from error
        # Several frames one after another are one stream, as with gzip: pzstd and split writers make such files.
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        return decompressor.stream_reader(raw, read_across_frames=True)
    return raw


def _tar(path: Path, kind: str, limits: ArchiveLimits, seen: Callable[[float], None]) -> Iterator[ArchiveMember]:
    try:
        with path.open("rb") as raw:
            stream = _Metered(_unpacked(raw, path, kind), raw, path, limits)
            with tarfile.open(str(path), "r|", fileobj=stream, tarinfo=_Info) as tar:
                while (item := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    yield from _tar_member(tar, item, path, limits)
                    seen(raw.tell() / stream.packed)
            while stream.read(1 << 16):
                pass  # to the end: compressed formats keep their checksum there
            if stream.tail.strip(b"\0"):
                raise DumpRefused(f"{path}: the tar's end is missing, it was cut short; deliver it again")
    except DumpRefused:
        raise
    except Exception as error:  # each decompressor has exceptions of its own, zstandard's even outside the library
        raise DumpRefused(f"{path}: damaged or truncated archive ({error}); deliver it again") from error


def _tar_member(
    tar: tarfile.TarFile, item: tarfile.TarInfo, path: Path, limits: ArchiveLimits
) -> Iterator[ArchiveMember]:
    name = safe_name(item.name, path)
    if item.isdir():
        return
    if not item.isreg() or item.issparse():
        what = "a link" if item.issym() or item.islnk() else "a device, pipe or sparse file"
        raise DumpRefused(f"{path}: member {name!a} is {what}; pack the files themselves")
    if item.size > limits.total_bytes:
        raise too_big(path, limits)
    if item.size > limits.file_bytes:
        yield ArchiveMember(name, item.size, None)
        return
    file = tar.extractfile(item)
    data = file.read() if file else b""
    if len(data) != item.size:
        raise DumpRefused(f"{path}: member {name!a} is cut short; deliver the archive again")
    yield ArchiveMember(name, item.size, data)
