"""Commands about the service: run it, or pack it to be run elsewhere."""

from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from marginalia.command import Bundle, Json, command
from pipeline.stage import Result

app = typer.Typer()


@command(app)
def serve(
    host: Annotated[str | None, typer.Option(help="default: HOST of the environment, else 127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="default: PORT of the environment, else 3000")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="a bundle folder; default: the champion's")] = None,
) -> NoReturn:
    """Answer HTTP segmentation requests with the champion's bundle."""
    from serving.bento import run

    run.main(host, port, bundle)


@command(app)
def bento(bundle: Bundle, as_json: Json = False) -> Result:
    """Build a bento that holds the bundle; `bentoml serve marginalia:latest` then serves it from anywhere."""
    from serving.bento import build

    tag, folder = build.build(bundle)
    line = f"{tag}: in {folder}; start it by `bentoml serve {tag}`"
    return Result((line,), record={"tag": str(tag), "folder": str(folder)}, as_json=as_json)


@command(app)
def triton(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", help="the model repository; other models in it stay")],
    name: Annotated[str, typer.Option(help="the model's name in it")] = "marginalia",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="for which the model is picked")] = "cpu",
    precision: Annotated[Literal["auto", "fp32", "fp16", "int8"], typer.Option(help="auto is fp32")] = "auto",
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="images that may run together; default: 8, fewer of a large input size")
    ] = None,
    delay_us: Annotated[int, typer.Option(min=0, help="how long a request may wait for company")] = 0,
    instances: Annotated[str, typer.Option(help="copies of the model, as in cpu:2; default: Triton's choice")] = "",
    as_json: Json = False,
) -> Result:
    """Write a Triton model repository from a bundle: ONNX Runtime backend, dynamic batching."""
    from export.tools import triton

    settings = triton.ModelSettings(name=name, max_batch=max_batch, delay_us=delay_us, instances=instances)
    folder = triton.write(bundle, output, settings, device=device, precision=precision)
    line = f"{folder}: serve it by `tritonserver --model-repository {output}`"
    return Result((line,), record={"folder": str(folder)}, as_json=as_json)
