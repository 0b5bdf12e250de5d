"""export.tools.triton: what it writes, read back by protobuf's own reader and held against the ONNX file."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from typer.testing import CliRunner

from export.bundle import bundle
from export.bundle.manifest import COMBINATIONS, Option
from export.tools import triton
from marginalia import cli
from pipeline.storage import atomic
from tests.support import tiny_onnx

FIELD = descriptor_pb2.FieldDescriptorProto
TYPES = {"string": FIELD.TYPE_STRING, "int32": FIELD.TYPE_INT32, "int64": FIELD.TYPE_INT64, "uint64": FIELD.TYPE_UINT64}
# The part of Triton's model_config.proto that is used: message -> (field, number, type, repeated).
MESSAGES = {
    "ModelInput": [("name", 1, "string", 0), ("data_type", 2, "DataType", 0), ("format", 3, "Format", 0),
                   ("dims", 4, "int64", 1)],
    "ModelOutput": [("name", 1, "string", 0), ("data_type", 2, "DataType", 0), ("dims", 3, "int64", 1),
                    ("label_filename", 4, "string", 0)],
    "ModelDynamicBatching": [("preferred_batch_size", 1, "int32", 1), ("max_queue_delay_microseconds", 2, "uint64", 0)],
    "ModelInstanceGroup": [("count", 2, "int32", 0), ("kind", 4, "Kind", 0)],
    "ModelParameter": [("string_value", 1, "string", 0)],
    "ParametersEntry": [("key", 1, "string", 0), ("value", 2, "ModelParameter", 0)],
    "ModelConfig": [("name", 1, "string", 0), ("backend", 17, "string", 0), ("max_batch_size", 4, "int32", 0),
                    ("input", 5, "ModelInput", 1), ("output", 6, "ModelOutput", 1),
                    ("instance_group", 7, "ModelInstanceGroup", 1), ("dynamic_batching", 11, "ModelDynamicBatching", 0),
                    ("parameters", 14, "ParametersEntry", 1)],
}  # fmt: skip
ENUMS = {
    "DataType": {"TYPE_INVALID": 0, "TYPE_BOOL": 1, "TYPE_UINT8": 2, "TYPE_INT64": 9, "TYPE_FP32": 11},
    "Format": {"FORMAT_NONE": 0, "FORMAT_NHWC": 1, "FORMAT_NCHW": 2},
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
}
ONNX_TYPES = {onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.INT64: "TYPE_INT64"}


def model_config() -> Any:
    """Triton's ModelConfig, built by hand. Unknown fields are errors."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        added = file.enum_type.add(name=name)
        for value, number in values.items():
            added.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            label = FIELD.LABEL_REPEATED if repeated else FIELD.LABEL_OPTIONAL
            made = message.field.add(name=field, number=number, label=label)
            if kind in TYPES:
                made.type = TYPES[kind]
            else:
                made.type = FIELD.TYPE_ENUM if kind in ENUMS else FIELD.TYPE_MESSAGE
                made.type_name = f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()


def read(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config())


def kind(value: int, enum: str) -> str:
    return next(name for name, number in ENUMS[enum].items() if number == value)


def dims(value: onnx.ValueInfoProto) -> list[int]:
    """Without the batch, as Triton wants them; -1 where the graph takes any size."""
    return [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim][1:]


def test_names_types_and_sizes_are_those_of_the_onnx_file(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "bundle")
    folder = triton.write(made.folder, tmp_path / "repository")
    found = read(folder)
    assert (found.name, found.backend, folder.name) == ("marginalia", "onnxruntime", "marginalia")
    assert (folder / "1" / "model.onnx").read_bytes() == made.read_model()
    graph = onnx.load(folder / "1" / "model.onnx").graph
    for said, there in ((found.input, graph.input), (found.output, graph.output)):
        assert [t.name for t in said] == [t.name for t in there]
        assert [list(t.dims) for t in said] == [dims(t) for t in there]
        assert [kind(t.data_type, "DataType") for t in said] == [
            ONNX_TYPES[t.type.tensor_type.elem_type] for t in there
        ]
    assert kind(found.input[0].format, "Format") == "FORMAT_NHWC"
    assert not graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")  # what allows max_batch_size
    assert found.max_batch_size == 8
    assert list(found.dynamic_batching.preferred_batch_size) == [2, 4, 8]
    assert found.dynamic_batching.max_queue_delay_microseconds == 0
    assert not found.instance_group
    told = {item.key: item.value.string_value for item in found.parameters}
    assert told == {"bundle": made.manifest.id, "long_side": "64", "stride": "16", "ignore": "255"}
    assert [o.label_filename for o in found.output] == ["labels.txt", ""]


@pytest.mark.parametrize(("long_side", "most", "preferred"), [(1024, 8, [2, 4, 8]), (2048, 2, [2]), (4096, 1, [])])
def test_the_largest_batch_is_what_our_own_runtime_takes_at_that_size(
    tmp_path: Path, long_side: int, most: int, preferred: list[int]
) -> None:
    folder = triton.write(tiny_onnx.write(tmp_path / "bundle", long_side=long_side).folder, tmp_path / "repository")
    found = read(folder)
    assert found.max_batch_size == most
    assert list(found.dynamic_batching.preferred_batch_size) == preferred


