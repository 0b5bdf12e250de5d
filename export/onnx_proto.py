"""Fields of an ONNX model that more than one module reads or writes. No torch."""

from collections.abc import Mapping

import onnx


def opset(proto: onnx.ModelProto) -> int:
    """The version of the standard operators that the model is written in."""
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def metadata(proto: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def set_metadata(proto: onnx.ModelProto, values: Mapping[str, str]) -> None:
    """Replace the model's metadata, written in the order of `values`."""
    del proto.metadata_props[:]
    for key, value in values.items():
        proto.metadata_props.add(key=key, value=value)
