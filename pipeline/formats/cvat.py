"""CVAT for images 1.1: annotations.xml, alone or in a zip with images/.

Read: mask, polygon, box and ellipse (both may be turned) by z_order, equal ones in the file's order. What has no area (points,
polyline, skeleton, cuboid, a polygon of two points) is counted, and refuses its image's mask where pixels in no shape are
background; a tag is of the whole image and only counted; `occluded` says nothing about pixels. A mask's run lengths go row by
row inside its own box and begin with the background. `subset` states an image's split.

Written: one mask per region as `regions.regions` cuts them, so that each can be picked, moved and erased alone, and
ignored pixels as masks of the label `ignore` (or the next free name): every pixel comes back as it was, whatever
`data.unannotated` says.
"""

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import ParseError, iterparse
from numpy.typing import NDArray

from pipeline import config
from pipeline.formats.common import tool_source
from pipeline.formats.common.annotations import (
    IGNORE,
    NO_AREA,
    Patch,
    Picture,
    Shape,
    ellipse,
    ignore_name,
    polygon,
    rectangle,
    turned,
)
from pipeline.formats.common.regions import regions
from pipeline.formats.common.source import Source, SourceError
from pipeline.formats.common.task import Item
from pipeline.formats.common.tool_source import ToolExport
from pipeline.imaging import label_maps
from pipeline.imaging.decode import Refused
from pipeline.storage import archives, atomic

NAME = "annotations.xml"
MAX_BYTES = 1 << 29
MAX_DEPTH = 16  # CVAT's own files have 6


def read(root: Path, data: config.Data, *, max_pixels: int) -> Source:
    """A task's export, unpacked: annotations.xml (or `data.annotations`) and images/. Raises SourceError."""
    labels, found = load(root / (data.annotations or NAME))
    colours = {label["name"]: label["color"] for label in labels if label["color"]}
    names = [label["name"] for label in labels]
    return tool_source.export_source(root, data, ToolExport(found, names, colours), max_pixels)


def load(path: Path) -> tuple[list[dict[str, Any]], list[Picture]]:
    """annotations.xml or a zip that holds it -> (labels as {"name", "color"}, pictures in the file's order).

    Raises:
        SourceError: not that format, damaged, hostile (entities, depth) or larger than 512 MB; names the file.
    """
    if not path.is_file():
        raise SourceError(f"{path}: not found; export the task as CVAT for images 1.1, or see data.annotations")
    if not zipfile.is_zipfile(path):
        if path.stat().st_size > MAX_BYTES:
            raise SourceError(f"{path}: more than {MAX_BYTES >> 20} MB of XML; export the task in parts")
        with path.open("rb") as file:
            return parse(file, path)
    with zipfile.ZipFile(path) as archive:
        found = [item for item in archive.infolist() if item.filename.rpartition("/")[2] == NAME]
        if len(found) != 1:
            raise SourceError(f"{path}: {len(found)} files named {NAME} in it; export one task as CVAT for images 1.1")
        if found[0].file_size > MAX_BYTES or found[0].flag_bits & 1:
            raise SourceError(f"{path}: {NAME} is encrypted or larger than {MAX_BYTES >> 20} MB; export it in parts")
        try:
            return parse(io.BytesIO(archives.unzip(archive, found[0])), path)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise SourceError(f"{path}: a damaged zip ({error}); export it again") from error


