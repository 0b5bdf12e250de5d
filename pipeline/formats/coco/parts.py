"""Which split an image belongs to where label files of several splits list it: what is evaluated on is never trained on."""

from collections import defaultdict

from pipeline.formats.names.layout import Part
from pipeline.formats.names.skipped import counted

_ORDER: tuple[Part, ...] = ("test", "val", "train")


class Parts:
    """The splits that the label files state, by name id.

    An image is of the split whose file annotates it. Train and val files that both list every image of one folder are common
    (one list of images, the annotations divided among the files), so listing it counts only where nobody annotates it. Where
    several splits remain, test has it before val, and val before train.
    """

    def __init__(self) -> None:
        self._listed: dict[str, dict[Part, str]] = defaultdict(dict)
        self._annotated: dict[str, dict[Part, str]] = defaultdict(dict)

    def add(self, key: str, part: Part, file: str, *, annotated: bool) -> None:
        """Note that a label file of the split lists the image, or annotates it."""
        (self._annotated if annotated else self._listed)[key].setdefault(part, file)

    def of(self, key: str) -> Part:
        """The image's split."""
        stated = self._annotated.get(key) or self._listed[key]
        return next(part for part in _ORDER if part in stated)

    def notes(self) -> list[str]:
        """What was decided of images that files of several splits name: a line for each kind of them."""
        found = []
        for key, listed in self._listed.items():
            annotated = self._annotated.get(key, {})
            if len(annotated) > 1:
                files = " and ".join(sorted(annotated.values()))
                found.append(
                    ("annotated for several splits, taken for evaluation", f"{key} is {self.of(key)} ({files})")
                )
            elif len(listed) > 1 and annotated:
                found.append(("listed by several splits, of the one that annotates them", f"{key} is {self.of(key)}"))
            elif len(listed) > 1:
                found.append(("listed by several splits, taken for evaluation", f"{key} is {self.of(key)}"))
        return [f"images {kind}: {line}" for kind, line in counted(found)]
