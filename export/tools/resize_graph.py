"""`pipeline.imaging.resize` as ONNX graphs: what comes before the bundle's own graph, and what comes after it.

The functions below are not run as Python: onnxscript translates their source into ONNX operators. mypy cannot follow
that (it takes every operator's result for a union of all tensor types), so this file alone is exempt from its checks.
"""

# mypy: ignore-errors

import onnx
from onnxscript import INT64, UINT8, optimizer, script
from onnxscript import opset18 as op

from export.bundle.manifest import InputPolicy

IMAGE, PADDED, PAIR = UINT8["batch", "height", "width", 3], UINT8["batch", "padded_height", "padded_width"], INT64[2]


def resize_graphs(policy: InputPolicy) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """`resize.plan` with `resize.apply` as one graph, `resize.restore` as another; the first hands sizes to the second.

    before: image N x H x W x 3 uint8 -> fitted N x h x w x 3 uint8; int64 pairs size (H, W), scaled (h, w before padding)
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
