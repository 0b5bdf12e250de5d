"""What a source that cannot be read looks like, so that the message can name the setting."""

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.formats.common.source import walk

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")
_HEAD = 64 << 10  # bytes of a label file that are looked at
_MOST = 50  # label files that are
_WORDS = {
    "coco": "COCO data", "labelme": "labelme's files", "labelstudio": "a Label Studio export", "cvat": "a CVAT export",
    "voc": "a Pascal VOC tree", "cityscapes": "a Cityscapes tree", "folder": "a folder of images and masks",
}  # fmt: skip

# Labels that nothing here reads.
_BOXES = {
    "labels/**/*.txt": "look like YOLO's labels, which are not read here; convert them to COCO",
    "Annotations/*.xml": "look like VOC's boxes, which say nothing about pixels; masks are wanted in SegmentationClass",
}


def hint(root: Path, source: str) -> str | None:
    """A line that names the format that the folder has instead of `source`, or the archive in it; None where none is known."""
    if not root.is_dir():
        return None
    formats = list(_formats(root))
    if formats and source not in formats:
        return f"this looks like {_WORDS[formats[0]]}: set data.source: {formats[0]}"
    for pattern, what in _BOXES.items():
        if file := next(root.glob(pattern), None):
            return f"{file.relative_to(root).as_posix()} and its like {what}"
    inside = sorted(path.name for path in root.iterdir() if path.suffix.lower() in _ARCHIVES)
    if inside:
        return f"{inside[0]} lies in it packed: unpack it, or name it in data.path"
    return None


def _formats(root: Path) -> Iterator[str]:
    """Formats whose marks are there, the surest first."""
    if any(root.glob("JPEGImages")) or any(root.glob("*/JPEGImages")) or any(root.glob("*/*/JPEGImages")):
        yield "voc"
    if (root / "leftImg8bit").is_dir():
        yield "cityscapes"
    labels = [path for name, path in walk(root).items() if name.lower().endswith((".json", ".xml"))]
    for path in labels[:_MOST]:
        if kind := _kind(path):
            yield kind
    if (root / "images").is_dir() and (root / "masks").is_dir():
        yield "folder"
        yield "geotiff"  # lies the same way


def _kind(path: Path) -> str | None:
    """The format of a label file by its beginning."""
    with path.open("rb") as file:
        head = file.read(_HEAD).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    keys = set(re.findall(r'"(\w+)"\s*:', head))
    if "<annotations>" in head:
        return "cvat"
    if head.startswith("[") and "data" in keys and keys & {"annotations", "completions", "predictions"}:
        return "labelstudio"
    if head.startswith("{") and "shapes" in keys and keys & {"imagePath", "imageHeight", "flags", "version"}:
        return "labelme"
    if head.startswith("{") and "images" in keys and keys & {"file_name", "annotations", "categories", "licenses"}:
        return "coco"
    return None
