"""Deliveries behind a URL, read through fsspec: one file in pieces into the spool, or a folder's files one by one.

Only the scheme that was given is followed: chained URLs (`zip://...::file://...`) are refused, and so is a redirect to
another scheme. Credentials are the driver's own affair (environment, configuration files); a URL's query, where signed
links keep them, is never shown.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote

from pipeline.storage import archives
from pipeline.storage.archives import ArchiveLimits, ArchiveMember, DumpRefused

CHUNK = 1 << 20
# Scheme -> the package with its driver; None: part of fsspec. Wrappers of other schemes are left out on purpose.
DRIVERS = {
    "http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "oss": "ossfs", "oci": "ocifs", "hf": "huggingface_hub",
    "webdav": "webdav4", "webhdfs": "requests", "hdfs": "pyarrow", "smb": "smbprotocol", "sftp": "paramiko",
    "ssh": "paramiko", "ftp": None, "memory": None,
}  # fmt: skip


class Listed(NamedTuple):
    """A file below a folder URL: name relative to the folder, the driver's own path, bytes (None where unknown)."""

    name: str
    path: str
    size: int | None


def is_url(where: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", where) is not None


def shown(url: str) -> str:
    """The URL without query, fragment and password, for messages."""
    return re.sub(r"://[^/@]*@", "://", re.split(r"[?#]", url)[0])


def name(url: str) -> str:
    """The last part of the path."""
    return unquote(shown(url).rstrip("/").rpartition("/")[2])


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp

    # Its own default ends every download after five minutes, however well it goes.
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


class RemotePlace:
    """A file or folder behind a URL.

    Raises:
        DumpRefused: the scheme is unknown or chained, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self.shown = shown(url)
        self.scheme = url.partition("://")[0].lower()
        if "::" in url:
            raise DumpRefused(f"{self.shown}: chained URLs are not followed; give the archive's own URL")
        if self.scheme not in DRIVERS:
            raise DumpRefused(f"{self.shown}: unknown scheme {self.scheme}://; known: {', '.join(sorted(DRIVERS))}")
        try:
            import fsspec

            self.system, self.path = fsspec.url_to_fs(url, **_options(self.scheme))
        except ImportError as error:
            package = DRIVERS[self.scheme] or "fsspec"
            raise DumpRefused(f"{self.shown}: no driver for {self.scheme}://; `pip install {package}`") from error

    def is_folder(self) -> bool:
        """Over HTTP, what ends with a slash; elsewhere what the store says. DumpRefused where there is nothing."""
        if self.scheme in ("http", "https"):
            return self.shown.endswith("/")
        return bool(self._asked(lambda: self.system.info(self.path)["type"] == "directory"))

    def listing(self, limits: ArchiveLimits) -> list[Listed]:
        """All files below the folder, by name."""
        found = self._asked(lambda: self.system.find(self.path, detail=True))
        if len(found) > limits.files:
            raise DumpRefused(f"{self.shown}: more than {limits.files} files (ingest.dump_max_files); split the dump")
        start = len(self.path.rstrip("/")) + 1
        listed = []
        for path, about in sorted(found.items()):
            relative = unquote(path[start:]) if self.scheme in ("http", "https") else path[start:]
            if not relative or relative.endswith("/"):
                continue  # object stores keep folders as empty objects
            if self.scheme in ("http", "https") and path[start] in "?#":
                continue  # a web server's links that sort its listing
            if about.get("type", "file") != "file":
                raise DumpRefused(f"{self.shown}: {relative!a} is a link or a device, not a file; copy the file itself")
            listed.append(Listed(relative, path, about.get("size")))
        return listed

    def members(
        self, listed: list[Listed], limits: ArchiveLimits, seen: Callable[[float], None]
    ) -> Iterator[ArchiveMember]:
        """The listed files, each read fully before the next; one larger than the cap is cut off there and left out."""
        for number, item in enumerate(listed, 1):
            name = archives.safe_name(item.name, self.shown)
            if item.size is not None and item.size > limits.file_bytes:
                yield ArchiveMember(name, item.size, None)
            else:
                data = b"".join(self._pieces(item.path, limits.file_bytes + 1))
                if item.size not in (None, len(data)):
                    raise DumpRefused(f"{self.shown}: {name!a} has {len(data)} of {item.size} bytes; deliver it again")
                yield ArchiveMember(name, len(data), data if len(data) <= limits.file_bytes else None)
            seen(number / len(listed))

    def fetch(self, folder: Path, limits: ArchiveLimits, path: str | None = None) -> Path:
        """The file in `folder`, under its own name; `path`: another file of the same store.

        Raises:
            DumpRefused: not there, larger than the cap on bytes, or cut short.
        """
        path = path or self.path
        target = folder / (re.sub(r"[^\w.~-]", "_", name(path))[-100:].lstrip(".") or "delivery")
        total = 0
        with target.open("wb") as file:
            for piece in self._pieces(path, limits.total_bytes + 1):
                total += len(piece)
                if total > limits.total_bytes:
                    raise archives.too_big(self.shown, limits)
                file.write(piece)
        return target

    def _pieces(self, path: str, limit: int) -> Iterator[bytes]:
        """The file's bytes in pieces, at most `limit` of them. DumpRefused when the driver fails or ends early."""
        total = 0
        source = self._asked(lambda: self._opened(path))
        with source:
            size = getattr(source, "size", None)  # as the store told it
            while total < limit and (piece := self._asked(partial(source.read, min(CHUNK, limit - total)))):
                total += len(piece)
                yield piece
        if isinstance(size, int) and total < min(size, limit):
            raise DumpRefused(f"{self.shown}: cut short after {total} of {size} bytes; try again")

    def _opened(self, path: str) -> IO[bytes]:
        if self.scheme not in ("http", "https"):
            opened: IO[bytes] = self.system.open(path, "rb")
            return opened
        # One streamed answer: no guesses about ranges, and the way that it took can be looked at.
        stream: Any = self.system.open(path, "rb", block_size=0)
        hops = {str(answer.url.scheme) for answer in (*stream.r.history, stream.r)}
        if hops != {self.scheme}:
            stream.close()
            raise DumpRefused(f"{self.shown}: redirects from {self.scheme}:// to another scheme; give the final URL")
        return stream  # type: ignore[no-any-return]

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except DumpRefused:
            raise
        except FileNotFoundError as error:
            raise DumpRefused(f"{self.shown}: no such file or folder") from error
        except Exception as error:  # each driver has exceptions of its own
            reason = str(error).split("?")[0] or type(error).__name__  # the query may hold a signature
            raise DumpRefused(f"{self.shown}: {type(error).__name__}: {reason[:300]}; try again") from error
