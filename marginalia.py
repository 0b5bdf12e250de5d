"""The command line: wires the rooms, lazily, and holds no logic."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Few labels and many unlabelled images in, a served segmentation model out. Run in the project's folder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# What the extra `serve` brings; anything else that is missing belongs to `train`.
_SERVE = ("bentoml", "bentoml_cli", "starlette", "uvicorn", "h11", "prometheus_client", "pydantic_settings")


@contextmanager
def _errors_told() -> Iterator[None]:
    """What the rooms raise to be read by people becomes a line and exit code 1, as does an extra that is missing."""
    cause: Exception
    try:
        yield
        return
    except ModuleNotFoundError as error:
        extra = "serve" if (error.name or "").partition(".")[0] in _SERVE else "train"
        cause, said = error, f"{error.name} is not installed; `pip install 'marginalia-seg[{extra}]'`"
    except (OSError, ValueError, RuntimeError) as error:
        cause, said = error, str(error)
    typer.secho(f"marginalia: {said}", fg="red", err=True)
    raise typer.Exit(1) from cause


@app.command("add-dump")
def add_dump(
    path: Annotated[str, typer.Argument(help="a folder, zip, tar, WebDataset (folder or {000..009}), or a URL of one")],
    name: Annotated[str | None, typer.Option(help="name of the dump; default: from the path")] = None,
    params: Annotated[Path, typer.Option(help="settings file")] = Path("params.yaml"),
) -> None:
    """Register a dump of unlabelled images; `dvc repro` then ingests it, retrains from the champion and gates."""
    from pipeline.ingest import add_dump as dumps
    from pipeline.ingest import dump_registry
    from pipeline.storage import dvc

    code = dumps.main([path, "--params", str(params), *(["--name", name] if name else [])])
    if code == 0:
        known = dump_registry.read()
        keep = [Path(e.archive) for n, e in known.dumps.items() if n != dump_registry.BASE]
        if known.warm_start:
            keep.append(Path("champions") / known.warm_start)
        if problem := dvc.track([path for path in keep if not dvc.tracked(path)]):
            typer.secho(f"not versioned by DVC: {problem}", fg="yellow", err=True)
    raise typer.Exit(code)


@app.command("export-labels")
def export_labels(
    format: Annotated[str, typer.Option(help="cvat, labelstudio, coco or voc")],
    output: Annotated[Path, typer.Option("--output", "-o", help="cvat: a zip; else a folder, replaced whole")],
    split: Annotated[
        list[str] | None, typer.Option(help="labelled (default), unlabelled, val, test; repeatable")
    ] = None,
    params: Annotated[Path, typer.Option(help="settings file")] = Path("params.yaml"),
) -> None:
    """Write the project's images with their labels, or pre-labels where there are none, for a label tool."""
    from pipeline.labels import exporter

    splits = [word for part in split or [] for word in ("--split", part)]
    raise typer.Exit(exporter.main(["--format", format, "-o", str(output), "--params", str(params), *splits]))


@app.command("import-labels")
def import_labels(
    path: Annotated[Path, typer.Argument(help="CVAT's xml or zip, Label Studio's or COCO's json, a folder of masks")],
    format: Annotated[str, typer.Option(help="auto, cvat, labelstudio, coco or folder")] = "auto",
    by: Annotated[str | None, typer.Option(help="who gave the labels; default: you")] = None,
    accept_unchanged: Annotated[
        bool, typer.Option("--accept-unchanged", help="also take masks that are just the pre-label")
    ] = False,
    params: Annotated[Path, typer.Option(help="settings file")] = Path("params.yaml"),
) -> None:
    """Take corrected labels back; `dvc repro` then trains with them. What is known already changes nothing."""
    from pipeline.labels import importer
    from pipeline.labels import registry as labels
    from pipeline.storage import dvc

    options = [*(["--by", by] if by else []), *(["--accept-unchanged"] if accept_unchanged else [])]
    code = importer.main([str(path), "--format", format, "--params", str(params), *options])
    if code == 0:
        keep = [Path(entry.archive) for entry in labels.read().labels.values()]
        if problem := dvc.track([path for path in keep if not dvc.tracked(path)]):
            typer.secho(f"not versioned by DVC: {problem}", fg="yellow", err=True)
    raise typer.Exit(code)


@app.command()
def drift(
    serving: Annotated[str, typer.Option(help="GET /v1/statistics of the service, as a URL or a dumped file")],
) -> None:
    """Compare what the running service answers with the champion's answers on its training images, class by class.

    Takes at least 30 sampled answers.
    """
    from rich.console import Console

    from pipeline import config
    from pipeline.drift import serving as served

    with _errors_told():
        passed = served.run(serving, config.load(), Console())
    raise typer.Exit(0 if passed else 1)


@app.command()
def serve(
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 3000,
    bundle: Annotated[Path | None, typer.Option(help="a bundle folder; default: the champion's")] = None,
) -> None:
    """Answer HTTP segmentation requests with the champion's bundle."""
    from serving.bento import run

    with _errors_told():
        run.main(host, port, bundle)


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="a bundle folder")]) -> None:
    """Check a bundle's files against their checksums and rules."""
    from export.bundle.bundle import verify as check

    with _errors_told():
        manifest = check(bundle)
    typer.echo(f"{bundle}: bundle {manifest.id}, {len(manifest.classes)} classes, every checksum holds")


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="a bundle folder")],
    images: Annotated[list[Path], typer.Argument(help="files, folders, zips or tars of images")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for masks, overlays and lists")],
    provider: Annotated[str, typer.Option(help="auto, cpu, cuda, openvino or tensorrt")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16 or int8")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the network; default: all cores")] = None,
    overlay: Annotated[bool, typer.Option(help="also the colours over the image, as JPEG")] = True,
    confidence: Annotated[bool, typer.Option("--confidence", help="also the confidence, as grey PNG")] = False,
) -> None:
    """Segment files, folders and archives; bad images are listed, not fatal. Exit code 1 if none could be segmented."""
    from export.tools import predict as job

    with _errors_told():
        result = job.predict(
            bundle, images, output, provider=provider, precision=precision, threads=threads, overlay=overlay,
            confidence=confidence,
        )  # fmt: skip
    job.show(result)
    raise typer.Exit(0 if result.written else 1)