def test_labels_follow_the_ids(tmp_path: Path) -> None:
    classes = [{"id": 0, "name": "sky", "color": [1, 2, 3]}, {"id": 3, "name": "tall\ngrass", "color": [4, 5, 6]}]
    made = tiny_onnx.write(tmp_path / "bundle", classes=classes)
    folder = triton.write(made.folder, tmp_path)
    assert (folder / "labels.txt").read_text().split("\n") == ["sky", "", "", "tall grass", ""]


def test_what_is_asked_for_by_the_command_line(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "bundle")
    other = tmp_path / "repository" / "other" / "config.pbtxt"
    atomic.write_text(other, "theirs")
    asked = ["triton", str(made.folder), "-o", str(tmp_path / "repository"), "--name", "streets", "--max-batch", "4"]
    for _ in range(2):  # the second replaces the first
        done = CliRunner().invoke(cli.app, [*asked, "--delay-us", "500", "--instances", "cpu:2"])
        assert done.exit_code == 0, done.output
    found = read(tmp_path / "repository" / "streets")
    assert (found.name, found.max_batch_size) == ("streets", 4)
    assert list(found.dynamic_batching.preferred_batch_size) == [2, 4]
    assert found.dynamic_batching.max_queue_delay_microseconds == 500
    assert [(g.count, kind(g.kind, "Kind")) for g in found.instance_group] == [(2, "KIND_CPU")]
    assert other.read_text() == "theirs"
    assert sorted(path.name for path in (tmp_path / "repository").iterdir()) == ["other", "streets"]
    refused = CliRunner().invoke(cli.app, [*asked, "--precision", "fp16"])
    assert refused.exit_code == 1
    assert "has no fp16 model for ONNX Runtime on cpu; it has fp32" in refused.output


def test_the_model_of_the_asked_precision(tmp_path: Path) -> None:
    others = {"model.int8.onnx": tiny_onnx.model(150.0), "model.fp16.onnx": tiny_onnx.model(200.0)}
    options = [
        Option(runtime=runtime, device=device, precision=precision, file=file, speedup=1.5)
        for (runtime, file), ways in COMBINATIONS.items()
        for device, precision in ways
        if file in others and runtime == "onnxruntime"
    ]
    made = tiny_onnx.write(tmp_path / "bundle", others=others, options=options)
    picked = {
        (device, precision): triton.model_file(made, device, precision)
        for device, precision in (("cpu", "auto"), ("cpu", "int8"), ("cuda", "fp16"), ("cuda", "fp32"))
    }
    assert list(picked.values()) == ["model.onnx", "model.int8.onnx", "model.fp16.onnx", "model.onnx"]
    folder = triton.write(made.folder, tmp_path, precision="int8")
    assert (folder / "1" / "model.onnx").read_bytes() == others["model.int8.onnx"]
    with pytest.raises(triton.TritonError, match="has no int8 model for ONNX Runtime on cuda; it has fp16, fp32"):
        triton.model_file(made, "cuda", "int8")
    doubted = tiny_onnx.write(tmp_path / "doubted", rejected=["onnxruntime cpu fp32"])
    with pytest.raises(triton.TritonError, match="has no fp32 model for ONNX Runtime on cpu; it has nothing"):
        triton.write(doubted.folder, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"name": "../up"}, "use letters"), ({"name": 'a"b'}, "use letters"), ({"name": ""}, "use letters"),
     ({"max_batch": 0}, "at least 1"), ({"delay_us": -1}, "at least 0"), ({"instances": "tpu:1"}, "as in cpu:2"),
     ({"instances": "cpu:0"}, "as in cpu:2")],
)  # fmt: skip
def test_wrong_wishes_write_nothing(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    made = tiny_onnx.write(tmp_path / "bundle")
    with pytest.raises(triton.TritonError, match=said):
        triton.write(made.folder, tmp_path / "repository", triton.ModelSettings(**wrong))
    assert not (tmp_path / "repository").exists()


def test_neither_a_bad_bundle_nor_somebody_elses_folder(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "bundle")
    atomic.write_text(tmp_path / "marginalia" / "notes.txt", "mine")
    with pytest.raises(triton.TritonError, match="is there already and no model"):
        triton.write(made.folder, tmp_path)
    assert (tmp_path / "marginalia" / "notes.txt").read_text() == "mine"
    (made.folder / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(bundle.BundleError, match="does not match"):
        triton.write(made.folder, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_batch_of_one_size_runs_as_triton_would_run_it(tmp_path: Path) -> None:
    """The model that lies in the repository, with a batch of the largest preferred size."""
    import onnxruntime

    folder = triton.write(tiny_onnx.write(tmp_path / "bundle").folder, tmp_path)
    size = max(read(folder).dynamic_batching.preferred_batch_size)
    images_NHWC = np.random.default_rng(0).integers(0, 256, (size, 16, 32, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    label_NHW, confidence_NHW = session.run(["label", "confidence"], {"image": images_NHWC})
    expected = tiny_onnx.expected(images_NHWC)
    assert np.array_equal(label_NHW, expected[0])
    assert np.array_equal(confidence_NHW, expected[1])
