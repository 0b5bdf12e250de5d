"""Which answer is given: what is on offer, the Accept header, and `view` that narrows the offers."""

from collections.abc import Sequence
from dataclasses import dataclass

from serving.http.requests import Problem

LONGEST_ACCEPT = 1000


@dataclass(frozen=True)
class Kind:
    """One answer on offer: its name in `view`, its media type."""

    view: str
    media_type: str


# In order of preference: what */* gets first.
KINDS = (
    Kind("mask", "image/png"),
    Kind("json", "application/json"),
    Kind("geojson", "application/geo+json"),
    Kind("overlay", "image/png"),
    Kind("overlay", "image/jpeg"),
    Kind("confidence", "image/png"),
)
VIEWS = tuple(dict.fromkeys(kind.view for kind in KINDS))
# Many images in one call: JSON answers as lines, any answer as members of a zip.
MANY_KINDS = (
    Kind("json", "application/jsonl"),
    Kind("geojson", "application/jsonl"),
    *(Kind(view, "application/zip") for view in VIEWS),
)


def one(view: str) -> Kind:
    """The first answer of that view."""
    return next(kind for kind in KINDS if kind.view == view)


def negotiate(accept: str | None, view: str | None = None, kinds: Sequence[Kind] = KINDS) -> Kind:
    """The answer to give: `view` narrows the offers, then the most specific media range sets each offer's quality.

    Raises:
        Problem: 406 when nothing on offer is acceptable, 400 for a header of more than LONGEST_ACCEPT characters.
    """
    if accept is not None and len(accept) > LONGEST_ACCEPT:
        raise Problem(
            400, "bad-accept", f"the Accept header is longer than {LONGEST_ACCEPT} characters; name what you want only"
        )
    ranges = _ranges(accept) if accept and accept.strip() else [("*", "*", None, 1.0)]
    best: tuple[float, Kind] | None = None
    for offer in kinds:
        if view is not None and offer.view != view:
            continue
        kind, subkind = offer.media_type.split("/")
        matches = [
            (wanted_view is not None, wanted_sub != "*", wanted != "*", quality)
            for wanted, wanted_sub, wanted_view, quality in ranges
            if wanted in (kind, "*") and wanted_sub in (subkind, "*") and wanted_view in (offer.view, None)
        ]
        quality = max(matches)[3] if matches else 0.0
        if quality > 0 and (best is None or quality > best[0]):
            best = quality, offer
    if best is None:
        offers = ", ".join(f"{kind.media_type};view={kind.view}" for kind in kinds)
        raise Problem(406, "not-acceptable", f"nothing here fits that Accept header and view; on offer: {offers}")
    return best[1]


def _ranges(accept: str) -> list[tuple[str, str, str | None, float]]:
    """(type, subtype, view or None, quality) of each media range; malformed ones are passed over (RFC 9110, 12.5.1)."""
    ranges = []
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        kind, slash, subkind = media.partition("/")
        if not slash or not kind or not subkind:
            continue
        view, quality = None, 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "view":
                view = value.strip().strip('"')
            elif name.strip() == "q":
                try:
                    quality = min(1.0, max(0.0, float(value)))
                except ValueError:
                    quality = 0.0
        ranges.append((kind, subkind, view, quality))
    return ranges