def parse(file: IO[bytes], path: Path) -> tuple[list[dict[str, Any]], list[Picture]]:
    """As `load`, from an open file; `path` is for messages."""
    labels: dict[str, dict[str, Any]] = {}  # by name: a list would be looked through for every label
    found: list[Picture] = []
    depth, root = 0, ""
    try:
        for event, element in iterparse(file, events=("start", "end"), forbid_dtd=True):
            if event == "start":
                depth += 1
                root = root or element.tag
                if depth > MAX_DEPTH or root != "annotations":
                    raise SourceError(f"{path}: not CVAT's annotations.xml (<{root}>, {depth} deep)")
                continue
            depth -= 1
            if element.tag == "track":
                raise SourceError(f"{path}: holds tracks of a video; export the task as CVAT for images 1.1")
            if element.tag == "label" and element.find("name") is not None:
                name = element.findtext("name", "").strip()
                labels.setdefault(name, {"name": name, "color": _colour(element.findtext("color", ""))})
            elif element.tag == "image":
                found.append(_picture(element, path))
                element.clear()  # a file of a gigabyte becomes shapes, not a tree
    except (ParseError, DefusedXmlException) as error:
        raise SourceError(f"{path}: no usable XML ({error!r}); export it again as CVAT for images 1.1") from error
    return list(labels.values()), found


def _colour(text: str) -> list[int] | None:
    try:
        return list(bytes.fromhex(text.strip().removeprefix("#"))) if len(text.strip()) == 7 else None
    except ValueError:
        return None


def _picture(element: Any, path: Path) -> Picture:
    try:
        height, width = int(element.attrib["height"]), int(element.attrib["width"])
        if height < 1 or width < 1:
            raise ValueError(f"{width} x {height} pixels")
        name = element.attrib["name"]
    except (KeyError, ValueError) as error:
        raise SourceError(f"{path}: an <image> without name, width or height ({error}); export it again") from error
    shapes = [Shape(*found) for child in element for found in _shape(child.tag, child.attrib)]
    lost = [
        (NO_AREA, f"a {child.tag} of {child.attrib.get('label', '')!r}")
        for child in element
        if not _has_area(child.tag, child.attrib)
    ]
    return Picture(name, height, width, shapes, lost=lost, subset=element.attrib.get("subset", ""))


