"""The data report's sections: what the stages left -> the values that templates/data.html.jinja shows.

A section whose input is not there yet is None, or names what is missing; the template says what to run.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from pipeline.ingest.quarantine import QuarantineEntry
from pipeline.storage.manifest import NEEDS_MASK, SPLITS, Row

GROUPS, SIZES, REFUSED = 40, 12, 100  # rows of a table at most
Picture = Callable[[str], str]  # a name to a data URI or ""
_LIKE = re.compile(r"(?:looks like|same pixels as) (.+?)(?: and \d+ more)?(?: \(difference hash within .*)?", re.DOTALL)


class PictureCard(NamedTuple):
    """A picture ("" where there is none), its words for those who do not see it, and the text below, `lead` in bold."""

    source: str
    alt: str
    caption: str
    lead: str = ""


class Gallery(NamedTuple):
    """The first `most` of `total` things as cards."""

    cards: list[PictureCard]
    total: int
    most: int


class SplitRow(NamedTuple):
    name: str
    images: int
    groups: int | str  # "-" where the summary does not say


class Splits(NamedTuple):
    rows: list[SplitRow]
    hidden: int | None  # unlabelled images with hidden labels


def splits(summary: Mapping[str, Any]) -> Splits:
    groups = summary.get("groups", {})
    counts = summary["counts"]
    rows = [SplitRow(part, counts.get(part, 0), len(groups[part]) if part in groups else "-") for part in SPLITS]
    return Splits(rows, summary.get("hidden_labels"))


class ClassRow(NamedTuple):
    name: str
    colour: list[int]  # red, green, blue
    shares: list[float]  # of each split's labelled pixels, 0..1


class Classes(NamedTuple):
    parts: list[str]
    rows: list[ClassRow]


def classes(summary: Mapping[str, Any]) -> Classes:
    pixels = summary.get("pixels", {})
    parts = [part for part in NEEDS_MASK if part in pixels]
    totals = {part: max(1, sum(pixels[part].values())) for part in parts}
    rows = [
        ClassRow(
            name=entry["name"],
            colour=[int(value) for value in entry["color"]],
            shares=[pixels[part].get(entry["name"], 0) / totals[part] for part in parts],
        )
        for entry in summary["classes"]
    ]
    return Classes(parts, rows)


class SizeRow(NamedTuple):
    width: int
    height: int
    images: int
    share: float


class Sizes(NamedTuple):
    summary: str
    rows: list[SizeRow]


def sizes(rows: Sequence[Row]) -> Sizes | None:
    """The most common sizes; None without images."""
    if not rows:
        return None
    count = Counter((row.width, row.height) for row in rows)
    common = [SizeRow(width, height, n, n / len(rows)) for (width, height), n in count.most_common(SIZES)]
    sides = [max(row.width, row.height) for row in rows]
    summary = (
        f"longer side: {min(sides)} to {max(sides)} pixels, median {median(sides):g}; {len(count)} different sizes"
    )
    return Sizes(summary, common)


class GroupRow(NamedTuple):
    name: str
    counts: list[int | str]  # of each split, "" for none


class Groups(NamedTuple):
    splits: list[str]
    rows: list[GroupRow]
    total: int


def groups(rows: Sequence[Row]) -> Groups | None:
    """Which groups (places, videos) are on which side, the largest first; None where each image is its own group."""
    count = Counter((row.group, row.split) for row in rows)
    totals = Counter(row.group for row in rows)
    if len(totals) == len(rows):
        return None
    shown = [GroupRow(group, [count[group, part] or "" for part in SPLITS]) for group, _ in totals.most_common(GROUPS)]
    return Groups(list(SPLITS), shown, len(totals))


class DumpRow(NamedTuple):
    name: str
    added: str | None
    delivered: int | None
    kept: int
    share_of_largest: float  # kept images, over those of the dump with the most
    duplicates: int
    near_duplicates: int
    refused: int


def dumps(entries: Mapping[str, Any], rows: Sequence[Row], dropped: Sequence[QuarantineEntry]) -> list[DumpRow]:
    """Every archive in order of arrival: what came, what stayed."""
    kept = Counter(row.dump for row in rows)
    codes = Counter((item.dump, item.code) for item in dropped)
    refused = Counter(item.dump for item in dropped if not item.kept and not item.is_duplicate)
    most = max(kept.values(), default=1)
    return [
        DumpRow(
            name=name,
            added=entry.get("added"),
            delivered=entry.get("images"),
            kept=kept[name],
            share_of_largest=kept[name] / most,
            duplicates=codes[name, "duplicate"],
            near_duplicates=codes[name, "near-duplicate"],
            refused=refused[name],
        )
        for name, entry in entries.items()
    ]


class DriftRow(NamedTuple):
    name: str
    space: str
    images: int | str
    energy: str
    p: str
    drifted: bool


class Drift(NamedTuple):
    rows: list[DriftRow]
    missing: list[str]  # names of reports


def drift(reports: Mapping[str, Mapping[str, Any] | None]) -> Drift:
    """Verdicts of both comparisons: on the images alone, and in the student's features."""
    rows = []
    for report in reports.values():
        for dump, found in ((report or {}).get("dumps") or {}).items():
            energy, p = (f"{found[key]:.4f}" if isinstance(found.get(key), float) else "-" for key in ("energy", "p"))
            space = (report or {}).get("space", "-")
            rows.append(DriftRow(dump, space, found.get("images", "-"), energy, p, bool(found.get("drifted"))))
    return Drift(rows, [name for name, report in reports.items() if report is None])


