"""Overlays: settings that differ from params.yaml, merged over it."""

from collections.abc import Mapping
from typing import Any


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `overlay` in their place, section by section; neither is changed."""
    merged = dict(base)
    for key, value in overlay.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"s4mc.alpha": 0.3, "seed": 1}` as sections: `{"s4mc": {"alpha": 0.3}, "seed": 1}`."""
    found: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, last = key.split(".")
        branch: dict[str, Any] = {last: value}
        for section in reversed(sections):
            branch = {section: branch}
        found = merge(found, branch)
    return found
