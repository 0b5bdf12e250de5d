"""The data report's sections: plain values to HTML. Each says what to run where its input is not there yet."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from pipeline.reports.markup import Markup, bar, figure, joined, section, table, tag
from pipeline.storage.manifest import SPLITS, Row

MASKED = ("labelled", "val", "test")
GROUPS, SIZES, REFUSED = 40, 12, 100  # rows of a table at most
Picture = Callable[[str], str]  # a name to a data URI or ""
_LIKE = re.compile(r"(?:looks like|same pixels as) (.+?)(?: and \d+ more)?(?: \(difference hash within .*)?", re.DOTALL)


def _none(text: str) -> Markup:
    return tag("p", text, class_="quiet")


def _more(total: int, shown: int, where: str) -> Markup:
    return _none(f"and {total - shown} more: {where}") if total > shown else Markup()


def warnings(found: Sequence[str]) -> Markup:
    body = [tag("p", line, class_="warn") for line in found] or [_none("nothing to warn about")]
    return section("warnings", "Warnings", *body)


def splits(summary: Mapping[str, Any]) -> Markup:
    groups = summary.get("groups", {})
    counts = summary["counts"]
    rows = [(part, counts.get(part, 0), len(groups[part]) if part in groups else "-") for part in SPLITS]
    hidden = summary.get("hidden_labels")
    note = _none(f"{hidden} unlabelled images have hidden labels: for diagnostics only") if hidden else Markup()
    body = table("images by split", ("split", "images", "groups"), rows)
    return section("splits", "Splits", body, note)


def classes(summary: Mapping[str, Any]) -> Markup:
    """Share of each split's labelled pixels per class."""
    pixels = summary.get("pixels", {})
    parts = [part for part in MASKED if part in pixels]
    totals = {part: max(1, sum(pixels[part].values())) for part in parts}
    rows = []
    for c in summary["classes"]:
        swatch = tag(
            "span", class_="swatch", style="--colour:rgb({},{},{})".format(*map(int, c["color"])), aria_hidden="true"
        )
        rows.append(
            (joined((swatch, c["name"])), *(bar(pixels[part].get(c["name"], 0) / totals[part]) for part in parts))
        )
    return section("classes", "Classes", table("share of labelled pixels, ignored ones apart", ("class", *parts), rows))


def sizes(rows: Sequence[Row]) -> Markup:
    if not rows:
        return section("sizes", "Image sizes", _none("no image"))
    count = Counter((row.width, row.height) for row in rows)
    common = [(f"{w} x {h}", n, bar(n / len(rows))) for (w, h), n in count.most_common(SIZES)]
    sides = [max(row.width, row.height) for row in rows]
    told = f"longer side: {min(sides)} to {max(sides)} pixels, median {median(sides):g}; {len(count)} different sizes"
    return section(
        "sizes", "Image sizes", _none(told), table("most common sizes", ("width x height", "images", "share"), common)
    )


def groups(rows: Sequence[Row]) -> Markup:
    """Which groups (places, videos) are on which side; the largest first."""
    count = Counter((row.group, row.split) for row in rows)
    totals = Counter(row.group for row in rows)
    if len(totals) == len(rows):
        told = "every image is a group of its own; where images of one place or video belong together, set data.group"
        return section("groups", "Groups", _none(told))
    cells = [
        (group or "(none)", *(count[group, part] or "" for part in SPLITS)) for group, _ in totals.most_common(GROUPS)
    ]
    body = table("images of each group by split", ("group", *SPLITS), cells)
    return section("groups", "Groups", body, _more(len(totals), GROUPS, "data/split/summary.json"))


def dumps(entries: Mapping[str, Any], rows: Sequence[Row], dropped: Sequence[Mapping[str, Any]]) -> Markup:
    """Every archive in order of arrival: what came, what stayed."""
    stayed, codes = Counter(row.dump for row in rows), Counter((item["dump"], item["code"]) for item in dropped)
    out = Counter(item["dump"] for item in dropped if not item["kept"] and "duplicate" not in item["code"])
    most = max(stayed.values(), default=1)
    cells = []
    for name, entry in entries.items():
        length = f"--share:{100 * stayed[name] / most:.2f}%"
        share = joined((stayed[name], tag("span", class_="bar", style=length, aria_hidden="true")))
        gone = codes[name, "duplicate"], codes[name, "near-duplicate"], out[name]
        cells.append((name, entry.get("added") or "-", entry.get("images") or "-", share, *gone))
    head = ("dump", "added", "delivered", "kept", "duplicates", "near-duplicates", "refused")
    return section("dumps", "Dumps", table("archives in order of arrival", head, cells))


