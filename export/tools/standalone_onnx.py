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
from onnx import compose, helper, numpy_helper
from onnxscript import INT64, UINT8, optimizer, script
from onnxscript import opset18 as op

from export.bundle.bundle import open_bundle
from export.bundle.manifest import INPUT, OUTPUTS, InputPolicy, Manifest
from pipeline.storage import atomic

OPSET = 18  # `Resize` has antialias since then; what is used here means the same in all later ones
FOLDED = 1 << 24  # elements of what may be computed ahead: the rows and columns of any image
IMAGE, PADDED, PAIR = UINT8["batch", "height", "width", 3], UINT8["batch", "padded_height", "padded_width"], INT64[2]


class WholeError(ValueError):
    """The graph cannot be made from this bundle, in this size or at this place; the message says what to change."""


@dataclass(frozen=True)
class Written:
    """A written graph: its input's shape (names for what is free), its nodes and its size in bytes."""

    path: Path
    shape: tuple[int | str, ...]
    nodes: int
    size: int


def parse_size(text: str) -> tuple[int, int]:
    """Text such as 640x480, width first -> (480, 640), height first as in N x H x W x 3. Raises WholeError."""
    width, cross, height = text.lower().partition("x")
    if not cross or not (height.isdecimal() and width.isdecimal()) or not int(height) * int(width):
        raise WholeError(f"--size: {text!r} is no size; write WIDTHxHEIGHT, such as 640x480")
    return int(height), int(width)


def ends(policy: InputPolicy) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """`fit.plan` with `fit.apply` as one graph, `fit.restore` as another; int64 sizes are handed from one to the other.

    before: image N x H x W x 3 uint8 -> fitted N x h x w x 3 uint8, size (H, W), scaled (h, w before padding)
    after: padded_label and padded_confidence N x h x w uint8, size, scaled -> label and confidence N x H x W
    """
    long_side, stride = policy.long_side, policy.stride

    @script(default_opset=op)
    def before(image: IMAGE):
        size = op.Shape(image, start=1, end=3)
        longer = op.ReduceMax(size, keepdims=1)
        reached = op.Min(longer, op.Constant(value_ints=[long_side]))
        scaled = op.Max((2 * size * reached + longer) / (2 * longer), op.Constant(value_ints=[1]))
        missing = (scaled + (stride - 1)) / stride * stride - scaled
        sizes = op.Concat(op.Shape(image, end=1), scaled, op.Constant(value_ints=[3]), axis=0)
        # exclude_outside: taps beyond the border count nothing, as in Pillow and torch. Of uint8 ONNX Runtime rounds
        # after each direction, as Pillow does.
        resized = op.Resize(image, None, None, sizes, mode="linear", antialias=1, exclude_outside=1)
        pads = op.Concat(op.Constant(value_ints=[0, 0]), missing, axis=0)
        fitted = op.Pad(resized, pads, None, op.Constant(value_ints=[1, 2]), mode="edge")
        return fitted, size, scaled

    @script(default_opset=op)
    def after(padded_label: PADDED, padded_confidence: PADDED, size: PAIR, scaled: PAIR):
        first, second = op.Constant(value_int=0), op.Constant(value_int=1)
        height, width = op.Gather(size, first), op.Gather(size, second)
        rows = (2 * op.Range(first, height, second) + 1) * op.Gather(scaled, first) / (2 * height)
        columns = (2 * op.Range(first, width, second) + 1) * op.Gather(scaled, second) / (2 * width)
        label = op.Gather(op.Gather(padded_label, columns, axis=2), rows, axis=1)
        confidence = op.Gather(op.Gather(padded_confidence, columns, axis=2), rows, axis=1)
        return label, confidence

    first, last = (optimizer.optimize(part.to_model_proto()) for part in (before, after))
    return first, last


def joined(core: onnx.ModelProto, policy: InputPolicy) -> onnx.ModelProto:
    """`core` between its two ends; input and outputs are called as the core's are."""
    before, after = ends(policy)
    for part in (before, after):
        part.ir_version = core.ir_version
        part.opset_import[0].version = opset(core)
    core = compose.add_prefix(core, "core_")
    after = compose.add_prefix(after, "after_", rename_inputs=False, rename_outputs=False)
    (label, confidence), sizes = [f"core_{name}" for name in OUTPUTS], ["size", "scaled"]
    front = compose.merge_models(before, core, [("fitted", f"core_{INPUT}")], outputs=[label, confidence, *sizes])
    handed = [(label, "padded_label"), (confidence, "padded_confidence"), *((name, name) for name in sizes)]
    whole = compose.merge_models(front, after, handed, name="marginalia")
    domains = {entry.domain: entry for entry in whole.opset_import}  # one import a domain; the merge repeats them
    del whole.opset_import[:], whole.graph.value_info[:]
    whole.opset_import.extend(domains.values())
    _shape(whole, ("batch", "height", "width", 3))
    return whole


