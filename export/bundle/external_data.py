"""Does an ONNX file point outside itself? Answered without the onnx package, which serving does not install.

ONNX is protobuf; the walk below visits only the fields that can hold a tensor and skips everything else by length.
Field numbers: onnx/onnx.proto (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, FunctionProto).
"""

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# message kind -> field number -> kind of the message inside
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {13: "entry"},
}
_DEPTH = 64


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number is longer than ten bytes")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of one protobuf message; bytes fields as views, numbers as int."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} is not used by ONNX")
        if at + size > len(data):
            raise ValueError("a field runs past the end")
        yield key >> 3, data[at : at + size]
        at += size


def external_references(model: bytes) -> list[str]:
    """What in the model refers to another file: external tensors (their location) and EPContext nodes; [] is good.

    Raises:
        ValueError: the bytes are no ONNX protobuf.
    """
    found: list[str] = []

    def walk(kind: str, data: memoryview, depth: int) -> None:
        if depth > _DEPTH:
            raise ValueError("subgraphs are nested too deeply")
        for number, value in _fields(data):
            if kind == "tensor" and number == 14 and value == 1:
                found.append("a tensor with data_location EXTERNAL")
            if not isinstance(value, memoryview):
                continue
            if kind == "node" and number == 4 and bytes(value) == b"EPContext":
                found.append("an EPContext node")
            inside = _INSIDE[kind].get(number)
            if inside == "entry":
                found.append(f"a tensor kept in {_location(value)!r}")
            elif inside:
                walk(inside, value, depth + 1)

    try:
        walk("model", memoryview(model), 0)
    except IndexError as error:
        raise ValueError("the file ends inside a number") from error
    return found


def _location(entry: memoryview) -> str:
    """Text of a StringStringEntryProto (key = 1, value = 2) as key=value."""
    parts = {
        number: bytes(value).decode("utf-8", "replace")
        for number, value in _fields(entry)
        if not isinstance(value, int)
    }
    return f"{parts.get(1, '')}={parts.get(2, '')}"
