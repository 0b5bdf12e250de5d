"""The images of a COCO source, found by what its label files call them."""

from pathlib import Path

from pipeline.formats.common import parsing
from pipeline.formats.common.source import walk
from pipeline.formats.names import image_files, layout, matching
from pipeline.storage import archives


class CocoImages:
    """The images of a source, found by what label files call them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._index: matching.Index | None = None
        self._forgiven: dict[str, list[str]] = {}
        self._places_of: dict[Path, list[Path]] = {}

    def find(self, name: str, file: Path) -> Path:
        """The image that `name` in the label file means.

        Raises:
            parsing.Broken: none, or several, or one outside the source.
        """
        try:
            safe = archives.safe_name(name, file)
            path = next((place / safe for place in self._places(file) if (place / safe).is_file()), None)
        except archives.DumpRefused:
            path = None
        if path is None:
            path = self._similar(name)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise parsing.Broken("it lies outside data.path")
        return path

    def forgiven(self) -> list[str]:
        """What was done to names, a line each with the first of them."""
        return [
            f"images matched to file_name by {rule}: {len(names)}, the first: {names[0]}"
            for rule, names in self._forgiven.items()
        ]

    def _places(self, file: Path) -> list[Path]:
        """Folders that may hold a label file's images."""
        if file not in self._places_of:
            self._places_of[file] = self._look_for_places(file)
        return self._places_of[file]

    def _look_for_places(self, file: Path) -> list[Path]:
        last, part = file.stem.rpartition("_")[2], layout.split_in_name(file.stem)
        homes = [self.root, self.root / "images"]
        named = [home / last for home in homes] if last not in ("", "..", ".") else []
        beside = [item for home in homes if home.is_dir() for item in sorted(home.iterdir()) if item.is_dir()]
        named += [item for item in beside if part and layout.split_word(item.name) == part]  # Train.json, images/train/
        return [self.root, self.root / "images", *named, file.parent, self.root / "data", file.parent / "images"]

    def _similar(self, name: str) -> Path:
        if self._index is None:
            everything = image_files.images_among(walk(self.root))
            self._index = matching.Index(everything.images)
        found = self._index.find(name)
        if found.image is None:
            listed = f": {matching.listed(found.candidates)} could be meant" if found.candidates else ""
            raise parsing.Broken(f"no image in data.path has this file_name{listed}")
        self._forgiven.setdefault(found.rule, []).append(f"{name} is {found.image}")
        return self.root / found.image
