"""The source as a folder: as it lies there, or unpacked from an archive into a temporary folder."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import config
from pipeline.formats.common.source import SourceError
from pipeline.storage import archives, atomic

# Folders that some format's reader looks for: an archive that holds nothing else at its top is that format's root.
_ROOMS = {
    "images", "masks", "labels", "annotations", "Annotations", "JPEGImages", "ImageSets", "SegmentationClass",
    "leftImg8bit", "gtFine",
}  # fmt: skip


@contextmanager
def opened(
    path: Path, params: config.Ingest, temporary: Path, seen: Callable[[float], None] = lambda share: None
) -> Iterator[Path]:
    """The source's folder; for an archive a temporary one below `temporary`, which is gone after the block.

    Members come one by one through `archives.read`, under the caps of a dump, and are written by this code under the
    name that `archives.safe_name` made of theirs (relative, no `..`, no links, no control characters), each as a new
    file: a name that is there already, or that leads through a file, refuses the archive. Where the archive holds
    nothing but one folder, that one is the source (`VOCdevkit/VOC2012/...`).

    Raises:
        SourceError: the path is absent, or two members have one name.
        archives.DumpRefused: as `archives.read`.
    """
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise SourceError(f"{path}: no such folder or archive; data.path must name the labelled data")
    limits = archives.ArchiveLimits(
        int(params.dump_max_gb * 2**30), params.max_file_mb << 20, params.dump_max_files, params.dump_max_ratio
    )
    temporary.mkdir(parents=True, exist_ok=True)
    atomic.sweep(temporary, ".unpacked.*")
    with tempfile.TemporaryDirectory(prefix=".unpacked.", dir=temporary) as name:
        for member in archives.read(path, limits, seen):
            _write(Path(name) / member.name, member, path, params)
        yield _descend(Path(name))


def _write(target: Path, member: archives.ArchiveMember, archive: Path, params: config.Ingest) -> None:
    if member.data is None:
        raise SourceError(
            f"{archive}: member {member.name!a} has {member.size} bytes, over ingest.max_file_mb: {params.max_file_mb}; "
            "raise it, or unpack the archive and name the folder"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(member.data)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise SourceError(f"{archive}: two members have the name {member.name!a}; pack the folder again") from error


def _descend(folder: Path) -> Path:
    while True:
        inside = [item for item in folder.iterdir() if not item.name.startswith((".", "__MACOSX"))]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].name in _ROOMS:
            return folder
        folder = inside[0]