def opset(proto: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def _shape(proto: onnx.ModelProto, shape: Sequence[int | str]) -> None:
    """Say the shapes of the input, N x H x W x 3, and of the outputs, N x H x W."""
    for value in (*proto.graph.input, *proto.graph.output):
        told = value.type.tensor_type
        sides = shape[: len(told.shape.dim)]
        value.CopyFrom(helper.make_tensor_value_info(value.name, told.elem_type, sides))


def fixed(proto: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """The graph for one shape of its input: whatever hangs on shapes alone is computed now, what then does nothing goes."""
    _shape(proto, shape)
    del proto.graph.value_info[:]
    folded = _fold(proto)
    for node in _idle(folded.graph):
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]
    return _fold(folded)


def _fold(proto: onnx.ModelProto) -> onnx.ModelProto:
    return optimizer.optimize(proto, num_iterations=4, input_size_limit=FOLDED, output_size_limit=FOLDED)


def _idle(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that hand on what they get: scaling and indexing to the same size, padding by nothing."""
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    constants = {item.name: item for item in graph.initializer}

    def idle(node: onnx.NodeProto) -> bool:
        shape = shapes.get(node.input[0]) if node.op_type in ("Resize", "Pad", "Gather") else None
        if not shape or 0 in shape or shape != shapes.get(node.output[0]):
            return False
        if node.op_type == "Resize":
            return not node.input[1]  # a region of interest moves the picture
        if node.input[1] not in constants:
            return False
        told = numpy_helper.to_array(constants[node.input[1]])
        if node.op_type == "Pad":
            return not told.any()
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        return np.array_equal(told, np.arange(shape[axis]))

    return [node for node in graph.node if idle(node)]


def describe(proto: onnx.ModelProto, manifest: Manifest, size: str) -> None:
    """Add to the graph's metadata what the bundle says of it, the bundle's id among it, as JSON or plain text.

    `size` is what images it takes: WIDTHxHEIGHT, or words.
    """
    kept = {entry.key: entry.value for entry in proto.metadata_props}
    kept |= {
        "classes": json.dumps([item.name for item in manifest.classes]),
        "palette": json.dumps([list(item.color) for item in manifest.classes]),
        "ignore": json.dumps(manifest.ignore),
        "input": json.dumps(manifest.input.model_dump(mode="json") | {"size": size}, sort_keys=True),
        "bundle": manifest.id,
    }
    kept |= {key: getattr(manifest, key) for key in ("data_hash", "split_hash", "test_hash", "commit", "method")}
    del proto.metadata_props[:]
    for key in sorted(kept):
        proto.metadata_props.add(key=key, value=kept[key])


def make(
    model: bytes, manifest: Manifest, *, size: tuple[int, int] | None = None, core: bool = False
) -> onnx.ModelProto:
    """The graph of a bundle's fp32 model.

    Args:
        size: height and width of the only image it will take, one at a time; None: any number of images of any one size.
        core: the bundle's own graph, without the ends: it takes images that were brought to multiples of the stride.
    Raises:
        WholeError: `size` is no multiple of the stride though `core` asks for it, or the model's opset is too old.
    """
    proto, stride = onnx.load_from_string(model), manifest.input.stride
    if core and size and (size[0] % stride or size[1] % stride):
        raise WholeError(f"--size {size[1]}x{size[0]}: the bundle's own graph takes multiples of {stride}; drop --core")
    if not core:
        if opset(proto) < OPSET:
            raise WholeError(f"the model is of opset {opset(proto)}, and antialias needs {OPSET}; export it again")
        proto = joined(proto, manifest.input)
    if size:
        proto = fixed(proto, (1, *size, 3))
    told = f"{size[1]}x{size[0]}" if size else f"multiples of {stride}" if core else "any"
    describe(proto, manifest, told)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def write(folder: Path, path: Path, *, size: tuple[int, int] | None = None, core: bool = False) -> Written:
    """Verify the bundle in `folder` and write its graph to `path`, as `make` says.

    Raises:
        bundle.BundleError: the bundle must not be used.
        WholeError: as `make`, or `path` lies in the bundle.
        OSError: `path` cannot be written.
    """
    opened = open_bundle(folder)
    if path.resolve().is_relative_to(folder.resolve()):
        raise WholeError(f"{path}: lies in the bundle, which may hold nothing else; choose another place")
    proto = make(opened.read_model(), opened.manifest, size=size, core=core)
    data = proto.SerializeToString(deterministic=True)
    atomic.write_bytes(path, data)
    sides = proto.graph.input[0].type.tensor_type.shape.dim
    return Written(path, tuple(side.dim_param or side.dim_value for side in sides), len(proto.graph.node), len(data))
