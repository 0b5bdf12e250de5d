"""The source's groups, and which of them the folders of a later delivery's image mean.

A delivery rarely nests its folders as the source did: `site/cam0` comes as `cam0`, or `cam0` as `may/site/cam0`. A place that
is held out for evaluation must be recognised all the same, or its images are trained on.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.formats.names import layout

Folders = tuple[str, ...]


class GroupMatch(NamedTuple):
    """`group`: the group that is meant, "" where `candidates` are several or none. `by_end`: only the end of the group's
    folders stands in the path."""

    group: str
    candidates: tuple[str, ...] = ()
    by_end: bool = False


NONE = GroupMatch("")


class KnownGroups:
    """Groups of the source, ready to be asked which one a path or a text means, in any Unicode form and case."""

    def __init__(self, groups: Iterable[str], singles: Iterable[str] = ()) -> None:
        """`singles`: images that are a group of their own; only their whole names are recognised."""
        listed = list(dict.fromkeys(groups))
        self._by_spelling = {_spelling(group): group for group in [*singles, *listed]}
        self._exact = {*listed, *self._by_spelling.values()}
        self._by_end: dict[Folders, list[str]] = {}
        self._above: set[str] = set()  # folders that stand above others in a group
        self._found: dict[Folders, GroupMatch] = {}
        for group in listed:
            folders = tuple(_spelling(group).split("/"))
            self._above.update(folders[:-1])
            for start in range(1, len(folders)):
                self._by_end.setdefault(folders[start:], []).append(group)

    def __contains__(self, group: str) -> bool:
        return group in self._exact

    def spelt(self, text: str) -> str:
        """The group that `text` spells; "" where none is."""
        return text if text in self._exact else self._by_spelling.get(_spelling(text), "")

    def find(self, name: str) -> GroupMatch:
        """The group of the longest run of folders in an image's path that names one, with and then without folders that are
        only layout; where no group stands there whole, the one that ends so."""
        folders = tuple(part for part in name.replace("\\", "/").split("/")[:-1] if part)
        if folders not in self._found:
            self._found[folders] = self._look_for(folders)
        return self._found[folders]

    def _look_for(self, folders: Folders) -> GroupMatch:
        places = tuple(folder for folder in folders if not layout.is_layout(folder))
        for path in dict.fromkeys((folders, places)):
            for start, end in _runs(path):
                if group := self.spelt("/".join(path[start:end])):
                    return GroupMatch(group)
        spelt = tuple(map(_spelling, places))
        for length in range(len(spelt), 0, -1):
            found = [group for start in range(len(spelt) - length + 1) for group in self._ending(spelt, start, length)]
            if found:
                groups = tuple(dict.fromkeys(found))
                return GroupMatch(groups[0] if len(groups) == 1 else "", groups, by_end=True)
        return NONE

    def _ending(self, folders: Folders, start: int, length: int) -> Sequence[str]:
        """The groups that end in this run of folders. Below a folder that other groups stand below it is a new place:
        `b/cam0` is not `a/cam0` where there is a `b/cam1`."""
        if start and folders[start - 1] in self._above:
            return ()
        return self._by_end.get(folders[start : start + length], ())


def _runs(folders: Folders) -> list[tuple[int, int]]:
    """Begin and end of every run of folders, the longest first, then from the left."""
    runs = [(start, end) for start in range(len(folders)) for end in range(start + 1, len(folders) + 1)]
    return sorted(runs, key=lambda run: run[0] - run[1])


def _spelling(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
