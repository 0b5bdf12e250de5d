"""Parse and build every network of params.yaml and presets/ in every precision with TensorRT, without a card.

    pip install 'marginalia-seg[trtcheck]'     # tensorrt-rtx: its parser and builder run without a GPU
    python benchmarks/engine_builds.py [--presets edge one-gpu] [--out benchmarks/results/engine_builds.json]

Weights are random: what is shown is that TensorRT reads the exported graphs and makes engines of them. Finished rows are
kept in the file and not repeated.
"""

import argparse
import copy
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from export import onnx_graph, quantize
from export.tensorrt import builder, installation
from export.tensorrt.profile import Profile
from pipeline import config
from pipeline.config import presets
from pipeline.storage import atomic
from training.models import segmenter

CLASSES = 6
SIZE = 256  # of the calibration images, before they are rounded up to the stride


def forms(params: config.Params) -> dict[str, bytes]:
    """The exported graph of the settings' network by precision."""
    torch.manual_seed(0)
    own = params.model.model_copy(update={"weights": None})
    model, stride = segmenter.build(own, CLASSES).eval(), params.input.stride
    plain = onnx_graph.trace(model, stride, {}).data
    side = -(-SIZE // stride) * stride
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 256, (1, side, side, 3), dtype=np.uint8) for _ in range(4)]
    return {
        "fp32": plain,
        "fp16": onnx_graph.trace(copy.deepcopy(model).half(), stride, {}).data,
        "int8": quantize.quantize(plain, images, "tensorrt"),
    }


def build(name: str, precision: str, model: bytes, profile: Profile) -> dict[str, Any]:
    module, began = installation.load(), time.monotonic()
    row = {"network": name, "precision": precision, "onnx_mb": round(len(model) / 1e6, 1), "module": module.__name__}
    try:
        made = builder.build(module, model, precision=precision, profile=profile, name=f"{name} {precision}")
        row |= {"engine_mb": round(len(made.engine) / 1e6, 1), "failure": None}
    except installation.EngineError as error:
        row |= {"engine_mb": None, "failure": str(error)[:400]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return row | {"seconds": round(time.monotonic() - began, 1), "peak_gb_so_far": round(peak, 2)}


def main() -> None:
    base = Path(__file__).parents[1] / "params.yaml"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=[], help="beside params.yaml")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if arguments.out and arguments.out.exists():
        rows = {f"{row['network']} {row['precision']}": row for row in atomic.read_json(arguments.out)["rows"]}
    settings = {"params": config.load(base)}
    settings |= {name: config.parse(presets.compose(name, base)) for name in arguments.presets}
    for source, params in settings.items():
        policy = params.input
        try:
            made = forms(params)
        except Exception as error:  # an exporter's or a quantiser's refusal is a row, too
            rows[f"{source} export"] = {"network": source, "precision": "-", "failure": f"export: {error}"[:400]}
            continue
        for precision, model in made.items():
            name = f"{source} {precision}"
            if rows.get(name, {}).get("failure", "not run") is None:
                continue
            profile = Profile.of(long_side=policy.long_side, stride=policy.stride)
            rows[name] = build(source, precision, model, profile)
            if arguments.out:
                try:
                    release = version("tensorrt-rtx")
                except PackageNotFoundError:
                    release = "unknown"
                about = {"tensorrt_rtx": release, "torch": torch.__version__, "classes": CLASSES}
                atomic.write_json(arguments.out, {"about": about, "rows": list(rows.values())})
    table = Table("network", "precision", "ONNX MB", "engine MB", "seconds", "failure")
    for row in rows.values():
        keys = ("network", "precision", "onnx_mb", "engine_mb", "seconds", "failure")
        table.add_row(*("-" if row.get(k) is None else str(row[k]) for k in keys))
    Console().print(table)


if __name__ == "__main__":
    main()
