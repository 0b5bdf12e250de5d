"""One graph for those who run the model elsewhere: an image of any size in, label and confidence at that size out.

`pipeline.imaging.resize` is inside: scale down, pad, then the bundle's own graph, crop, nearest. To make it takes `onnx` and
`onnxscript` but no torch; to run it takes ONNX Runtime and nothing of this project.

It is for ONNX Runtime because of the antialias: TensorRT's parser refuses a `Resize` that has it, OpenVINO takes it and
leaves the antialias out without a word. A graph of fixed size whose image need not be scaled has no such `Resize`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import compose, helper, numpy_helper
from onnxscript import optimizer

from export import onnx_proto
from export.bundle.bundle import open_bundle
from export.bundle.manifest import INPUT, OUTPUTS, InputPolicy, Manifest
from export.tools.resize_graph import resize_graphs
from export.tools.sizes import Size
from pipeline.storage import atomic

OPSET = 18  # `Resize` has antialias since then; what is used here means the same in all later ones
LARGEST_CONSTANT = 1 << 24  # elements of what may be computed ahead: the rows and columns of any image


class StandaloneError(ValueError):
    """The graph cannot be made from this bundle, in this size or at this place; the message says what to change."""


@dataclass(frozen=True)
class WrittenGraph:
    """A written graph: its input's shape (names for what is free), its nodes and its size in bytes."""

    path: Path
    shape: tuple[int | str, ...]
    nodes: int
    size: int


def standalone_graph(model: bytes, manifest: Manifest, size: Size | None = None) -> onnx.ModelProto:
    """The graph of a bundle's fp32 model with the resize to and from its own size inside.

    Args:
        size: of the only image it will take, one at a time; None: any number of images of any one size.

    Raises:
        StandaloneError: the model's opset is too old.
    """
    proto = onnx.load_from_string(model)
    if onnx_proto.opset(proto) < OPSET:
        raise StandaloneError(
            f"the model is of opset {onnx_proto.opset(proto)}, and antialias needs {OPSET}; export it again"
        )
    proto = _with_resize(proto, manifest.input)
    if size:
        proto = fix_shape(proto, (1, size.height, size.width, 3))
    return _finished(proto, manifest, str(size) if size else "any")


def core_graph(model: bytes, manifest: Manifest, size: Size | None = None) -> onnx.ModelProto:
    """The bundle's own graph, for images that were brought to multiples of its stride.

    Args:
        size: as for `standalone_graph`.

    Raises:
        StandaloneError: `size` is no multiple of the stride.
    """
    proto, stride = onnx.load_from_string(model), manifest.input.stride
    if size:
        if size.height % stride or size.width % stride:
            raise StandaloneError(f"--size {size}: the bundle's own graph takes multiples of {stride}; drop --core")
        proto = fix_shape(proto, (1, size.height, size.width, 3))
    return _finished(proto, manifest, str(size) if size else f"multiples of {stride}")


def write(folder: Path, path: Path, *, size: Size | None = None, core: bool = False) -> WrittenGraph:
    """Verify the bundle in `folder` and write its `standalone_graph`, or its `core_graph`, to `path`.

    Raises:
        bundle.BundleError: the bundle must not be used.
        StandaloneError: as the two, or `path` lies in the bundle.
        OSError: `path` cannot be written.
    """
    opened = open_bundle(folder)
    if path.resolve().is_relative_to(folder.resolve()):
        raise StandaloneError(f"{path}: lies in the bundle, which may hold nothing else; choose another place")

    make = core_graph if core else standalone_graph
    proto = make(opened.read_model(), opened.manifest, size)
    data = proto.SerializeToString(deterministic=True)
    atomic.write_bytes(path, data)

    sides = proto.graph.input[0].type.tensor_type.shape.dim
    return WrittenGraph(
        path, tuple(side.dim_param or side.dim_value for side in sides), len(proto.graph.node), len(data)
    )


