"""Which class a label's name means: exactly first, then uniquely by spaces, Unicode form and case. Each such use is said."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence


def meant(names: Iterable[str], classes: Sequence[str]) -> dict[str, str]:
    """Name -> the class of that name, else the only one that is spelt like it. Names that mean none or several are left out."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[_any_case(name)].append(name)
    by_form = {_form(name): name for name in reversed(classes)}
    found = {}
    for name in names:
        if name in classes:
            found[name] = name
        elif _form(name) in by_form:
            found[name] = by_form[_form(name)]
        elif len(same := alike.get(_any_case(name), [])) == 1:
            found[name] = same[0]
    return found


def merged(names: Iterable[str]) -> dict[str, str]:
    """Name -> its class, where no list says which there are: names of one spelling but for spaces and Unicode form are one,
    called without the spaces. Those of different case are different classes, which `alike_notes` says."""
    return {name: _form(name) or name for name in names}


def notes(found: Mapping[str, str]) -> list[str]:
    """What was taken for what: a line, or none."""
    loose = [f"{name!r} is {class_!r}" for name, class_ in found.items() if name != class_]
    return [f"class names matched by spelling: {len(loose)}, the first: {loose[0]}"] if loose else []


def alike_notes(classes: Sequence[str]) -> list[str]:
    """A line for classes that only their case tells apart, and are probably one."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[_any_case(name)].append(name)
    several = [", ".join(same) for same in alike.values() if len(same) > 1]
    if not several:
        return []
    return [
        f"classes that only their case tells apart: {several[0]}; list the right one in data.classes if they are one"
    ]


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", " ".join(name.split()))


def _any_case(name: str) -> str:
    return unicodedata.normalize("NFC", _form(name).casefold())
