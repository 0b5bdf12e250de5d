"""Stage index: every ingested archive, in order of arrival -> one manifest without exact or near duplicates.

Earlier archives win over later ones. Within an archive the order is: listed for test, for val, as labelled, any other
image with a mask, the rest; then by name. So a test set never loses an image to a training set. Two images that the
source's own lists put into the same one of labelled, val and test are never *near* duplicates of each other: who wrote
the list wanted both. Exact duplicates always go.

What looks alike by its hash is compared by a closer look (`perceptual_hash.same_picture`) before anything goes.
`ingest.near_duplicate_bits: null` keeps all near duplicates.

Of images that look alike and have no mask, `ingest.near_duplicate_cap` stay. A near copy of an image with a mask, or of
a listed one, never does: a model may be scored on that image, now or under another split.

All rows are looked at anew at every run, so that the manifest depends on the archives alone and not on which of them
came to this machine first; 100,000 take about a second (benchmarks/ratios/ingest.py).
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from pipeline import config, paths
from pipeline.imaging import perceptual_hash
from pipeline.ingest import dump_registry
from pipeline.ingest.quarantine import QuarantineEntry, read_quarantine, write_quarantine
from pipeline.labels import registry as labels
from pipeline.stage import Result
from pipeline.storage import atomic, manifest

RANKED = ("test", "val", "labelled")


def listed_parts(lists: Mapping[str, Sequence[str] | None]) -> dict[str, str]:
    """Name id -> test, val or labelled, as the source's lists say."""
    return {name: part for part in RANKED for name in lists.get(part) or ()}


# An image and others whose hashes are near -> which of them show the same at a closer look.
Same = Callable[[manifest.Row, Sequence[manifest.Row]], Sequence[bool]]


def all_same(row: manifest.Row, others: Sequence[manifest.Row]) -> Sequence[bool]:
    """No closer look: the hashes decide."""
    return [True] * len(others)


class _Kept(NamedTuple):
    """What a later image is compared with: itself, its list, and whether a model may be scored on it."""

    row: manifest.Row
    part: str | None
    scored: bool


def deduplicate(
    archives: Sequence[Sequence[manifest.Row]],
    lists: Mapping[str, Sequence[str] | None],
    bits: int | None,
    cap: int = 1,
    same: Same = all_same,
) -> tuple[list[manifest.Row], list[QuarantineEntry]]:
    """Rows of every archive in order of arrival -> (rows kept, quarantine entries of the dropped ones).

    Args:
        archives: rows per archive; the first is the base archive, to which `lists` belong.
        lists: the source's id lists.
        bits: largest Hamming distance of two difference hashes that still makes a near duplicate; None: there are none.
        cap: at most so many images without a mask stay where each is near the next one.
        same: the closer look at images whose hashes are near.
    """
    hashes = (_hash_of(row) for rows in archives for row in rows)
    near = {} if bits is None else perceptual_hash.neighbours(hashes, bits)
    deduplicator = Deduplicator(near, bits or 0, cap, same)
    for number, rows in enumerate(archives):
        deduplicator.add_archive(rows, listed_parts(lists) if number == 0 else {})
    return deduplicator.kept, deduplicator.dropped


class Deduplicator:
    """Takes archives in order of arrival; `kept` and `dropped` grow with each."""

    def __init__(self, near: Mapping[int, Collection[int]], bits: int, cap: int, same: Same) -> None:
        """`near`: for hashes that have any, those within `bits`, themselves included; the rest as `deduplicate`."""
        self._near = near
        self._bits = bits
        self._cap = cap
        self._same = same
        self._by_id: dict[str, manifest.Row] = {}
        self._by_hash: dict[int, list[_Kept]] = {}
        self.kept: list[manifest.Row] = []
        self.dropped: list[QuarantineEntry] = []

    def add_archive(self, rows: Sequence[manifest.Row], part_of: Mapping[str, str]) -> None:
        """`part_of`: the list that names an image, by name id."""
        survivors = [row for row in sorted(rows, key=lambda row: _rank(row, part_of)) if self._take(row, part_of)]
        self.kept += sorted(survivors, key=lambda row: row.name)

    def _take(self, row: manifest.Row, part_of: Mapping[str, str]) -> bool:
        """Keep the row, or note why not."""
        earlier = self._by_id.get(row.id)
        if earlier is not None:
            return self._drop(row, "duplicate", f"same pixels as {earlier.dump}/{earlier.name}")

        value = _hash_of(row)
        part = part_of.get(row.name)
        scored = part is not None or row.mask_shard is not None
        if value is not None and value in self._near:
            alike = self._alike(row, value, part)
            most = 1 if scored or any(kept.scored for kept in alike) else self._cap
            if len(alike) >= most:
                return self._drop(row, "near-duplicate", self._look_alike(alike))
            self._by_hash.setdefault(value, []).append(_Kept(row, part, scored))

        self._by_id[row.id] = row
        return True

    def _alike(self, row: manifest.Row, value: int, part: str | None) -> list[_Kept]:
        """What was kept and shows the same, without images that the source lists for the same part."""
        near = [kept for other in self._near[value] for kept in self._by_hash.get(other, ())]
        compared = [kept for kept in near if part is None or kept.part != part]
        same = self._same(row, [kept.row for kept in compared])
        return [kept for kept, is_same in zip(compared, same, strict=True) if is_same]

    def _drop(self, row: manifest.Row, code: str, reason: str) -> bool:
        self.dropped.append(QuarantineEntry(dump=row.dump, name=row.name, code=code, reason=reason))
        return False

    def _look_alike(self, alike: Sequence[_Kept]) -> str:
        first = next((kept for kept in alike if kept.scored), alike[0])
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        rule = "ingest.near_duplicate_bits" + ("" if first.scored or self._cap == 1 else ", ingest.near_duplicate_cap")
        return f"looks like {first.row.dump}/{first.row.name}{more} (difference hash within {self._bits} bits; {rule})"


