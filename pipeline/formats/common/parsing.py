"""JSON label files from outside, read under bounds; nothing in them is trusted to have a type or a range."""

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.formats.common.source import SourceError

MAX_BYTES = 2 << 30  # COCO's largest published label file, stuff_train2017.json, has about 1 GB
MAX_DEPTH = 64  # label files have 6 levels or so


class Broken(ValueError):
    """One record of a document is unusable; the message says which field and why."""


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The document, as json gives it: numbers may be NaN or infinite, and are to be checked where they are used.

    Raises:
        SourceError: absent, too large, nested deeper than `MAX_DEPTH`, or not JSON; names the file.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise SourceError(f"{path}: {size} bytes of JSON, over the limit of {max_bytes}; split it by images")
        data = path.read_bytes()
        document = json.loads(data)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: not found; data.annotations must name the label file") from error
    except RecursionError as error:  # the parser stops at Python's own limit, before its stack ends
        raise SourceError(f"{path}: JSON nested deeper than {MAX_DEPTH} levels; this is no label file") from error
    except ValueError as error:
        raise SourceError(f"{path}: not valid JSON ({error}); export it again") from error
    if _deeper(document, MAX_DEPTH):
        raise SourceError(f"{path}: JSON nested deeper than {MAX_DEPTH} levels; this is no label file")
    return document


def _deeper(document: Any, levels: int) -> bool:
    """Whether containers nest deeper than `levels`, by one list of containers a level; numbers are not visited."""
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(levels):
        children = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def field(record: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """record[name] of the wanted type. Raises Broken that names the field; True and False are no numbers."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Broken(f"{name!r} is {type(value).__name__}, expected {_said(kind)}")
    return value


def hashable(record: Any, name: str) -> int | str | None:
    """record[name] where it can be an id: text, or a whole number, also where it was written as 3.0; None otherwise."""
    value = record.get(name) if isinstance(record, dict) else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def identifier(record: Any, name: str) -> str | None:
    """record[name] as the text of an id: 3, 3.0 and "3" are one. None where it is no text and no whole number from 0."""
    value = hashable(record, name)
    return None if value is None or (isinstance(value, int) and value < 0) else str(value)


def number(value: Any, what: str) -> float:
    """A finite number. Raises Broken."""
    # NaN fails the comparison too; math.isfinite overflows at whole numbers of 400 digits, which JSON may hold
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise Broken(f"{what} is {value!r:.40}, not a finite number")
    return float(value)


def whole(value: Any, what: str) -> int:
    """A whole number 0..2^53, also where it was written as 3.0. Raises Broken."""
    found = number(value, what)
    if found != int(found) or not 0 <= found <= 2**53:
        raise Broken(f"{what} is {value!r:.40}, not a whole number from 0")
    return int(found)


def _said(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
