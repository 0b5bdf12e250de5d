"""Parts of the pages that the code itself knows: settings, commands, endpoints. mkdocs calls `on_page_markdown`.

A page asks for a part by a line such as `{{ project_settings }}`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its parts in place, and with files of the repository's root where it names one alone."""
    if markdown.startswith('--8<-- "'):
        file = markdown.split('"')[1]
        # Links of a file in the root, as a page of docs/develop/ has them.
        markdown = (ROOT / file).read_text().replace("](docs/develop/", "](").replace("](docs/", "](../")
    for name, part in PARTS.items():
        asked = "{{ " + name + " }}"
        if asked in markdown:
            markdown = markdown.replace(asked, part())
    return markdown


def project_settings() -> str:
    """Every key of params.yaml: its value as shipped, its type and range, and the comment beside it."""
    from pipeline.config.params import Params

    shipped = yaml.safe_load((ROOT / "params.yaml").read_text())
    comments = _comments((ROOT / "params.yaml").read_text())
    parts = []
    for section, field in Params.model_fields.items():
        rows = list(_rows(section, field, shipped[section]))
        lines = [f"| `{key}` | `{_shown(value)}` | {kind} | {comments.get(key, '')} |" for key, value, kind in rows]
        head = ["| setting | shipped value | type | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {section}", "", *head, *lines]))
    return "\n\n".join(parts)


def _rows(key: str, field: FieldInfo, value: Any) -> Any:
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value, dict):
        for name, inner in kind.model_fields.items():
            if name in value:
                yield from _rows(f"{key}.{name}", inner, value[name])
    else:
        yield key, value, _kind(field)


def _kind(field: FieldInfo) -> str:
    from pydantic import TypeAdapter

    schema = TypeAdapter(field.annotation).json_schema() if field.annotation else {}
    words = " or ".join(_words(part) for part in schema.get("anyOf", [schema]))
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(item, name, None) is not None
    ]
    return ", ".join([words, *limits])


def _words(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    return str(schema.get("type", "table"))


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0].replace("|", "\\|")


def _comments(text: str) -> dict[str, str]:
    """The comment behind each key of a YAML text, with the lines below that hold a comment alone."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    last = None
    for line in text.splitlines():
        code, _, comment = line.partition("#")
        if code.strip() and ":" in code:
            indent = len(code) - len(code.lstrip())
            path = [(depth, name) for depth, name in path if depth < indent]
            path.append((indent, code.strip().partition(":")[0]))
            last = ".".join(name for _, name in path)
            found[last] = comment.strip()
        elif comment and last is not None and line.startswith(" " * 8):
            found[last] += f" {comment.strip()}"
        else:
            last = None
    return {key: value.replace("|", "\\|") for key, value in found.items()}


def service_settings() -> str:
    """Every variable of the service with its default and what it means."""
    from pydantic_core import PydanticUndefined

    from serving.settings import PREFIX, Settings

    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (PydanticUndefined, None) else f"`{field.default}`"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{PREFIX}{name.upper()}` | {default} | {meaning} |")
    return "\n".join(lines)


def commands() -> str:
    """Every command with its first line of help."""
    import typer.main

    from marginalia.cli import app

    group: Any = typer.main.get_command(app)
    lines = ["| command | what it does |", "|---|---|"]
    for name, command in group.commands.items():
        if not command.hidden:
            meaning = " ".join((command.help or "").split("\n\n")[0].split())
            lines.append(f"| `marginalia {name}` | {meaning} |")
    return "\n".join(lines)


def http_errors() -> str:
    """The codes of the service's errors by status."""
    from serving.http.openapi_parts import ERRORS

    lines = ["| status | codes |", "|---|---|"]
    return "\n".join([*lines, *(f"| {status} | {text} |" for status, text in ERRORS.items())])


def metrics() -> str:
    """Every metric of the service with its labels."""
    from serving.telemetry import metrics as telemetry

    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for item in vars(telemetry).values():
        if hasattr(item, "_labelnames") and hasattr(item, "_documentation"):
            name = item._name + ("_total" if item._type == "counter" else "")
            labels = ", ".join(item._labelnames)
            lines.append(f"| `{name}` | {item._type} | {labels} | {item._documentation} |")
    return "\n".join(lines)


def evidence() -> str:
    """The rows of benchmarks/results/evidence.json, by data set, split and length."""
    rows = json.loads((ROOT / "benchmarks/results/evidence.json").read_text())["rows"]
    lines = [
        "| data | labels | split | steps | method | settings | seed | on | mIoU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["data"], row["split"], row["steps"], row["on"], row["miou"])):
        settings = ", ".join(f"`{name}: {value}`" for name, value in row["settings"].items())
        cells = [
            row["data"],
            row["labels"],
            row["split"],
            row["steps"],
            f"`{row['method']}`",
            settings,
            row["seed"],
            row["on"],
        ]
        lines.append("| " + " | ".join([*map(str, cells), f"{row['miou']:.1f}"]) + " |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "project_settings": project_settings,
    "service_settings": service_settings,
    "commands": commands,
    "http_errors": http_errors,
    "metrics": metrics,
    "evidence": evidence,
}
