"""The command line: wires the rooms, lazily, and holds no logic."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Few labels and many unlabelled images in, a served segmentation model out. Run in the project's folder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _fail(error: Exception) -> typer.Exit:
    typer.secho(f"marginalia: {error}", fg="red", err=True)
    return typer.Exit(1)


@app.command("add-dump")
def add_dump(
    path: Annotated[Path, typer.Argument(help="a folder, zip or tar of unlabelled images")],
    name: Annotated[str | None, typer.Option(help="name of the dump; default: from the path")] = None,
    params: Annotated[Path, typer.Option(help="settings file")] = Path("params.yaml"),
) -> None:
    """Register a dump of unlabelled images; `dvc repro` then ingests it, retrains from the champion and gates."""
    from pipeline import dumps, registry, versioning

    code = dumps.main([str(path), "--params", str(params), *(["--name", name] if name else [])])
    if code == 0:
        known = registry.read()
        keep = [Path(e.archive) for n, e in known.dumps.items() if n != registry.BASE]
        if known.warm_start:
            keep.append(Path("champions") / known.warm_start)
        if problem := versioning.track([path for path in keep if not versioning.tracked(path)]):
            typer.secho(f"not versioned by DVC: {problem}", fg="yellow", err=True)
    raise typer.Exit(code)


@app.command()
def serve(
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 3000,
    bundle: Annotated[Path | None, typer.Option(help="a bundle folder; default: the champion's")] = None,
) -> None:
    """Answer HTTP segmentation requests with the champion's bundle."""
    from serving import run

    try:
        run.main(host, port, bundle)
    except (OSError, ValueError, RuntimeError) as error:
        raise _fail(error) from error


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="a bundle folder")]) -> None:
    """Check a bundle's files against their checksums and rules."""
    from export.bundle import verify as check

    try:
        manifest = check(bundle)
    except (OSError, ValueError, RuntimeError) as error:
        raise _fail(error) from error
    typer.echo(f"{bundle}: bundle {manifest.id}, {len(manifest.classes)} classes, every checksum holds")


@app.command()
def report() -> None:
    """One table of the last run: scores, parity, verdict, and where bundle and pictures are."""
    from pipeline import story

    try:
        story.show(Path())
    except (OSError, ValueError, RuntimeError) as error:
        raise _fail(error) from error


def main() -> None:
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    sys.path.insert(0, str(Path.cwd()))
    app()


if __name__ == "__main__":
    main()
