"""bundle.json: what is in a bundle and how it may be run."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

INPUT, OUTPUTS = "image", ("label", "confidence")  # of every graph
MODEL: Final = "model.onnx"
# The CPU's int8 kernels want unsigned activations, TensorRT takes only symmetric signed ones: two files.
MODELS = (MODEL, "model.fp16.onnx", "model.int8.onnx", "model.int8-tensorrt.onnx")

Provider = Literal["cpu", "cuda", "openvino", "tensorrt", "auto"]
Precision = Literal["fp32", "bf16", "fp16", "int8", "auto"]
Byte = Annotated[int, Field(ge=0, le=255)]
Positive = Annotated[int, Field(gt=0)]


# (runtime, file) -> the devices and precisions in which it can be run. OpenVINO computes in bf16 from the fp32 file.
COMBINATIONS = {
    ("onnxruntime", MODEL): (("cpu", "fp32"), ("cuda", "fp32")),
    ("onnxruntime", "model.fp16.onnx"): (("cuda", "fp16"),),
    ("onnxruntime", "model.int8.onnx"): (("cpu", "int8"),),
    ("openvino", MODEL): (("cpu", "fp32"), ("cpu", "bf16")),
    ("openvino", "model.int8.onnx"): (("cpu", "int8"),),
    ("tensorrt", MODEL): (("cuda", "fp32"),),
    ("tensorrt", "model.fp16.onnx"): (("cuda", "fp16"),),
    ("tensorrt", "model.int8-tensorrt.onnx"): (("cuda", "int8"),),
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassInfo(_Part):
    id: Annotated[int, Field(ge=0, le=254)]
    name: Annotated[str, Field(min_length=1)]
    color: tuple[Byte, Byte, Byte]


class InputPolicy(_Part):
    """What the graph takes, and how `pipeline.imaging.resize` brings any image to it."""

    layout: Literal["NHWC"] = "NHWC"
    dtype: Literal["uint8"] = "uint8"
    channels: Literal["RGB"] = "RGB"
    long_side: Positive
    stride: Positive


class Outputs(_Part):
    label: Literal["uint8 NHW"] = "uint8 NHW"
    confidence: Literal["uint8 NHW (0..255 = 0..1)"] = "uint8 NHW (0..255 = 0..1)"


class Option(_Part):
    """One way to run the bundle. The last three are what parity measured where the bundle was made; None: not judged.

    speedup: over onnxruntime in fp32 on the same device. agreement: share of pixels on which it says what torch says.
    """

    runtime: Literal["onnxruntime", "openvino", "tensorrt"]
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16", "fp16", "int8"]
    file: Literal["model.onnx", "model.fp16.onnx", "model.int8.onnx", "model.int8-tensorrt.onnx"] = MODEL
    speedup: Annotated[float, Field(gt=0)] | None = None
    agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    miou_drop: float | None = None

    @model_validator(mode="after")
    def _exists(self) -> "Option":
        if (self.device, self.precision) not in COMBINATIONS.get((self.runtime, self.file), ()):
            raise ValueError(f"{self} from {self.file}: unsupported combination of runtime, device, precision and file")
        return self

    @property
    def provider(self) -> str:
        """The name by which it is asked for: cpu, cuda, openvino or tensorrt."""
        return self.device if self.runtime == "onnxruntime" else self.runtime

    def __str__(self) -> str:
        return f"{self.runtime} {self.device} {self.precision}"


class Description(_Part):
    """What is said of a bundle's models by whoever makes it; `Manifest` is this with the bundle's id.

    `created` is an ISO time; `classes` in rising id order; `rejected` names options that did not keep parity's thresholds
    and are never run. The hashes say which data, split and test images it was made and judged with.
    """

    name: str
    created: str
    classes: Annotated[tuple[ClassInfo, ...], Field(min_length=1)]
    ignore: Byte = 255
    input: InputPolicy
    outputs: Outputs = Outputs()
    options: tuple[Option, ...] = ()
    rejected: tuple[str, ...] = ()
    metrics: dict[str, JsonValue]
    data_hash: str
    split_hash: str
    test_hash: str
    commit: str
    opset: Positive
    ir_version: Positive
    method: str

    @model_validator(mode="after")
    def _are_distinct(self) -> Self:
        ids, names = [c.id for c in self.classes], [c.name for c in self.classes]
        if ids != sorted(set(ids)) or len(set(names)) != len(names):
            raise ValueError("class ids must rise and class names must differ")
        if self.ignore in ids:
            raise ValueError(f"{self.ignore} means ignore and cannot be a class")
        if len({str(o) for o in self.options}) != len(self.options):
            raise ValueError("an option is there twice")
        return self

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """Colours indexed by class id; unused ids are black."""
        table = [(0, 0, 0)] * (self.classes[-1].id + 1)
        for item in self.classes:
            table[item.id] = item.color
        return table


class Manifest(Description):
    """bundle.json. `id` is the first 16 hex digits of SHA-256 over models, classes, input policy and options."""

    format: Literal[1] = 1
    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]

    def description(self, **changes: Any) -> Description:
        """What is said here, with other values for some fields. Raises pydantic.ValidationError."""
        fields = {name: getattr(self, name) for name in Description.model_fields}
        return Description.model_validate(fields | changes)


def ranked(options: Sequence[Option]) -> list[Option]:
    """Cards before processors, then by measured speed; what was not judged comes last, ONNX Runtime first among it."""
    return sorted(
        options,
        key=lambda o: (o.device == "cpu", o.speedup is None, -(o.speedup or 0.0), o.runtime != "onnxruntime", str(o)),
    )


def explain(error: ValidationError) -> str:
    """The first thing that is wrong: the field's path and the reason."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'manifest'}: {first['msg']}"
