"""How a function becomes a command: Typer parses the options, `pipeline.stage` tells the result or the error."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from pipeline import paths, stage

P = ParamSpec("P")
Told = TypeVar("Told", bound=stage.Result | stage.Exit)
Params = Annotated[Path, typer.Option("--params", help="settings file")]
PARAMS = paths.PARAMS
Bundle = Annotated[Path, typer.Argument(help="a bundle folder")]
Json = Annotated[bool, typer.Option("--json", help="the result as JSON on standard output, in place of the table")]


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[P, Told]], Callable[P, Told]]:
    """Register a function as a command of `app`; the function itself stays as it is, to be called from Python."""

    def register(function: Callable[P, Told]) -> Callable[P, Told]:
        @functools.wraps(function)
        def told(*arguments: P.args, **options: P.kwargs) -> None:
            raise typer.Exit(stage.attempt(lambda: function(*arguments, **options)))

        app.command(name)(told)
        return function

    return register
