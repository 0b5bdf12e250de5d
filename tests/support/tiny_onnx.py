"""A bundle without training: a graph so small that its exact answers are written down in NumPy beside it.

label = argmax over (threshold, R, G, B), confidence = max(R, G, B): exact in float32, so served answers are golden.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.bundle import bundle
from export.bundle.manifest import MODEL, Description

CLASSES: list[dict[str, Any]] = [
    {"id": 0, "name": "dark", "color": [20, 20, 20]},
    {"id": 1, "name": "red", "color": [220, 30, 30]},
    {"id": 2, "name": "green", "color": [30, 200, 40]},
    {"id": 3, "name": "blue", "color": [40, 60, 230]},
]
OPSET, IR = 18, 10


def model(threshold: float = 100.0, *, label_type: int = TensorProto.UINT8, shift: int = 0) -> bytes:
    """ONNX bytes; `shift` is added to every label (to make ids of no class), `label_type` for a wrong signature."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["pixels", "weight"], ["linear"]),
        helper.make_node("Add", ["linear", "bias"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["index"], axis=3, keepdims=0),
        helper.make_node("Add", ["index", "shift"], ["shifted"]),
        helper.make_node("Cast", ["shifted"], ["label"], to=label_type),
        helper.make_node("ReduceMax", ["pixels", "axes"], ["brightest"], keepdims=0),
        helper.make_node("Cast", ["brightest"], ["confidence"], to=TensorProto.UINT8),
    ]
    weight = np.concatenate([np.zeros((3, 1)), np.eye(3)], axis=1).astype(np.float32)
    constants = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array([threshold, 0, 0, 0], np.float32), "bias"),
        numpy_helper.from_array(np.array(shift, np.int64), "shift"),
        numpy_helper.from_array(np.array([3], np.int64), "axes"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])],
        [
            helper.make_tensor_value_info("label", label_type, ["N", "H", "W"]),
            helper.make_tensor_value_info("confidence", TensorProto.UINT8, ["N", "H", "W"]),
        ],
        constants,
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    onnx.checker.check_model(built, full_check=True)
    return built.SerializeToString()


def expected(images_NHWC: NDArray[np.uint8], threshold: float = 100.0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What the graph answers, said in NumPy."""
    dark = np.full((*images_NHWC.shape[:3], 1), threshold)
    scores = np.concatenate([dark, images_NHWC.astype(np.float64)], axis=3)
    return scores.argmax(axis=3).astype(np.uint8), images_NHWC.max(axis=3)


def describe(**changes: Any) -> Description:
    """What is said of the tiny model, with other fields where `changes` has them; long side 64, stride 16."""
    fields: dict[str, Any] = {
        "name": "marginalia",
        "classes": CLASSES,
        "input": {"long_side": changes.pop("long_side", 64), "stride": changes.pop("stride", 16)},
        "opset": OPSET,
        "ir_version": IR,
        "metrics": {"miou": 61.5},
        "data_hash": "d" * 64,
        "split_hash": "5" * 64,
        "test_hash": "7" * 64,
        "commit": "0" * 40,
        "method": "supervised",
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Description.model_validate(fields | changes)


def write(
    folder: Path,
    *,
    model_bytes: bytes | None = None,
    others: Mapping[str, bytes] | None = None,
    card: str = "# tiny\n",
    **changes: Any,
) -> bundle.Bundle:
    """A complete bundle around the tiny model and `others`, described as `describe` does."""
    models = {MODEL: model_bytes or model(), **(others or {})}
    return bundle.create(folder, models, describe(**changes), card)