def _shape(kind: str, at: dict[str, str]) -> Iterator[tuple[str, Any, int]]:
    """The arguments of a Shape; nothing for what has no area. Numbers are read when the shape is drawn."""
    if kind not in _DRAW or not _has_area(kind, at):
        return
    try:
        level = int(at.get("z_order", "0"))
    except ValueError:
        level = 0
    values = dict(at)  # the element is cleared later

    def draw(height: int, width: int) -> Patch:
        try:
            return _DRAW[kind](values, height, width)
        except (KeyError, ValueError, OverflowError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused(
                "bad-shape", f"a {kind} of {at.get('label')!r} is malformed ({error}); draw it again"
            ) from error

    yield at.get("label", ""), draw, level


def _has_area(kind: str, at: Mapping[str, str]) -> bool:
    """Whether a shape can cover a pixel. What is malformed is said when it is painted, what is no shape counts as one."""
    if kind == "polygon":
        pairs = at.get("points", "").split(";")
        return len(pairs) >= 3 or not all(pair.count(",") == 1 for pair in pairs)
    if kind == "box":
        return at.get("xtl") != at.get("xbr", "") and at.get("ytl") != at.get("ybr", "")
    return kind not in _NO_AREA


def _mask(at: dict[str, str], height: int, width: int) -> Patch:
    left, top, w, h = (int(float(at[key])) for key in ("left", "top", "width", "height"))
    if min(left, top) < 0 or min(w, h) < 1 or left + w > width or top + h > height:
        raise Refused("bad-shape", f"a mask of {w} x {h} at ({left}, {top}) leaves the image of {width} x {height}")
    return Patch(top, left, unpack([int(n) for n in at["rle"].split(",")], h, w))


def _polygon(at: dict[str, str], height: int, width: int) -> Patch:
    points = np.array([[float(n) for n in pair.split(",")] for pair in at["points"].split(";")], np.float64)
    return polygon(points.reshape(-1, 2), height, width)


def _box(at: dict[str, str], height: int, width: int) -> Patch:
    x0, y0, x1, y1 = (float(at[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
    corners = rectangle(x0, y0, x1, y1)
    centre = (x0 + x1) / 2, (y0 + y1) / 2
    return polygon(turned(corners, float(at.get("rotation", "0")), centre), height, width)


def _ellipse(at: dict[str, str], height: int, width: int) -> Patch:
    x, y, rx, ry = (float(at[key]) for key in ("cx", "cy", "rx", "ry"))
    ring = turned(ellipse(x, y, rx, ry), float(at.get("rotation", "0")), (x, y))
    return polygon(ring, height, width)


_NO_AREA = ("points", "polyline", "skeleton", "cuboid")
_DRAW = {"mask": _mask, "polygon": _polygon, "box": _box, "ellipse": _ellipse}


def unpack(counts: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """Run lengths row by row, beginning with False -> h x w. Raises Refused("bad-rle")."""
    if min(counts) < 0 or sum(counts) != height * width:
        raise Refused("bad-rle", f"mask run lengths sum to {sum(counts)}, not to its box of {width} x {height}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)


def pack(mask_HW: NDArray[np.bool_]) -> list[int]:
    """h x w -> run lengths row by row, beginning with the (possibly empty) run of False."""
    flat = mask_HW.ravel()
    edges = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]))
    counts: list[int] = np.diff(edges).tolist()
    return [0, *counts] if flat[0] else counts


def labels_json(classes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What CVAT's constructor takes under "Raw": names and colours, the ignore label last."""
    return [
        {"name": name, "color": f"#{bytes(colour).hex()}", "type": "any", "attributes": []}
        for name, colour in _names(classes)
    ]


def _names(classes: Sequence[dict[str, Any]]) -> list[tuple[str, Sequence[int]]]:
    ignore = ignore_name([c["name"] for c in classes])
    return [*((c["name"], c["color"]) for c in classes), (ignore, label_maps.IGNORE_COLOUR)]


def write(path: Path, items: Iterable[Item], classes: Sequence[dict[str, Any]], title: str = "marginalia") -> int:
    """A zip of images/ and annotations.xml, to be imported into a CVAT project as "CVAT for images 1.1".

    Args:
        items: read once, one image in memory at a time; names are unique.
        classes: {"id", "name", "color"} in order of id.

    Returns:
        How many images. The file replaces `path` whole.
    """
    count, images_xml = 0, list[str]()
    with atomic.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for count, item in enumerate(items, 1):
            archive.writestr(_entry(f"images/{item.name}", zipfile.ZIP_STORED), item.image)
            images_xml.append(image_xml(count - 1, item, classes))
        text = "".join([_head(classes, count, title), *images_xml, "</annotations>\n"])
        archive.writestr(_entry(NAME, zipfile.ZIP_DEFLATED), text)
    return count


def _entry(name: str, method: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # of 1980: equal content gives equal archives
    entry.compress_type, entry.external_attr = method, 0o644 << 16
    return entry


def _head(classes: Sequence[dict[str, Any]], count: int, title: str) -> str:
    labels = "".join(
        f"<label><name>{escape(label['name'])}</name><color>{label['color']}</color><attributes></attributes></label>"
        for label in labels_json(classes)
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>\n'
        f"<meta><task><id>0</id><name>{escape(title)}</name><size>{count}</size><mode>annotation</mode>"
        f"<labels>{labels}</labels></task></meta>\n"
    )


def image_xml(number: int, item: Item, classes: Sequence[dict[str, Any]]) -> str:
    """<image> with its masks. Unlabelled images (`label_HW` None) have none."""
    names = [name for name, _ in _names(classes)]
    out = []
    for value, (top, left, mask_HW) in regions(item.label_HW) if item.label_HW is not None else ():
        height, width = mask_HW.shape
        label = names[-1 if value == IGNORE else value]
        out.append(
            f'<mask label={quoteattr(label)} source="auto" occluded="0" rle="{", ".join(map(str, pack(mask_HW)))}" '
            f'left="{left}" top="{top}" width="{width}" height="{height}" z_order="0"></mask>\n'
        )
    return (
        f'<image id="{number}" name={quoteattr(item.name)} width="{item.width}" height="{item.height}">\n'
        f"{''.join(out)}</image>\n"
    )
