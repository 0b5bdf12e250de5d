"""Commands about what was trained: the last run, methods against each other, champions and the way back."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from marginalia.command import PARAMS, Json, Params, command
from pipeline import paths
from pipeline.stage import Result

app = typer.Typer()


@command(app)
def report(as_json: Json = False) -> Result:
    """One table of the last run: scores, parity, verdict, and where bundle and pictures are."""
    from pipeline.reports import summary

    return replace(summary.run(Path()), as_json=as_json)


@command(app)
def history(as_json: Json = False) -> Result:
    """Every champion: data, settings that changed, scores and why it won."""
    from pipeline.champions import history

    found = history.summarize(paths.CHAMPIONS)
    shown = history.table(found) if found.champions else "no champion yet: the gate has promoted nothing"
    return Result((shown,), record=found.to_record(), as_json=as_json)


@command(app)
def rollback(
    id: Annotated[
        str | None, typer.Argument(help="a champion of `marginalia history`; default: the one before")
    ] = None,
    as_json: Json = False,
) -> Result:
    """Make a former champion the champion again; the running server follows, the next training starts from it."""
    from pipeline.champions import rollback

    moved = rollback.run(Path(), id)
    lines = [f"champion {moved.id}" + (f", rolled back from {moved.left}" if moved.left != moved.id else " already")]
    if moved.warm_start:
        lines.append(f"{paths.DUMP_REGISTRY}: warm_start names it too, so the next `dvc repro` trains from it")
    return Result(lines, record=moved._asdict(), as_json=as_json)


@command(app)
def rescore(params: Params = PARAMS, as_json: Json = False) -> Result:
    """Score the champion on the test split as it is now, so that the gate can compare again after that split changed."""
    from pipeline import config
    from training import evaluate

    return replace(evaluate.rescore_champion(config.load(params)), as_json=as_json)


@command(app)
def compare(
    methods: Annotated[list[str] | None, typer.Option(help="of train.method; comma-separated or repeated")] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="comma-separated or repeated; default: 0,1,2")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-S", help="another setting for every run, as DVC takes it")
    ] = None,
    as_json: Json = False,
) -> Result:
    """Methods against each other: a grid of DVC experiments over seeds, one table and one figure.

    Each run is an experiment (`dvc exp show` lists them) in a copy of the workspace; those that exist are not run again.
    """
    from export.tools.sizes import split_list
    from training import compare

    try:
        numbers = [int(seed) for seed in split_list(seeds or ["0,1,2"])]
    except ValueError as error:
        raise typer.BadParameter(f"--seeds: {error}") from error
    result = compare.run(split_list(methods or []) or compare.default_methods(), numbers, settings or [])
    return replace(result, as_json=as_json)


@command(app)
def headroom(
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", help="repeatable; default: 0 and 1, for without two there is no verdict"),
    ] = None,
    params: Params = PARAMS,
    as_json: Json = False,
) -> Result:
    """Say whether more images can pay at all: train on a quarter, a half and all of your labels, and draw the curve.

    Judged on val, in reports/headroom. Six trainings of train.steps without unlabelled images; those done are kept.
    """
    from pipeline import config
    from training import headroom

    return replace(headroom.run(config.load(params), seeds or [0, 1]), as_json=as_json)