class Reason(NamedTuple):
    code: str
    files: int
    image_kept: bool


class RefusedFile(NamedTuple):
    name: str
    code: str
    reason: str


class Quarantine(NamedTuple):
    reasons: list[Reason]
    cards: list[PictureCard]
    files: list[RefusedFile]
    total: int


def quarantine(dropped: Sequence[QuarantineEntry], picture: Picture, most: int) -> Quarantine:
    """What was refused and why, `most` with pictures; duplicates have their own section."""
    items = [item for item in dropped if not item.is_duplicate]
    files = [RefusedFile(item.key, item.code, item.reason) for item in items]
    counts = Counter((item.code, item.kept) for item in items)
    cards = [
        PictureCard(picture(file.name), f"refused image {item.name}", f"{file.name}: {file.reason}", lead=file.code)
        for item, file in zip(items[:most], files[:most], strict=True)
    ]
    reasons = [Reason(code, n, kept) for (code, kept), n in counts.most_common()]
    return Quarantine(reasons, cards, files[:REFUSED], len(items))


def like(reason: str) -> str | None:
    """ "dump/name" of the image that a duplicate equals, from its quarantine record's reason."""
    found = _LIKE.fullmatch(reason)
    return found[1] if found else None


class Pair(NamedTuple):
    removed: PictureCard
    kept: PictureCard
    reason: str


class Duplicates(NamedTuple):
    pairs: list[Pair]
    total: int


def duplicates(dropped: Sequence[QuarantineEntry], picture: Picture, most: int) -> Duplicates:
    """Pairs side by side: what went, what it is a copy of. Near-duplicates first: equal pixels need no look."""
    items = sorted((item for item in dropped if item.is_duplicate), key=lambda item: item.code == "duplicate")
    pairs = []
    for item in items[:most]:
        name = item.key
        other = like(item.reason) or ""
        removed = PictureCard(picture(name), f"removed image {name}", f"removed: {name}")
        kept = PictureCard(picture(other), f"kept image {other}", f"kept: {other or '-'}")
        pairs.append(Pair(removed, kept, f"{item.code}: {item.reason}"))
    return Duplicates(pairs, len(items))


def label_next(ranked: Sequence[Mapping[str, str]] | None, picture: Picture, most: int) -> Gallery | None:
    """The first images to label with the student's pre-labels over them."""
    if ranked is None:
        return None
    cards = []
    for row in ranked[:most]:
        name = f"{row['dump']}/{row['name']}"
        words = f"{name}; doubt {float(row['doubt']):.3f}, most about {row['most_doubted']}"
        cards.append(
            PictureCard(picture(name), f"image {row['name']} with its pre-labels", words, lead=f"{row['place']}.")
        )
    return Gallery(cards, len(ranked), most)


def suspects(found: Sequence[Mapping[str, str]] | None, picture: Picture, most: int) -> Gallery | None:
    """Masks that the student confidently contradicts, best of every split in turn."""
    if found is None:
        return None
    drawn = [row for row in found if row["picture"]]
    drawn.sort(key=lambda row: (int(row["place"]), NEEDS_MASK.index(row["split"])))
    cards = []
    for row in drawn[:most]:
        words = (
            f"{row['dump']}/{row['name']}: the mask says {row['given']}, the student {row['suggested']} "
            f"(score {float(row['score']):.3f}). Image, mask, prediction, contradiction"
        )
        alt = f"{row['name']}: image, mask, prediction, contradiction"
        cards.append(PictureCard(picture(row["picture"]), alt, words, lead=f"{row['split']} {row['place']}."))
    return Gallery(cards, len(found), most)
