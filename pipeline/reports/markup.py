"""HTML by plain functions: every text and attribute is escaped, and only what these functions made passes as it is."""

import html
from collections.abc import Iterable, Sequence

VOID = frozenset({"img", "meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """Any value as HTML text; control characters, which HTML does not allow, become spaces."""
    if isinstance(value, Markup):
        return value
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return Markup(html.escape(text, quote=True))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """<name ...>content</name>. `class_` and `for_` lose their underscore, other ones become hyphens; None is left out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(escaped(item) for item in content)
    return Markup(f"<{name}{said}>" if name in VOID else f"<{name}{said}>{inside}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    return Markup("".join(escaped(part) for part in parts))


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: bool = True) -> Markup:
    """A captioned table in a region that scrolls by itself; the first cell of a row heads it, the others align right."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    whole = tag(
        "table",
        tag("caption", caption),
        tag("thead", top),
        tag("tbody", *body),
        class_="numbers" if numbers else "words",
    )
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def bar(share: float) -> Markup:
    """A share in 0..1 as per cent with a bar under it."""
    length = min(max(share, 0.0), 1.0)
    return joined(
        (f"{100 * share:.2f} %", tag("span", class_="bar", style=f"--share:{100 * length:.2f}%", aria_hidden="true"))
    )


def figure(source: str, alt: str, *caption: object) -> Markup:
    """A picture with words below it; without `source` the words alone."""
    shown = tag("img", src=source, alt=alt, loading="lazy") if source else tag("p", "no picture", class_="none")
    return tag("figure", shown, tag("figcaption", *caption))


def section(id: str, title: str, *content: object) -> Markup:
    return tag("section", tag("h2", title), *content, id=id)


STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f7; --panel: #fff; --line: #d9dde4; --ink: #1a2130; --quiet: #566073;
  --accent: #1f5fbf; --warn: #7a4a00; --warn-ground: #fff4dc; font: 16px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161d; --panel: #1a2029; --line: #2f3845; --ink: #e7eaf0;
  --quiet: #a2adbf; --accent: #86b4f5; --warn: #ffd48a; --warn-ground: #33270f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 3rem; max-width: 78rem; background: var(--ground);
  color: var(--ink); }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 0 0 .5rem; } p { margin: 0 0 .75rem; }
a { color: var(--accent); } :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: .75rem 0; list-style: none; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; margin: 1rem 0; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .875rem; } .none { padding: 1.5rem .5rem; text-align: center; }
.warn { background: var(--warn-ground); color: var(--warn); border-radius: 8px; padding: .5rem .75rem; margin: 0 0 .5rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { text-align: left; font-weight: 600; overflow-wrap: anywhere; min-width: 6rem; } thead th { color: var(--quiet); }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.words td { overflow-wrap: anywhere; min-width: 7rem; }
.bar { display: block; height: .35rem; margin-top: .15rem; border-radius: 2px; min-width: 3rem;
  background: linear-gradient(to right, var(--accent) var(--share), var(--line) var(--share)); }
.swatch { display: inline-block; width: .9em; height: .9em; border: 1px solid var(--line); border-radius: 3px;
  margin-right: .4em; vertical-align: -.1em; background: var(--colour); }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 100%), 1fr)); }
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); } .wide { grid-template-columns: 1fr; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .5rem; min-width: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { overflow-wrap: anywhere; margin-top: .35rem; }
.wide figure { max-width: 64rem; } .pair figure { border: 0; padding: 0; }
@media (max-width: 30rem) { section { padding: .75rem; } th, td { padding: .3rem .35rem; } }
@media print { section { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, *body: object) -> str:
    """A whole document that fetches nothing and runs nothing, and says so to the browser."""
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'), tag("title", title),
        tag("style", Markup(STYLE)),
    )  # fmt: skip
    return "<!doctype html>\n" + tag("html", head, tag("body", *body), lang="en") + "\n"