def _rank(row: manifest.Row, part_of: Mapping[str, str]) -> tuple[int, str]:
    """Which of an archive's rows come first: listed ones, those with a mask, the rest; then by name."""
    part = part_of.get(row.name)
    if part is not None:
        return RANKED.index(part), row.name
    return len(RANKED) + (row.mask_shard is None), row.name


def _hash_of(row: manifest.Row) -> int | None:
    return int(row.phash, 16) if row.phash else None


class CloserLook:
    """The closer look at images of the shards; each is decoded once, when it is first compared."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._gallery = perceptual_hash.Gallery()

    def same(self, row: manifest.Row, others: Sequence[manifest.Row]) -> Sequence[bool]:
        """Which of the others show the same as `row`, up to brightness and contrast."""
        if not others:
            return []
        for one in (row, *others):
            if one.id not in self._gallery:
                image_HWC = manifest.open_image(one, self._max_pixels)
                self._gallery.add(one.id, perceptual_hash.thumbnail(image_HWC))
        return self._gallery.same(row.id, [other.id for other in others])


def lost_labels(dropped: Sequence[QuarantineEntry], needed: Collection[str]) -> list[str]:
    """Warnings for near duplicates that had a label or stood in a list. `needed`: their keys."""
    lost = [entry for entry in dropped if entry.code == "near-duplicate" and entry.key in needed]
    if not lost:
        return []
    return [
        f"{len(lost)} labelled or listed images are left out as near duplicates, the first: {lost[0].key} {lost[0].reason}; "
        "if they are different pictures, set ingest.near_duplicate_bits: null"
    ]


def run(params: config.Params) -> Result:
    """The stage: data/ingested/ of every dump, and imported labels -> data/manifest.parquet and data/quarantine.json."""
    names = list(dump_registry.read_dumps().dumps)
    homes = [paths.INGESTED / name for name in names]
    archives = [manifest.read(home / paths.ROWS_NAME) for home in homes]
    refused = [entry for home in homes for entry in read_quarantine(home / paths.QUARANTINE_NAME)]
    source = atomic.read_json(paths.SOURCE)
    imported = labels.places(labels.read_labels(), [c["name"] for c in source["classes"]])

    settings = params.ingest
    same = CloserLook(settings.max_pixels).same
    bits, cap = settings.near_duplicate_bits, settings.near_duplicate_cap
    rows, dropped = deduplicate(archives, source["lists"], bits, cap, same)
    rows = labels.attach(rows, imported)
    manifest.write(paths.MANIFEST, rows)
    write_quarantine(paths.QUARANTINE, refused + dropped)

    shown: list[Table | str] = [_table(names, archives, rows, refused, dropped)]
    if imported:
        used = sum(row.mask_import is not None for row in rows)
        shown.append(
            f"{used} masks from {paths.LABEL_REGISTRY}; {len(imported) - used} more are of images that are not kept"
        )
    if refused or dropped:
        shown.append(f"{len(refused) + len(dropped)} entries with their reasons: {paths.QUARANTINE}")
    listed = {key for part in manifest.NEEDS_MASK for key in source["lists"].get(part) or ()}
    needed = {
        f"{row.dump}/{row.name}"
        for archive in archives
        for row in archive
        if row.mask_shard is not None or (row.dump == dump_registry.BASE and row.name in listed)
    }
    return Result(shown, warnings=lost_labels(dropped, needed))


def _table(
    names: Sequence[str],
    archives: Sequence[Sequence[manifest.Row]],
    rows: Sequence[manifest.Row],
    refused: Sequence[QuarantineEntry],
    dropped: Sequence[QuarantineEntry],
) -> Table:
    table = Table(title=f"index: {len(rows)} images")
    for column in ("dump", "ingested", "duplicate", "near-duplicate", "kept", "refused files"):
        table.add_column(column, justify="left" if column == "dump" else "right")
    kept = Counter(row.dump for row in rows)
    codes = Counter((entry.dump, entry.code) for entry in dropped)
    out = Counter(entry.dump for entry in refused if not entry.kept)
    for name, archive in zip(names, archives, strict=True):
        cells = (len(archive), codes[name, "duplicate"], codes[name, "near-duplicate"], kept[name], out[name])
        table.add_row(name, *map(str, cells))
    return table