def _with_resize(core: onnx.ModelProto, policy: InputPolicy) -> onnx.ModelProto:
    """`core` between the two resize graphs; input and outputs are called as the core's are."""
    before, after = resize_graphs(policy)
    for part in (before, after):
        part.ir_version = core.ir_version
        part.opset_import[0].version = onnx_proto.opset(core)

    core = compose.add_prefix(core, "core_")
    after = compose.add_prefix(after, "after_", rename_inputs=False, rename_outputs=False)
    label, confidence = (f"core_{name}" for name in OUTPUTS)
    sizes = ["size", "scaled"]
    front = compose.merge_models(before, core, [("fitted", f"core_{INPUT}")], outputs=[label, confidence, *sizes])
    links = [(label, "padded_label"), (confidence, "padded_confidence"), *((name, name) for name in sizes)]
    proto = compose.merge_models(front, after, links, name="marginalia")

    domains = {entry.domain: entry for entry in proto.opset_import}  # one import a domain; the merge repeats them
    del proto.opset_import[:], proto.graph.value_info[:]
    proto.opset_import.extend(domains.values())
    _set_shapes(proto, ("batch", "height", "width", 3))
    return proto


def _set_shapes(proto: onnx.ModelProto, shape: Sequence[int | str]) -> None:
    """Declare the shapes of the input, N x H x W x 3, and of the outputs, N x H x W."""
    for value in (*proto.graph.input, *proto.graph.output):
        tensor = value.type.tensor_type
        sides = shape[: len(tensor.shape.dim)]
        value.CopyFrom(helper.make_tensor_value_info(value.name, tensor.elem_type, sides))


def fix_shape(proto: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """The graph for one shape of its input: whatever hangs on shapes alone is computed now, what then does nothing goes."""
    _set_shapes(proto, shape)
    del proto.graph.value_info[:]
    folded = _fold(proto)
    for node in _without_effect(folded.graph):
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]
    return _fold(folded)


def _fold(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Compute what is constant, and drop what nothing uses."""
    return optimizer.optimize(
        proto, num_iterations=4, input_size_limit=LARGEST_CONSTANT, output_size_limit=LARGEST_CONSTANT
    )


def _without_effect(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that hand on what they get: scaling and indexing to the same size, padding by nothing."""
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    same_size = []
    for node in graph.node:
        shape = shapes.get(node.input[0]) if node.op_type in ("Resize", "Pad", "Gather") else None
        if shape and 0 not in shape and shape == shapes.get(node.output[0]):
            same_size.append((node, shape))
    return [node for node, shape in same_size if _keeps_values(node, shape, constants.get(node.input[1]))]


def _keeps_values(node: onnx.NodeProto, shape: Sequence[int], second_input: NDArray[np.generic] | None) -> bool:
    """Of a node whose output has its input's `shape`; `second_input` is None where it is not known or absent."""
    if node.op_type == "Resize":
        return not node.input[1]  # a region of interest moves the picture
    if second_input is None:
        return False
    if node.op_type == "Pad":
        return not second_input.any()
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return np.array_equal(second_input, np.arange(shape[axis]))


def _finished(proto: onnx.ModelProto, manifest: Manifest, size: str) -> onnx.ModelProto:
    """Checked, and with what the bundle says of it in its metadata: the bundle's id among it, as JSON or plain text.

    `size` is what images it takes: WIDTHxHEIGHT, or words.
    """
    values = onnx_proto.metadata(proto) | {
        "classes": json.dumps([item.name for item in manifest.classes]),
        "palette": json.dumps([list(item.color) for item in manifest.classes]),
        "ignore": json.dumps(manifest.ignore),
        "input": json.dumps(manifest.input.model_dump(mode="json") | {"size": size}, sort_keys=True),
        "bundle": manifest.id,
    }
    values |= {key: getattr(manifest, key) for key in ("data_hash", "split_hash", "test_hash", "commit", "method")}
    onnx_proto.set_metadata(proto, dict(sorted(values.items())))
    onnx.checker.check_model(proto, full_check=True)
    return proto
