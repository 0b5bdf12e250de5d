"""Which group an image belongs to: images of one place or scene, which stand on one side of the split."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.formats.names import layout
from pipeline.formats.names.known_groups import KnownGroups
from pipeline.formats.names.skipped import Skipped
from pipeline.ingest import dump_registry


class Groups:
    """The groups of a project: by the source's own table, else its pattern, else an image's folders, else it is alone.

    `recognised` says of each image of a later dump whose folders are not those of its group what was taken for what.
    """

    def __init__(self, source: Mapping[str, Any]) -> None:
        """`source`: the content of source.json."""
        self._table: Mapping[str, Any] = source["groups"] or {}
        places = {str(group) for name, group in self._table.items() if group != name}
        self._known = KnownGroups(places, singles=(name for name, group in self._table.items() if group == name))
        pattern = source.get("group_pattern")
        self._pattern = re.compile(pattern) if pattern else None
        self._loose = re.compile(pattern, re.IGNORECASE) if pattern else None
        self.recognised: list[Skipped] = []

    def of(self, name: str, dump: str) -> str:
        """The group of the image `name` of a dump.

        A later dump may come wrapped in folders of its own, so its pattern is looked for below each of them, and folders
        that are a group of the source, or the end of only one, are that group: held-out places are recognised however deep
        they lie. Where several groups end so, the split holds the image back as long as one of them is held out.
        """
        if dump == dump_registry.BASE:
            if name in self._table:
                return str(self._table[name])
            return self._by_pattern(name) or layout.group_in_path(name) or name
        found = self._known.find(name)
        if found.by_end and not self._by_match(name):
            self._note(name, found.group, found.candidates)
        return self._in_dump(name) or layout.group_in_path(name) or f"{dump}/{name}"

    def known(self, name: str) -> str:
        """The source's group that a dump's image belongs to; "" where it is of none."""
        found = self._in_dump(name)
        return found if found in self._known else ""

    def _note(self, name: str, group: str, candidates: tuple[str, ...]) -> None:
        if group:
            self.recognised.append(("group by the end of its folders", f"{name} is of {group}"))
        else:
            listed = ", ".join(candidates)
            self.recognised.append(("folders of several groups, held back if one is held out", f"{name}: {listed}"))

    def _in_dump(self, name: str) -> str:
        """A group of the source by the pattern, in any case, or by folders; else what the pattern finds; else ""."""
        own = self._by_match(name) or self._known.find(name).group
        return own or next(filter(None, map(self._by_pattern, _below(name))), "")

    def _by_match(self, name: str) -> str:
        """The group of the source that the pattern finds, in any case, below any of the folders."""
        loose = (match[1] or "" for part in _below(name) if self._loose and (match := self._loose.search(part)))
        return next((group for match in loose if (group := self._known.spelt(match))), "")

    def _by_pattern(self, name: str) -> str:
        match = self._pattern.search(name) if self._pattern else None
        return match[1] or "" if match else ""


def _below(name: str) -> list[str]:
    """The path without its first folder, its first two, and so on; the whole path first."""
    parts = name.split("/")
    return ["/".join(parts[depth:]) for depth in range(len(parts))]
