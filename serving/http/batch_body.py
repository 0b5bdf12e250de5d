"""The body of a call with many images: a form or a zip, opened under caps, each image read only when its turn comes."""

import asyncio
import io
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request

from pipeline.storage import archives
from serving.http import requests
from serving.http.requests import Problem
from serving.settings import Settings

RATIO = 200  # unpacked / packed: images hardly shrink, and flat colours beyond archives.RATIO_FLOOR are a bomb
_ARCHIVE = Path("the zip")
_END = struct.Struct("<4s4H2LH")  # APPNOTE.TXT 4.3.16: mark, disks, entries here, entries, directory's bytes, its place
_END_MARK, _LOCATOR_MARK, _LOCATOR_SIZE = b"PK\x05\x06", b"PK\x06\x07", 20  # 4.3.15: before it where there is a zip64
_ENTRY = 2048  # bytes of the directory for an image, its name and folders
_KINDS = {"multipart/form-data": "form", "application/zip": "zip", "application/x-zip-compressed": "zip"}


class Sent(NamedTuple):
    """One image of many: its name as sent, and how to get its bytes (blocking; raises Problem)."""

    name: str
    load: Callable[[], bytes]


def body_kind(request: Request) -> str:
    """ "form" or "zip" by Content-Type. Raises Problem(415)."""
    stated = request.headers.getlist("content-type")
    kind = _KINDS.get(stated[0].partition(";")[0].strip().lower()) if len(stated) == 1 else None
    if kind is None or request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(
            415,
            "unsupported-type",
            "send multipart/form-data with file fields 'image', or a zip of images as application/zip, each without a "
            "Content-Encoding",
        )
    return kind


async def open_body(request: Request, kind: str, body: bytes, settings: Settings) -> list[Sent]:
    """The images in the order in which they were sent.

    Raises:
        Problem: 400 "bad-multipart" or "bad-archive", 422 "too-many-images".
    """
    if kind == "zip":
        return await asyncio.to_thread(open_zip, body, settings)
    files = await requests.form_files(request, body, settings.many_images)
    return [Sent(name or f"image-{i}", _checked(data, settings)) for i, (name, data) in enumerate(files)]


def _checked(data: bytes, settings: Settings) -> Callable[[], bytes]:
    def load() -> bytes:
        if not data:
            raise Problem(400, "empty", "the file has no bytes; send an image")
        if len(data) > settings.max_body:
            raise _too_large(settings)
        return data

    return load


def _too_large(settings: Settings) -> Problem:
    return Problem(413, "body-too-large", f"over the limit of {settings.max_body} bytes; scale the image down")


def open_zip(body: bytes, settings: Settings) -> list[Sent]:
    """The files of a zip; the directory is judged as a whole, so that a hostile one is refused before any work is done.

    Raises:
        Problem: 400 "bad-archive": damaged, encrypted, links, names that lead elsewhere, unknown compression, or it would
            unpack to more than RATIO times its size. 422 "too-many-images".
    """
    _check_end(body, settings)
    try:
        archive = zipfile.ZipFile(io.BytesIO(body))
        items = [item for item in archive.infolist() if not item.is_dir()]
    except Exception as error:  # zipfile lets through all that damaged fields lead to
        raise Problem(400, "bad-archive", "the body is no zip, or a damaged one; pack it again") from error
    if not items:
        raise Problem(400, "bad-archive", "the zip has no files; pack images")
    if len(items) > settings.many_images:
        raise Problem(
            422, "too-many-images", f"{len(items)} files, over the limit of {settings.many_images}; send parts"
        )
    if sum(item.file_size for item in items) > max(archives.RATIO_FLOOR, RATIO * len(body)):
        raise Problem(400, "bad-archive", f"the zip unpacks to more than {RATIO} times its size")
    return [_member(archive, item, settings) for item in items]


def _check_end(body: bytes, settings: Settings) -> None:
    """Refuse a directory that is too large to be looked at: zipfile reads all that the end record (the one that it would
    find) states. The number of entries there counts folders too and is read by nobody. Raises Problem(422)."""
    at = len(body) - _END.size
    if not (body[-_END.size :].startswith(_END_MARK) and body.endswith(b"\0\0")):
        at = body.rfind(_END_MARK, max(0, at - (1 << 16)))
    if at < 0 or len(body) - at < _END.size:
        return  # no zip, as zipfile will say
    _, _, _, _, entries, size, place, _ = _END.unpack_from(body, at)
    zip64 = body[max(0, at - _LOCATOR_SIZE) : at].startswith(_LOCATOR_MARK)
    if zip64 or entries == 0xFFFF or 0xFFFFFFFF in (size, place) or size > settings.many_images * _ENTRY + (1 << 16):
        reason = (
            f"the zip's directory is too large for {settings.many_images} images; send parts, in zips without zip64"
        )
        raise Problem(422, "too-many-images", reason)


def _member(archive: zipfile.ZipFile, item: zipfile.ZipInfo, settings: Settings) -> Sent:
    try:
        name = archives.safe_name(item.filename, _ARCHIVE)
    except archives.DumpRefused as error:
        raise Problem(400, "bad-archive", str(error)) from error
    subject = f"the zip: member {name!a}"
    if stat.S_IFMT(item.external_attr >> 16) not in (0, stat.S_IFREG):
        raise Problem(400, "bad-archive", f"{subject} is a link or a device; pack the files themselves")
    if item.flag_bits & 1:
        raise Problem(400, "bad-archive", f"{subject} is encrypted; pack without a password")
    if item.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Problem(400, "bad-archive", f"{subject} is packed with method {item.compress_type}; use deflate")

    def load() -> bytes:
        if item.file_size > settings.max_body:
            raise _too_large(settings)
        try:
            data = archives.unzip(archive, item)
        except Exception as error:  # zipfile lets through what its decompressors raise
            raise Problem(400, "corrupt", f"{subject} is damaged; pack it again") from error
        return _checked(data, settings)()

    return Sent(name, load)
