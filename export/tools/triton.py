"""The same bundle for teams that run NVIDIA Triton: a model repository with one model in it.

    REPOSITORY/NAME/config.pbtxt     `config`
    REPOSITORY/NAME/labels.txt       line n (from 0) names class n
    REPOSITORY/NAME/1/model.onnx     one of the bundle's models, byte for byte

Triton batches requests of one size by itself. It knows nothing of the input policy: callers bring the image to a size
whose sides are multiples of the stride (`pipeline.imaging.resize` does), and cut the padding off the answer; long side
and stride are among the model's parameters.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export.bundle.bundle import Bundle, open_bundle
from export.bundle.manifest import COMBINATIONS, INPUT, OUTPUTS, Manifest, Precision
from export.runtime.batches import BATCH_SIZES, most_images
from pipeline.storage import atomic

Device = Literal["cpu", "cuda"]
VERSION, LABELS, CONFIG = "1", "labels.txt", "config.pbtxt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class TritonError(ValueError):
    """This model repository cannot be written; the message says what to ask for instead."""


def model_file(bundle: Bundle, device: Device, precision: Precision) -> str:
    """The bundle's file for ONNX Runtime on that device; "auto" is fp32, which every bundle has.

    Raises:
        TritonError: the bundle has no such model, or parity found it wrong.
    """
    wanted = "fp32" if precision == "auto" else precision
    models = {
        (where, variant): file
        for (runtime, file), ways in COMBINATIONS.items()
        for where, variant in ways
        if runtime == "onnxruntime" and file in bundle.models
        if f"onnxruntime {where} {variant}" not in bundle.manifest.rejected
    }
    if (device, wanted) not in models:
        have = ", ".join(sorted(variant for where, variant in models if where == device)) or "nothing"
        raise TritonError(f"{bundle.folder}: has no {wanted} model for ONNX Runtime on {device}; it has {have}")
    return models[device, wanted]


def labels(manifest: Manifest) -> str:
    """One line for each id from 0 to the largest; ids of no class have an empty line."""
    names = {item.id: item.name for item in manifest.classes}
    return "".join(" ".join(names.get(i, "").split()) + "\n" for i in range(manifest.classes[-1].id + 1))


def _block(kind: str, fields: Sequence[str]) -> str:
    return f"{kind} {{\n" + "".join(f"  {field}\n" for field in fields) + "}\n"


@dataclass(frozen=True)
class ModelSettings:
    """How Triton is to run the model.

    max_batch: images that run together at most; None: as many as our own runtime takes on a card (`most_images`).
    delay_us: microseconds that a request may wait for company; with 0 it never waits.
    instances: kind and count of copies, as in "cpu:2" or "cuda:1"; "": one for each card, or one on the processor.
    """

    name: str = "marginalia"
    max_batch: int | None = None
    delay_us: int = 0
    instances: str = ""


def config(manifest: Manifest, settings: ModelSettings) -> str:
    """config.pbtxt: a `ModelConfig` in protobuf's text format (Triton, "Model Configuration").

    Raises:
        TritonError: a name that Triton or a file system would not take, a batch below 1, or other instances than that.
    """
    max_batch = most_images(manifest.input.long_side) if settings.max_batch is None else settings.max_batch
    if not _NAME.fullmatch(settings.name):
        raise TritonError(f"name {settings.name!r}: use letters, digits, '_', '-' and '.', at most 100 of them")
    if max_batch < 1 or settings.delay_us < 0:
        raise TritonError(f"max_batch {max_batch}, delay {settings.delay_us}: at least 1, and at least 0 microseconds")

    blocks = [*_tensors(), _dynamic_batching(max_batch, settings.delay_us), *_instance_group(settings.instances)]
    head = f'name: "{settings.name}"\nbackend: "onnxruntime"\nmax_batch_size: {max_batch}\n'
    return head + "".join(blocks) + "".join(_parameters(manifest))


def _tensors() -> list[str]:
    """The graph's input and outputs, without the batch."""
    image = [f'name: "{INPUT}"', "data_type: TYPE_UINT8", "format: FORMAT_NHWC", "dims: [ -1, -1, 3 ]"]
    blocks = [_block("input", image)]
    for output in OUTPUTS:
        names = [f'label_filename: "{LABELS}"'] if output == "label" else []
        blocks.append(_block("output", [f'name: "{output}"', "data_type: TYPE_UINT8", "dims: [ -1, -1 ]", *names]))
    return blocks


def _dynamic_batching(max_batch: int, delay_us: int) -> str:
    sizes = [str(size) for size in sorted(BATCH_SIZES) if 1 < size <= max_batch]
    preferred = [f"preferred_batch_size: [ {', '.join(sizes)} ]"] if sizes else []
    return _block("dynamic_batching", [*preferred, f"max_queue_delay_microseconds: {delay_us}"])


def _instance_group(instances: str) -> list[str]:
    if not instances:
        return []
    found = re.fullmatch(r"(cpu|cuda):([1-9]\d{0,2})", instances)
    if found is None:
        raise TritonError(f"instances {instances!r}: say a device and how many on it, as in cpu:2 or cuda:1")
    kind = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}[found[1]]
    return [_block("instance_group", [f"count: {found[2]}", f"kind: {kind}"])]


def _parameters(manifest: Manifest) -> list[str]:
    """What a caller must know to prepare images and read answers."""
    facts = {
        "bundle": manifest.id,
        "long_side": str(manifest.input.long_side),
        "stride": str(manifest.input.stride),
        "ignore": str(manifest.ignore),
    }
    return [
        _block("parameters", [f'key: "{key}"', f"value {{ string_value: {json.dumps(value)} }}"])
        for key, value in facts.items()
    ]


def write(
    bundle: Path,
    repository: Path,
    settings: ModelSettings = ModelSettings(),
    *,
    device: Device = "cpu",
    precision: Precision = "auto",
) -> Path:
    """Write the model's folder below `repository`, where other models may lie, and return it. All of it or nothing.

    Raises:
        BundleError: the bundle does not verify.
        TritonError: as `model_file` and `config`.
    """
    opened = open_bundle(bundle)
    text = config(opened.manifest, settings)
    model = opened.read_model(model_file(opened, device, precision))

    folder = Path(repository) / settings.name
    if folder.exists() and not (folder / CONFIG).is_file():
        raise TritonError(f"{folder}: is there already and no model of a repository; move it away or choose a --name")
    with atomic.replacing_folder(folder) as fresh:
        atomic.write_text(fresh / CONFIG, text)
        atomic.write_text(fresh / LABELS, labels(opened.manifest))
        atomic.write_bytes(fresh / VERSION / "model.onnx", model)
    return folder
