"""What came back from a label tool, taken record by record: which image each is of, and why it cannot be used."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline import paths
from pipeline.formats.names import matching
from pipeline.formats.names.skipped import Skipped
from pipeline.imaging import decode, label_maps
from pipeline.imaging.mask_png import Colour
from pipeline.labels import exporter, parse
from pipeline.labels.finder import Finder
from pipeline.storage import manifest, shards

OPEN = ("labelled", "unlabelled")  # splits whose labels may change


class Refusal(NamedTuple):
    """A record that was not taken."""

    name: str
    code: str
    reason: str


@dataclass(frozen=True)
class TakenLabel:
    """A mask that can be used: the digest of its ids, its name in the tool, and its image as DUMP/NAME."""

    digest: str
    name: str
    image: str


class Prelabels:
    """What was handed out to be corrected: a mask that is still the same says nothing new."""

    def __init__(self, root: Path, max_pixels: int) -> None:
        self._root = root
        self._max_pixels = max_pixels
        self._handed_out = exporter.handed_out(root)
        self._members = exporter.prelabels(root)

    def has(self, image: str, digest: str) -> bool:
        if digest in self._handed_out.get(image, ()):
            return True
        member = self._members.get(image)
        return member is not None and digest == self._digest(member)

    def _digest(self, member: shards.Member) -> str:
        data = shards.read(self._root / paths.PRELABELS, member.offset, member.length)
        return manifest.mask_digest(label_maps.decode_mask(data, max_pixels=self._max_pixels).astype("uint8"))


class Collector:
    """Takes a delivery's records one by one; `taken` by image id, `refused` with the reasons."""

    def __init__(
        self,
        rows: Sequence[manifest.Row],
        palette: Sequence[Colour],
        prelabels: Prelabels | None,
        put: Callable[[str, bytes], object],
    ) -> None:
        """`prelabels`: masks equal to these are refused; None takes them as correct. `put`: stores a mask's PNG."""
        self._finder = Finder(rows)
        self._palette = palette
        self._prelabels = prelabels
        self._put = put
        self.taken: dict[str, TakenLabel] = {}
        self.refused: list[Refusal] = []
        self.forgiven: list[Skipped] = []
        self.passed_over: list[Skipped] = []

    def add_all(self, records: Iterable[parse.Record]) -> None:
        """Take every record. Those whose names are an image's own come before those that need forgiving, so that a looser
        name never takes the place of the right one."""
        loose: dict[str, list[tuple[parse.Record, manifest.Row, str]]] = {}
        for record in records:
            try:
                row, rule = self._finder.found(record)
            except decode.Refused as error:
                self._refuse(record, error)
                continue
            if rule == matching.EXACT:
                self._add(record, row, rule)
            else:
                loose.setdefault(row.id, []).append((record, row, rule))
        for found in loose.values():
            strictest = min(matching.ORDER.index(rule) for _, _, rule in found)
            best = [item for item in found if matching.ORDER.index(item[2]) == strictest]
            for record, row, rule in found:
                if len(best) > 1:
                    names = matching.listed([item[0].name for item in best])
                    reason = f"{row.dump}/{row.name} could be each of {names}; keep one, or rename them"
                    self._refuse(record, decode.Refused("ambiguous-name", reason))
                else:
                    self._add(record, row, rule)

    def _refuse(self, record: parse.Record, error: decode.Refused) -> None:
        self.refused.append(Refusal(record.name, error.code, str(error)))

    def _add(self, record: parse.Record, row: manifest.Row, rule: str) -> None:
        try:
            self._take(record, row)
        except decode.Refused as error:
            self._refuse(record, error)
            return
        self.passed_over += record.passed_over
        self.forgiven += record.forgiven
        if rule != matching.EXACT:
            self.forgiven.append((rule, f"{record.name} is {row.dump}/{row.name}"))

    def _take(self, record: parse.Record, row: manifest.Row) -> None:
        """Raises Refused."""
        self._demand_changeable(row)
        mask_HW = record.draw(row)
        if (mask_HW == label_maps.IGNORE).all():
            raise decode.Refused("mask-all-ignore", "every pixel is ignored: nothing to learn from it")

        digest = manifest.mask_digest(mask_HW)
        if row.split == "unlabelled" and self._prelabels is not None and self._prelabels.has(row.id, digest):
            raise decode.Refused(
                "unchanged-pre-label", "just as it was handed out; --accept-unchanged takes it as correct"
            )
        self._put(f"{row.id}.png", label_maps.encode_png(mask_HW, self._palette))
        self.taken[row.id] = TakenLabel(digest, record.name, f"{row.dump}/{row.name}")

    def _demand_changeable(self, row: manifest.Row) -> None:
        image = f"{row.dump}/{row.name}"
        if row.id in self.taken:
            raise decode.Refused("labels-twice", f"this delivery has labels for {image} already")
        if row.split in ("val", "test"):
            raise decode.Refused(
                "held-out",
                f"{image} is in {row.split}, which must not change under the gate; correct it in the source itself",
            )
        if row.split not in OPEN:
            raise decode.Refused("unused", f"{image} takes no part: {paths.SPLIT_SUMMARY} says why")
