"""The application: every command, and `--version`."""

from typing import Annotated

import typer

import marginalia
from marginalia import bundles, champions, data, service, settings, stages

app = typer.Typer(
    help="Few labels and many unlabelled images in, a served segmentation model out. Run in the project's folder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group in (settings, data, service, bundles, champions):
    app.add_typer(group.app)
app.add_typer(stages.app, name="stage")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"marginalia {marginalia.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and leave")] = (
        False
    ),
) -> None:
    # Without a docstring, so that the application's own help stands.
    pass
