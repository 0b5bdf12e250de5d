"""Class lists: from classes.txt, or from the names that a label file brings."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.formats.common.source import SourceError
from pipeline.formats.names import class_names
from pipeline.imaging import label_maps
from pipeline.imaging.mask_png import Colour

IGNORE, BACKGROUND = "ignore", "background"
LABELME_IGNORE = "__ignore__"  # first line of labelme's labels.txt: its word for 255, never a class
_BACKGROUNDS = (BACKGROUND, "_background_", "__background__")
DEFAULT = "classes.txt"
OTHER_NAMES = ("class_names.txt", "class_dict.csv")  # labelme2voc; CamVid's and many kaggle sets
_HEX = re.compile(r"\s#([0-9a-fA-F]{6})$")
_RGB = re.compile(r"\s(\d+)\s+(\d+)\s+(\d+)$")
_CSV = re.compile(r"^(?P<name>[^,;\t]+?)\s*[,;\t]\s*(\d+)\s*[,;\t]\s*(\d+)\s*[,;\t]\s*(\d+)$")
_HEADER = re.compile(r"^(name|class|class_name|label)s?\s*[,;\t]\s*(r|red)\b", re.IGNORECASE)  # of class_dict.csv
_CELLS = re.compile(r"[,;\t]")
_NAME_COLUMNS, _ID_COLUMNS = (
    ("name", "class", "class_name", "label", "names", "classes"),
    ("id", "index", "value", "class_id"),
)
Classes = list[dict[str, Any]]


def parse(lines: Sequence[str], file: Path) -> tuple[Classes, list[Colour]]:
    """Lines of a class list -> ([{"id", "name", "color"}], colours that mean ignore).

    A line is `name`, `name #rrggbb`, `name r g b` or `name,r,g,b` (also below a header such as `name,r,g,b`). Colours are
    0..255 each; classes without one get a distinct one. Lines that begin with `#` are comments, `__ignore__` (labelme)
    names no class. Lines `ignore r g b` after the classes have no id: they only say which colours of a colour mask mean
    ignore.

    Raises:
        SourceError: no class, a name twice, an empty line between classes (their ids are counted by lines), a colour
            beyond 255, `ignore` before a class or without a colour, or more than 255 classes (255 means ignore).
    """
    lines = _by_columns(lines, file)
    found: list[tuple[str, list[int] | None]] = []
    ignored: list[Colour] = []
    empty: int | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            empty = empty or number
            continue
        if line.startswith("#") or line.strip() == LABELME_IGNORE or (not found and _HEADER.match(line)):
            continue
        name, colour = _split(line.strip(), file, number)
        if empty is not None and name != IGNORE and found:
            raise SourceError(
                f"{file}: line {empty} is empty, and the lines after it are classes: a class's id is its place in the list; "
                "take the line out, or name what that id means"
            )
        empty = None
        if name == IGNORE:
            if colour is None:
                raise SourceError(f"{file}: line {number}: `ignore` needs a colour: it says which one means ignore")
            ignored.append((colour[0], colour[1], colour[2]))
        elif ignored:
            raise SourceError(f"{file}: line {number}: class {name!r} stands below `ignore`; put those lines last")
        elif any(name == known for known, _ in found):
            raise SourceError(f"{file}: line {number}: class {name!r} stands there twice")
        else:
            found.append((name, colour))
    if not 0 < len(found) <= 255:
        raise SourceError(f"{file}: {len(found)} classes; expected 1 to 255, one name a line (id 255 means ignore)")
    spare = label_maps.palette(len(found))
    return [
        {"id": k, "name": name, "color": list(spare[k]) if colour is None else colour}
        for k, (name, colour) in enumerate(found)
    ], ignored


def _by_columns(lines: Sequence[str], file: Path) -> Sequence[str]:
    """Lines of a table with a header, such as Excel's `id;name;r;g;b`, as `name,r,g,b` in the order of their ids; others as
    they are. Rows without a cell are dropped.

    Raises:
        SourceError: ids that do not count from 0.
    """
    header = [cell.strip().strip('"').casefold() for cell in _CELLS.split(lines[0])] if lines else []
    name = next((header.index(word) for word in _NAME_COLUMNS if word in header), None)
    if len(header) < 2 or name is None:
        return lines
    colour = [
        header.index(word)
        for word in (("r", "g", "b") if "r" in header else ("red", "green", "blue"))
        if word in header
    ]
    number = next((header.index(word) for word in _ID_COLUMNS if word in header), None)
    rows = [[cell.strip().strip('"') for cell in _CELLS.split(line)] for line in lines[1:] if line.strip(" ,;\t")]
    if number is not None:
        ids = [row[number] if number < len(row) else "" for row in rows]
        if sorted(ids) != sorted(map(str, range(len(rows)))):
            raise SourceError(
                f"{file}: the column {header[number]!r} holds {', '.join(ids[:6])}; ids count from 0 without a gap: add the "
                "missing rows, or take the column out"
            )
        rows = sorted(rows, key=lambda row: int(row[number]))
    return [",".join([row[name], *(row[place] for place in colour)]) for row in rows if len(row) > max([name, *colour])]


def _split(line: str, file: Path, number: int) -> tuple[str, list[int] | None]:
    """A line's name, and its colour if it states one."""
    if match := _HEX.search(line):
        return line[: match.start()].strip(), list(bytes.fromhex(match[1]))
    if match := _CSV.match(line):
        name, colour = match["name"].strip(), [int(match[part]) for part in (2, 3, 4)]
    elif match := _RGB.search(line):
        name, colour = line[: match.start()].strip(), [int(value) for value in match.groups()]
    else:
        return line, None
    if max(colour) > 255:
        raise SourceError(f"{file}: line {number}: {line!r}: red, green and blue are 0 to 255 each")
    return name, colour


