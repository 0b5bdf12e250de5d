"""The student's cheaper variants: int8 for the CPU, and for a card fp16 and TensorRT's own int8."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from export import quantize
from export.bundle.manifest import MODEL, Option
from export.onnx_graph import Graph, trace
from pipeline import config, paths
from pipeline.storage import manifest
from training import inference

FP16, INT8, INT8_TENSORRT = "model.fp16.onnx", "model.int8.onnx", "model.int8-tensorrt.onnx"
# What parity is to try of each file. OpenVINO computes in bf16 from the fp32 file.
OFFERED = (
    Option(runtime="onnxruntime", device="cpu", precision="fp32"),
    Option(runtime="onnxruntime", device="cpu", precision="int8", file="model.int8.onnx"),
    Option(runtime="openvino", device="cpu", precision="fp32"),
    Option(runtime="openvino", device="cpu", precision="bf16"),
    Option(runtime="openvino", device="cpu", precision="int8", file="model.int8.onnx"),
    Option(runtime="onnxruntime", device="cuda", precision="fp32"),
    Option(runtime="onnxruntime", device="cuda", precision="fp16", file="model.fp16.onnx"),
    Option(runtime="tensorrt", device="cuda", precision="fp32"),
    Option(runtime="tensorrt", device="cuda", precision="fp16", file="model.fp16.onnx"),
    Option(runtime="tensorrt", device="cuda", precision="int8", file="model.int8-tensorrt.onnx"),
)


@dataclass(frozen=True)
class Student:
    """The network, its input policy and the metadata that travels inside each of its graphs."""

    network: nn.Module
    policy: config.Input
    metadata: Mapping[str, str]

    def trace(self) -> Graph:
        """The fp32 graph. Raises ExportError."""
        return trace(self.network, self.policy.stride, self.metadata)

    def trace_half(self) -> Graph:
        """The fp16 graph. Raises ExportError."""
        return trace(copy.deepcopy(self.network).half(), self.policy.stride, self.metadata)


@dataclass(frozen=True)
class Variants:
    """Graphs by file name, and what is to be reported of one: how int8 was made, or why a variant could not be."""

    models: dict[str, bytes] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def noting_failure(self, file: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # exporter and quantiser raise what they like; fp32 needs neither
            self.notes[file] = f"not made: {str(error) or repr(error)}"

    def offered(self) -> tuple[Option, ...]:
        """What parity can try of these and the fp32 graph."""
        return tuple(option for option in OFFERED if option.file in (MODEL, *self.models))


def calibration_images(params: config.Params, policy: config.Input) -> list[NDArray[np.uint8]]:
    """Training images, spread evenly over labelled and unlabelled ones, as the graph takes them: 1 x H x W x 3 each."""
    rows = sorted(
        (r for r in manifest.read(paths.SPLIT_MANIFEST) if r.split in ("labelled", "unlabelled")),
        key=lambda row: row.id,
    )
    count = min(len(rows), params.export.calibration_images)
    picked = [rows[i * len(rows) // count] for i in range(count)]
    return [inference.read(row, policy, params.ingest.max_pixels, mask=False).input_HWC[None] for row in picked]


def make_variants(student: Student, fp32: Graph, params: config.Params, *, has_card: bool) -> Variants:
    """What is switched on in `params.export`; variants for a card only where there is one, as parity can run them there."""
    variants = Variants()
    targets: dict[str, quantize.Target] = {INT8: "cpu", INT8_TENSORRT: "tensorrt"} if has_card else {INT8: "cpu"}

    if params.export.int8:
        images = calibration_images(params, student.policy)
        for file, target in targets.items():
            with variants.noting_failure(file):
                made = quantize.quantize_to_agreement(fp32.data, images, target, params.parity.int8.agreement)
                variants.models[file] = made.model
                variants.notes[file] = (
                    f"{made.float_layers} first layers in float, "
                    f"{made.agreement:.4f} of the labels as fp32 in calibration"
                )

    if has_card:
        with variants.noting_failure(FP16):
            variants.models[FP16] = student.trace_half().data
    return variants
