"""The data report's pictures by name, from wherever in the project each kind lies."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.reports.thumbnails import STRIP, Album, originals
from pipeline.storage import manifest


class ReportPictures:
    """Data URIs by "dump/name", "" where there is no such picture, it cannot be decoded, or the budget is used up."""

    def __init__(self, root: Path, *, budget: int, palette: Sequence[Any], archives: Mapping[str, Path]) -> None:
        """`budget`: characters of all pictures together; `palette`: colours by class id; `archives`: by dump."""
        self._root = root
        self._album = Album(budget)
        self._palette = palette
        self._archives = archives

        self._label_next = root / paths.LABEL_NEXT
        images = self._label_next / "images"
        self._prelabelled = {file.relative_to(images).with_suffix("").as_posix(): file for file in images.rglob("*.*")}
        self._refused: dict[str, bytes] = {}
        self._ingested: dict[str, manifest.Row] = {}

    def load_refused(self, files: Sequence[tuple[str, str]]) -> None:
        """Find refused files, (dump, name) each, in their archives."""
        for dump in {dump for dump, _ in files} & self._archives.keys():
            found = originals(self._archives[dump], [name for of, name in files if of == dump])
            self._refused |= {f"{dump}/{name}": data for name, data in found.items()}

    def load_ingested(self, names: Collection[str]) -> None:
        """Find rows of what was ingested, duplicates too, by "dump/name"."""
        for dump in sorted({name.partition("/")[0] for name in names}):
            file = self._root / paths.INGESTED / dump / paths.ROWS_NAME
            rows = manifest.read(file) if file.exists() else []
            self._ingested |= {key: row for row in rows if (key := f"{dump}/{row.name}") in names}

    def refused(self, name: str) -> str:
        return self._album.of_bytes(self._refused.get(name, b""))

    def ingested(self, name: str) -> str:
        return self._album.of_row(self._ingested.get(name), self._root)

    def strip(self, file: str) -> str:
        """A wide picture by its path in the project."""
        return self._album.of_file(self._root / file, STRIP)

    def prelabelled(self, name: str) -> str:
        """An image with its pre-label over it. The folder has the dump in a name only where two dumps have that name."""
        key = next((key for key in (name, name.partition("/")[2]) if key in self._prelabelled), None)
        if key is None:
            return ""
        return self._album.overlaid(self._prelabelled[key], self._label_next / "masks" / f"{key}.png", self._palette)
