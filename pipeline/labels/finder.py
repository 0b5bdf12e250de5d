"""Which image of the project a record from a label tool means."""

from collections import defaultdict
from collections.abc import Sequence

from pipeline.formats.common.source import name_id
from pipeline.formats.common.task import PREFIX, id_prefix
from pipeline.formats.names import matching
from pipeline.imaging import decode
from pipeline.labels.parse import Record
from pipeline.storage import manifest


class Finder:
    """Which row a record means: by the id that it carries, by the digits before its name, else by its name.

    Names count as in a source (`pipeline.formats.names.matching`), with one rule less: never by the end of a path alone,
    since the image that was meant may have been left out of this project and another one would take its labels.
    """

    def __init__(self, rows: Sequence[manifest.Row]) -> None:
        self._by_id = {row.id: row for row in rows}
        self._by_prefix, self._by_name = defaultdict(list), defaultdict(list)
        for row in rows:
            self._by_prefix[row.id[:PREFIX]].append(row)
            self._by_name[row.name].append(row)
            self._by_name[f"{row.dump}/{row.name}"].append(row)
        self._index = matching.Index(self._by_name)

    def find(self, record: Record) -> manifest.Row:
        """Raises images.Refused("unknown-image" | "ambiguous-name")."""
        return self.found(record)[0]

    def found(self, record: Record) -> tuple[manifest.Row, str]:
        """The row, and the rule of `matching` by which it was found. Raises as `find`."""
        if record.id in self._by_id:
            return self._by_id[record.id], matching.EXACT
        names = (record.name, *record.names)
        for name in names:
            if rows := self._by_prefix.get(id_prefix(name) or "", []):
                return _only(rows), matching.EXACT
        for name in (*names, *(name.rpartition("images/")[2] for name in names)):
            if rows := self._by_name.get(name, []) or self._by_name.get(name_id(name), []):
                return _only(rows), matching.EXACT
        stated = dict.fromkeys(text for name in names for text in (name_id(name), name))  # rows have no extensions
        matches = [self._index.find(text, folders=False) for text in stated]
        best = min(matches, key=lambda match: matching.ORDER.index(match.rule))
        if best.candidates:
            raise decode.Refused("ambiguous-name", f"could be {matching.listed(best.candidates)}; name one exactly")
        if best.image is None:
            raise decode.Refused("unknown-image", "no image of this project has that id or name")
        return _only(self._by_name[best.image]), best.rule


def _only(rows: Sequence[manifest.Row]) -> manifest.Row:
    """The one image of all rows. Raises images.Refused("ambiguous-name")."""
    if len({row.id for row in rows}) > 1:
        listed = ", ".join(f"{row.dump}/{row.name}" for row in rows[:4])
        raise decode.Refused("ambiguous-name", f"could be {listed}; name it as the export did, or DUMP/NAME")
    return rows[0]
