"""Commands about images and labels: what comes in, goes out to label tools and comes back."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from marginalia.command import PARAMS, Json, Params, command
from pipeline.stage import Exit, Result

app = typer.Typer()


class Split(StrEnum):
    """`pipeline.storage.manifest.SPLITS`, which would bring NumPy and Arrow along."""

    LABELLED = "labelled"
    UNLABELLED = "unlabelled"
    VAL = "val"
    TEST = "test"
    UNUSED = "unused"


@command(app)
def add_dump(
    path: Annotated[str, typer.Argument(help="a folder, zip, tar, WebDataset (folder or {000..009}), or a URL of one")],
    name: Annotated[str | None, typer.Option(help="name of the dump; default: from the path")] = None,
    params: Params = PARAMS,
    as_json: Json = False,
) -> Result:
    """Register a dump of unlabelled images; `dvc repro` then ingests it, retrains from the champion and gates."""
    from pipeline import config
    from pipeline.ingest import add_dump

    return replace(add_dump.run(config.load(params), path, name), as_json=as_json)


@command(app)
def export_labels(
    format: Annotated[Literal["cvat", "labelstudio", "coco", "voc"], typer.Option(help="the tool's or data set's")],
    output: Annotated[Path, typer.Option("--output", "-o", help="cvat: a zip; else a folder, replaced whole")],
    split: Annotated[list[Split] | None, typer.Option(help="default: labelled; repeatable")] = None,
    params: Params = PARAMS,
    as_json: Json = False,
) -> Result:
    """Write the project's images with their labels, or pre-labels where there are none, for a label tool."""
    from pipeline import config
    from pipeline.labels import exporter

    return replace(exporter.run(config.load(params), format, output, split or [Split.LABELLED]), as_json=as_json)


@command(app)
def import_labels(
    path: Annotated[Path, typer.Argument(help="CVAT's xml or zip, Label Studio's or COCO's json, a folder of masks")],
    format: Annotated[Literal["auto", "cvat", "labelstudio", "coco", "folder"], typer.Option()] = "auto",
    by: Annotated[str | None, typer.Option(help="who gave the labels; default: you")] = None,
    accept_unchanged: Annotated[
        bool, typer.Option("--accept-unchanged", help="also take masks that are just the pre-label")
    ] = False,
    params: Params = PARAMS,
    as_json: Json = False,
) -> Result:
    """Take corrected labels back; `dvc repro` then trains with them. What is known already changes nothing."""
    from pipeline import config
    from pipeline.labels import importer

    result = importer.run(config.load(params), path, tool=format, by=by, accept_unchanged=accept_unchanged)
    return replace(result, as_json=as_json)


@command(app)
def data_report(params: Params = PARAMS) -> Exit:
    """What the data is, as one page that works offline: reports/data.html."""
    from pipeline import stage
    from pipeline.reports import data_report

    return stage.run("data-report", data_report.run, params=params)


@command(app)
def drift(
    serving: Annotated[str, typer.Option(help="GET /v1/statistics of the service, as a URL or a dumped file")],
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MARGINALIA_TOKEN", help="the service's; others on this machine see an argument, not a variable"
        ),
    ] = None,
    params: Params = PARAMS,
    as_json: Json = False,
) -> Result:
    """Compare what the running service answers with the champion's answers on its training images, class by class.

    Takes at least 30 sampled answers. Exit code 3 where they have drifted and pool.policy is hold.
    """
    from pipeline import config
    from pipeline.drift import serving as served

    return replace(served.run(config.load(params), serving, token or None), as_json=as_json)
