"""Which group an image belongs to: images of one place or scene, which stand on one side of the split."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.formats.names import layout
from pipeline.ingest import dump_layout, dump_registry


class Groups:
    """The groups of a project: by the source's own table, else its pattern, else an image's folders, else it is alone."""

    def __init__(self, source: Mapping[str, Any]) -> None:
        """`source`: the content of source.json."""
        self._table: Mapping[str, Any] = source["groups"] or {}
        self._known = dump_layout.known_groups(map(str, self._table.values()))
        pattern = source.get("group_pattern")
        self._pattern = re.compile(pattern) if pattern else None
        self._loose = re.compile(pattern, re.IGNORECASE) if pattern else None

    def of(self, name: str, dump: str) -> str:
        """The group of the image `name` of a dump.

        A later dump may come wrapped in folders of its own, so its pattern is looked for below each of them, and a folder
        that is a group of the source is that group: held-out places are recognised however deep they lie.
        """
        if dump == dump_registry.BASE:
            if name in self._table:
                return str(self._table[name])
            return self._by_pattern(name) or layout.group_in_path(name) or name
        return self._in_dump(name) or layout.group_in_path(name) or f"{dump}/{name}"

    def known(self, name: str) -> str:
        """The source's group that a dump's image belongs to; "" where it is of none."""
        found = self._in_dump(name)
        return found if found in self._known else ""

    def _in_dump(self, name: str) -> str:
        """A group of the source by the pattern, in any case, or by a folder; else what the pattern finds; else ""."""
        parts = name.split("/")
        below = ["/".join(parts[depth:]) for depth in range(len(parts))]
        loose = (match[1] or "" for part in below if self._loose and (match := self._loose.search(part)))
        own = next((group for match in loose if (group := dump_layout.known_group(match, self._known))), "")
        own = own or dump_layout.group(name, self._known)
        return own or next(filter(None, map(self._by_pattern, below)), "")

    def _by_pattern(self, name: str) -> str:
        match = self._pattern.search(name) if self._pattern else None
        return match[1] or "" if match else ""
