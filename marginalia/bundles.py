"""Commands about a bundle: check it, run it on files, measure it, write it as one graph."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from marginalia.command import Bundle, Json, command
from pipeline import paths
from pipeline.stage import Exit, Result

app = typer.Typer()


class EnginePrecision(StrEnum):
    """`export.tensorrt.builder.PRECISIONS`, which would bring NumPy along."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    INT8 = "int8"


@command(app)
def verify(bundle: Bundle, as_json: Json = False) -> Result:
    """Check a bundle's files against their checksums and rules."""
    from export.bundle.bundle import verify

    manifest = verify(bundle)
    line = f"{bundle}: bundle {manifest.id}, {len(manifest.classes)} classes, every checksum holds"
    return Result((line,), record=manifest.model_dump(mode="json"), as_json=as_json)


@command(app)
def predict(
    bundle: Bundle,
    images: Annotated[list[Path], typer.Argument(help="files, folders, zips or tars of images")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for masks, overlays and lists")],
    provider: Annotated[Literal["auto", "cpu", "cuda", "openvino", "tensorrt"], typer.Option()] = "auto",
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16", "int8"], typer.Option()] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the network; default: all cores")] = None,
    overlay: Annotated[bool, typer.Option(help="also the colours over the image, as JPEG")] = True,
    confidence: Annotated[bool, typer.Option("--confidence", help="also the confidence, as grey PNG")] = False,
    as_json: Json = False,
) -> Result:
    """Segment files, folders and archives; bad images are listed, not fatal. Exit code 1 if none could be segmented."""
    from export.tools import predict, predictions

    options = predict.Options(provider, precision, threads, overlay, confidence)
    done = predict.predict(bundle, images, output, options)
    problems = () if done.images else (f"none of {len(done.quarantined)} images could be segmented",)
    exit = Exit.DONE if done.images else Exit.FAILED
    return Result(predictions.shown(done, output), (), problems, exit, predictions.record(done), as_json)


@command(app)
def onnx(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write")],
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT: for one image of this size, all shapes fixed")] = None,
    core: Annotated[
        bool, typer.Option("--core", help="the bundle's own graph: no scaling to and from its size")
    ] = False,
    as_json: Json = False,
) -> Result:
    """Write one graph that takes images of any size and answers at that size, for ONNX Runtime in any language.

    TensorRT refuses its antialiased Resize and OpenVINO leaves the antialias out: give those --core.
    """
    from export.tools import standalone_onnx
    from export.tools.sizes import parse_size

    shape = parse_size(size) if size else None
    made = standalone_onnx.write(bundle, output, size=shape, core=core)
    line = f"{made.path}: image {' x '.join(map(str, made.shape))}, {made.nodes} nodes, {made.size / 1e6:.1f} MB"
    record = {"path": str(made.path), "shape": list(made.shape), "nodes": made.nodes, "bytes": made.size}
    return Result((line,), record=record, as_json=as_json)


@command(app)
def bench(
    bundle: Bundle,
    sizes: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT, comma-separated or repeated")] = None,
    batches: Annotated[list[str], typer.Option(help="batch sizes, comma-separated or repeated")] = ["1,4"],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="turns of each configuration")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the network; default: all cores")] = None,
    student: Annotated[Path | None, typer.Option(help="the student's weights: adds rows for torch itself")] = None,
    out: Annotated[Path | None, typer.Option(help="also write everything measured as JSON")] = None,
    as_json: Json = False,
) -> Result:
    """Latency, images/s and peak memory of every runtime and precision of a bundle that runs here, as one table."""
    from export.tools import bench, bench_rows
    from export.tools.sizes import split_list
    from pipeline.storage import atomic

    options = bench.BenchOptions(split_list(sizes or []), split_list(batches), rounds, threads, student)
    measured = bench.bench(bundle, options)
    record = measured.model_dump(mode="json")
    if out is not None:
        atomic.write_json(out, record)
    return Result(bench_rows.shown(measured), record=record, as_json=as_json)


@command(app)
def engines(
    bundle: Bundle,
    precision: Annotated[
        list[EnginePrecision] | None, typer.Option(help="repeatable; default: all that the bundle has")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="default: as the runtime has it")] = None,
    cache: Annotated[Path | None, typer.Option(help=f"default: {paths.ENGINES}, or the user's cache folder")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="build even what the cache has")] = False,
    as_json: Json = False,
) -> Result:
    """Build a bundle's TensorRT engines on this machine's card, compare them with ONNX Runtime, and time them."""
    from dataclasses import replace

    from export.tensorrt import check

    result = check.run(bundle, precision or [], max_batch=max_batch, cache=cache, rebuild=rebuild)
    return replace(result, as_json=as_json)
