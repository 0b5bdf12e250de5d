"""What a reader passes over, so that nothing vanishes without a row in the table: (kind, name) pairs, counted by kind."""

from collections.abc import Iterable

Skipped = tuple[str, str]  # kind: what it is and why it does not count; name: the file, shape or record


def rows(skipped: Iterable[Skipped]) -> list[tuple[str, str]]:
    """One row for each kind, in order of first appearance: ("passed over: sidecar file", "12, the first: x.json")."""
    return [(f"passed over: {kind}", line) for kind, line in counted(skipped)]


def counted(found: Iterable[Skipped]) -> list[tuple[str, str]]:
    """As `rows`, of what was not passed over: ("sidecar file", "12, the first: x.json")."""
    names: dict[str, list[str]] = {}
    for kind, name in found:
        names.setdefault(kind, []).append(name)
    return [(kind, f"{len(listed)}, the first: {listed[0]}") for kind, listed in names.items()]
