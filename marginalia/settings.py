"""Commands about params.yaml."""

from typing import Annotated

import typer

from marginalia.command import PARAMS, Json, Params, command
from pipeline.stage import Result

app = typer.Typer()


@command(app)
def preset(
    name: Annotated[str | None, typer.Argument(help="default: list the presets")] = None,
    params: Params = PARAMS,
    write: Annotated[bool, typer.Option("--write", help="put it into --params; default: print it")] = False,
    as_json: Json = False,
) -> Result:
    """params.yaml with a preset's values in their places, comments kept; without a name, a list of the presets."""
    from rich.table import Table

    from pipeline import config
    from pipeline.config import presets
    from pipeline.storage import atomic

    if name is None:
        purposes = {known: presets.purpose(known) for known in presets.names()}
        table = Table("preset", "for")
        for row in purposes.items():
            table.add_row(*row)
        return Result((table,), record=purposes, as_json=as_json)
    text = presets.compose(name, params)
    if not write:
        return Result((text.removesuffix("\n"),), record=config.parse(text).model_dump(mode="json"), as_json=as_json)
    atomic.write_text(params, text)
    return Result((f"{params}: has the values of preset {name}",), record={"written": str(params)}, as_json=as_json)
