"""Pages from the templates beside this file. Every value is escaped, only the templates' own words are HTML."""

from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def _printable(value: object) -> object:
    """Control characters, which HTML does not allow or which turn the reading direction round, become spaces."""
    if isinstance(value, Markup):
        return value
    return "".join(character if character.isprintable() else " " for character in str(value))


def environment() -> Environment:
    """Escapes everywhere and refuses a name that is not given."""
    return Environment(
        loader=PackageLoader("pipeline.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, values: Mapping[str, object]) -> str:
    """A whole document from one of the templates."""
    return environment().get_template(template).render(values).lstrip()