def read_lines(path: Path, way_out: str) -> list[str]:
    """Stripped lines, a BOM and empty lines at the end dropped. Raises SourceError with near names where `path` is absent."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside)
        hint = f" (there is {', '.join(near)})" if near else ""
        raise SourceError(f"{path}: not found{hint}, though params.yaml names it; {way_out}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return [line.strip() for line in text.rstrip().splitlines()]


def find(root: Path, data: config.Data) -> Path | None:
    """The class file that counts: the one `data.classes` names; where that is the default name and absent, what other
    tools call it, if there is one.

    Returns:
        None with `data.classes: null`, and where a source that names its classes itself (any but `folder`) has none.

    Raises:
        SourceError: the default is absent and files by several other names are there.
    """
    if data.classes is None:
        return None
    path = root / data.classes
    if path.exists() or data.classes != DEFAULT:
        return path
    others = [root / name for name in OTHER_NAMES if (root / name).is_file()]
    if len(others) > 1:
        listed = ", ".join(other.name for other in others)
        raise SourceError(f"{path}: not found, and there are {listed}; name the one that counts in data.classes")
    if others:
        return others[0]
    return path if data.source == "folder" else None


def named_in(root: Path, data: config.Data) -> str | None:
    """The class file that counts, as it is called; None where there is none (see `find`)."""
    path = find(root, data)
    return None if path is None else path.name


def read(root: Path, data: config.Data) -> tuple[Classes, list[Colour]] | None:
    """(classes, ignored colours) of the class file that counts (`find`); None where there is none."""
    path = find(root, data)
    if path is None:
        return None
    return parse(read_lines(path, "write it, or set data.classes: null to take the classes from the labels"), path)


def named(
    root: Path, data: config.Data, names: Iterable[str], colours: Mapping[str, Colour] | None = None
) -> tuple[Classes, dict[str, int], list[str]]:
    """Classes of a format whose labels carry names: (classes, name -> id, notes).

    With a class file its names count, in its order; a label is of the class of its name, or of the only one of that name in
    another case, Unicode form or with other spaces, and becomes 255 (ignore) where there is none. Without a class file the
    labels' own names count, in the order given, those that differ in spaces or Unicode form alone as one. With
    `data.unannotated: background` a class of that name (or labelme's `_background_`) is the background; without a class file
    it is put first where the labels have none.

    Raises:
        SourceError: no name at all, more than 255, or `unannotated: background` with a class file that has no such class.
    """
    seen, file, notes = list(dict.fromkeys(names)), read(root, data), list[str]()
    if file is not None:
        classes = file[0]
        known = [c["name"] for c in classes]
        meant = class_names.meant(seen, known)
        if alien := [name for name in seen if name not in meant]:
            notes.append(f"not in {data.classes}, so ignored: {', '.join(alien[:8])}{', ...' * (len(alien) > 8)}")
    else:
        meant = class_names.merged(seen)
        known = list(dict.fromkeys(meant.values()))
        if data.unannotated == "background" and not any(map(_is_background, known)):
            known.insert(0, BACKGROUND)
        if not 0 < len(known) <= 255:
            raise SourceError(f"{root}: the labels name {len(known)} classes; expected 1 to 255 (id 255 means ignore)")
        spare, given = label_maps.palette(len(known)), colours or {}
        classes = [{"id": k, "name": n, "color": list(given.get(n, spare[k]))} for k, n in enumerate(known)]
        notes += class_names.alike_notes(known)
    notes += class_names.notes(meant)
    ids = {c["name"]: c["id"] for c in classes}
    if data.unannotated == "background" and background(ids) is None:
        raise SourceError(
            f"{root / str(data.classes)}: data.unannotated: background needs a class named {BACKGROUND}; add the line"
        )
    return classes, ids | {name: ids[meant[name]] if name in meant else label_maps.IGNORE for name in seen}, notes


def numbered(count: int) -> Classes:
    """class_0, class_1 ... where nothing names the ids."""
    return [{"id": k, "name": f"class_{k}", "color": list(c)} for k, c in enumerate(label_maps.palette(count))]


def background(ids: Mapping[str, int]) -> int | None:
    """Id of the background class, by its name in any case."""
    return next((number for name, number in ids.items() if _is_background(name)), None)


def _is_background(name: str) -> bool:
    return name.strip().casefold() in _BACKGROUNDS


def empty_id(data: config.Data, ids: Mapping[str, int]) -> int:
    """What a pixel in no shape is: 255, or the background's id (`data.unannotated`)."""
    found = background(ids) if data.unannotated == "background" else None
    return label_maps.IGNORE if found is None else found