def drift(reports: Mapping[str, Mapping[str, Any] | None]) -> Markup:
    """Verdicts of both looks: on the images alone, and in the student's features."""
    cells = []
    for report in reports.values():
        for dump, found in ((report or {}).get("dumps") or {}).items():
            numbers = (f"{found[key]:.4f}" if isinstance(found.get(key), float) else "-" for key in ("energy", "p"))
            verdict = tag("strong", "DRIFTED") if found.get("drifted") else "like the rest"
            cells.append((dump, (report or {}).get("space", "-"), found.get("images", "-"), *numbers, verdict))
    missing = [name for name, report in reports.items() if report is None]
    notes = [_none(f"{name}: not there yet; run `dvc repro`") for name in missing]
    if not cells and not missing:
        notes.append(_none("only the first dump is there: nothing to compare"))
    head = ("dump", "space", "images", "energy", "p", "verdict")
    body = table("later dumps against the first data", head, cells) if cells else ""
    return section("drift", "Drift", body, *notes)


def quarantine(dropped: Sequence[Mapping[str, Any]], picture: Picture, most: int) -> Markup:
    """What was refused and why, `most` with pictures; duplicates have their own section."""
    items = [item for item in dropped if "duplicate" not in item["code"]]
    if not items:
        return section("quarantine", "Quarantine", _none("nothing was refused"))
    kept = {True: "only its mask; the image stays, unlabelled", False: "the image"}
    counts = Counter((item["code"], kept[bool(item["kept"])]) for item in items)
    ways = [(code, n, what) for (code, what), n in counts.most_common()]
    summary = table("reasons", ("code", "files", "refused"), ways)
    shown = [(item, picture(f"{item['dump']}/{item['name']}")) for item in items[:most]]
    cards = [
        figure(
            uri, f"refused image {item['name']}", tag("strong", item["code"]),
            f" {item['dump']}/{item['name']}: {item['reason']}",
        )
        for item, uri in shown if uri
    ]  # fmt: skip
    rest = table(
        "refused files", ("file", "code", "reason"),
        [(f"{item['dump']}/{item['name']}", item["code"], item["reason"]) for item in items[:REFUSED]], numbers=False,
    )  # fmt: skip
    return section(
        "quarantine",
        "Quarantine",
        summary,
        tag("div", *cards, class_="grid"),
        rest,
        _more(len(items), REFUSED, "data/quarantine.json"),
    )


def like(reason: str) -> str | None:
    """ "dump/name" of the image that a duplicate equals, from its quarantine record's reason."""
    found = _LIKE.fullmatch(reason)
    return found[1] if found else None


def duplicates(dropped: Sequence[Mapping[str, Any]], picture: Picture, most: int) -> Markup:
    """Pairs side by side: what went, what it is a copy of. Near-duplicates first: equal pixels need no look."""
    items = sorted(
        (item for item in dropped if "duplicate" in item["code"]), key=lambda item: item["code"] == "duplicate"
    )
    if not items:
        return section("duplicates", "Duplicates", _none("none"))
    cards = []
    for item in items[:most]:
        name, other = f"{item['dump']}/{item['name']}", like(item["reason"]) or ""
        left = figure(picture(name), f"removed image {name}", "removed: ", name)
        right = figure(picture(other), f"kept image {other}", "kept: ", other or "-")
        cards.append(tag("div", tag("div", left, right, class_="pair"), _none(f"{item['code']}: {item['reason']}")))
    more = _more(len(items), most, "data/quarantine.json")
    return section("duplicates", "Duplicates", tag("div", *cards, class_="grid pairs"), more)


def label_next(ranked: Sequence[Mapping[str, str]] | None, picture: Picture, most: int) -> Markup:
    """The first images to label with the student's pre-labels over them."""
    if ranked is None:
        return section("label-next", "What to label next", _none("not there yet; run `dvc repro rank`"))
    cards = [
        figure(
            picture(f"{row['dump']}/{row['name']}"), f"image {row['name']} with its pre-labels",
            tag("strong", f"{row['place']}. "),
            f"{row['dump']}/{row['name']}; doubt {float(row['doubt']):.3f}, most about {row['most_doubted']}",
        )
        for row in ranked[:most]
    ]  # fmt: skip
    more = _more(len(ranked), most, "reports/label_next/, reports/rank.csv")
    return section("label-next", "What to label next", tag("div", *cards, class_="grid"), more)


def suspects(found: Sequence[Mapping[str, str]] | None, picture: Picture, most: int) -> Markup:
    """Masks that the student confidently contradicts, best of every split in turn."""
    if found is None:
        return section("suspects", "Suspect labels", _none("not there yet; run `dvc repro suspects`"))
    told = sorted(
        (row for row in found if row["picture"]), key=lambda row: (int(row["place"]), MASKED.index(row["split"]))
    )
    cards = [
        figure(
            picture(row["picture"]), f"{row['name']}: image, mask, prediction, contradiction",
            tag("strong", f"{row['split']} {row['place']}. "),
            f"{row['dump']}/{row['name']}: the mask says {row['given']}, the student {row['suggested']} "
            f"(score {float(row['score']):.3f}). Image, mask, prediction, contradiction",
        )
        for row in told[:most]
    ]  # fmt: skip
    body = tag("div", *cards, class_="grid wide") if cards else _none("none")
    return section("suspects", "Suspect labels", body, _more(len(found), len(cards), "reports/suspect_labels.csv"))