@app.command()
def onnx(
    bundle: Annotated[Path, typer.Argument(help="a bundle folder")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write")],
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT: for one image of this size, all shapes fixed")] = None,
    core: Annotated[
        bool, typer.Option("--core", help="the bundle's own graph: no scaling to and from its size")
    ] = False,
) -> None:
    """Write one graph that takes images of any size and answers at that size, for ONNX Runtime in any language.

    TensorRT refuses its antialiased Resize and OpenVINO leaves the antialias out: give those --core.
    """
    with _errors_told():
        from export.tools import standalone_onnx as job
        from export.tools.sizes import parse_size

        made = job.write(bundle, output, size=parse_size(size) if size else None, core=core)
    typer.echo(f"{made.path}: image {' x '.join(map(str, made.shape))}, {made.nodes} nodes, {made.size / 1e6:.1f} MB")


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="a bundle folder")],
    sizes: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT, comma-separated or repeated")] = None,
    batches: Annotated[list[str], typer.Option(help="batch sizes, comma-separated or repeated")] = ["1,4"],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="turns of each configuration")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the network; default: all cores")] = None,
    student: Annotated[Path | None, typer.Option(help="the student's weights: adds rows for torch itself")] = None,
    out: Annotated[Path | None, typer.Option(help="also write everything measured as JSON")] = None,
) -> None:
    """Latency, images/s and peak memory of every runtime and precision of a bundle that runs here, as one table."""
    from export.tools import bench as job
    from export.tools.sizes import split_list
    from pipeline.storage import atomic

    with _errors_told():
        result = job.bench(
            bundle, split_list(sizes or []), split_list(batches), rounds=rounds, threads=threads, student=student
        )
        if out is not None:
            atomic.write_json(out, result)
    job.show(result)


@app.command()
def bento(bundle: Annotated[Path, typer.Argument(help="a bundle folder")]) -> None:
    """Build a bento that holds the bundle; `bentoml serve marginalia:latest` then serves it from anywhere."""
    from serving.bento import build as job

    with _errors_told():
        tag, folder = job.build(bundle)
    typer.echo(f"{tag}: in {folder}; start it by `bentoml serve {tag}`")


@app.command()
def triton(
    bundle: Annotated[Path, typer.Argument(help="a bundle folder")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the model repository; other models in it stay")],
    name: Annotated[str, typer.Option(help="the model's name in it")] = "marginalia",
    device: Annotated[str, typer.Option(help="cpu or cuda: for which the model is picked")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8; default: fp32")] = "auto",
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="images that may run together; default: 8, fewer of a large input size")
    ] = None,
    delay_us: Annotated[int, typer.Option(min=0, help="how long a request may wait for company")] = 0,
    instances: Annotated[str, typer.Option(help="copies of the model, as in cpu:2; default: Triton's choice")] = "",
) -> None:
    """Write a Triton model repository from a bundle: ONNX Runtime backend, dynamic batching."""
    from export.tools import triton as job

    with _errors_told():
        settings = job.ModelSettings(name=name, max_batch=max_batch, delay_us=delay_us, instances=instances)
        folder = job.write(bundle, output, settings, device=device, precision=precision)
    typer.echo(f"{folder}: serve it by `tritonserver --model-repository {output}`")


@app.command()
def report() -> None:
    """One table of the last run: scores, parity, verdict, and where bundle and pictures are."""
    from pipeline.reports import summary

    with _errors_told():
        summary.show(Path())


@app.command("history")
def history_(as_json: Annotated[bool, typer.Option("--json", help="everything recorded, as JSON")] = False) -> None:
    """Every champion: data, settings that changed, scores and why it won."""
    from pipeline.champions import history
    from pipeline.storage import atomic

    with _errors_told():
        said = history.told(Path("champions"))
    if as_json:
        typer.echo(atomic.to_json(said), nl=False)
    elif said["champions"]:
        history.show(said)
    else:
        typer.echo("no champion yet: the gate has promoted nothing")


@app.command()
def rollback(
    id: Annotated[
        str | None, typer.Argument(help="a champion of `marginalia history`; default: the one before")
    ] = None,
) -> None:
    """Make a former champion the champion again; the running server follows, the next training starts from it."""
    from pipeline.champions import rollback as job

    with _errors_told():
        moved = job.run(Path(), id)
    typer.echo(f"champion {moved.id}" + (f", rolled back from {moved.left}" if moved.left != moved.id else " already"))
    if moved.warm_start:
        typer.echo("dumps.yaml: warm_start names it too, so the next `dvc repro` trains from it")


@app.command("data-report")
def data_report() -> None:
    """What the data is, as one page that works offline: reports/data.html."""
    from pipeline.reports import data_report as job

    raise typer.Exit(job.main())


def main() -> None:
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    sys.path.insert(0, str(Path.cwd()))
    app()


if __name__ == "__main__":
    main()
