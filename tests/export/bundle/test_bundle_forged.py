"""Links that lead astray, files outside, flipped bits, missing and extra files. The bundle is refused and the file named."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.bundle import bundle
from export.bundle.external_data import external_references
from tests.support import tiny_onnx

FILES = ("MODEL_CARD.md", "SHA256SUMS", "bundle.json", "model.onnx")


def refused(folder: Path) -> str:
    with pytest.raises(bundle.BundleError) as caught:
        bundle.verify(folder)
    return str(caught.value)


def seal(folder: Path) -> None:
    """Make id and checksums fit whatever lies there now: a forger's bundle, consistent in itself."""
    facts = json.loads((folder / "bundle.json").read_text())
    manifest = bundle.Manifest.model_validate(facts)
    facts["id"] = bundle.bundle_id({"model.onnx": (folder / "model.onnx").read_bytes()}, manifest)
    (folder / "bundle.json").write_text(json.dumps(facts))
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in FILES if n != "SHA256SUMS"]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_the_forger_can_seal(tmp_path: Path) -> None:
    """The helper below is honest: an untouched bundle sealed again is accepted."""
    folder = tiny_onnx.write(tmp_path / "b").folder
    seal(folder)
    bundle.verify(folder)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit(tmp_path: Path, name: str) -> None:
    folder = tiny_onnx.write(tmp_path / "b").folder
    whole = (folder / name).read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        for bit in (0, 5):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            (folder / name).write_bytes(damaged)
            message = refused(folder)
            assert name in message
    (folder / name).write_bytes(whole)
    bundle.verify(folder)


@pytest.mark.parametrize("name", FILES)
def test_missing(tmp_path: Path, name: str) -> None:
    folder = tiny_onnx.write(tmp_path / "b").folder
    (folder / name).unlink()
    assert f"{name}: missing" in refused(folder)


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), Path.mkdir, lambda p: p.symlink_to("model.onnx")])
def test_extra(tmp_path: Path, make: Callable[[Path], object]) -> None:
    folder = tiny_onnx.write(tmp_path / "b").folder
    make(folder / "weights.bin")
    assert "weights.bin: does not belong" in refused(folder)


@pytest.mark.parametrize("change", [lambda s: s + "\n", lambda s: s + s.splitlines()[0] + "\n", lambda s: s[:-1]])
def test_sums_with_other_lines(tmp_path: Path, change: Callable[[str], str]) -> None:
    folder = tiny_onnx.write(tmp_path / "b").folder
    sums = folder / "SHA256SUMS"
    sums.write_text(change(sums.read_text()))
    assert "SHA256SUMS" in refused(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_followed_and_what_they_lead_to_is_hashed(
    tmp_path: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    """DVC makes them, into a cache that lies anywhere; whatever is there now must be what the bundle promises."""
    opened = tiny_onnx.write(tmp_path / "b")
    elsewhere = tmp_path / "cache" / "4f" / "1d2c"
    elsewhere.parent.mkdir(parents=True)
    (opened.folder / name).rename(elsewhere)
    link(elsewhere, opened.folder / name)
    again = bundle.open_bundle(opened.folder)
    assert again == opened
    model = again.read_model()

    elsewhere.write_bytes(elsewhere.read_bytes() + b" ")
    assert f"{opened.folder / name}: " in refused(opened.folder)
    if name == "model.onnx":
        with pytest.raises(bundle.BundleError, match=r"model\.onnx: changed after it was verified"):
            again.read_model()
    else:
        assert again.read_model() == model


@pytest.mark.parametrize("name", FILES)
def test_links_that_lead_to_no_plain_file(tmp_path: Path, name: str) -> None:
    """None is opened: /dev/zero has no end, and a pipe would hold the reader for ever."""
    folder = tiny_onnx.write(tmp_path / "b").folder
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "folder", tmp_path / "pipe", Path("/dev/zero")):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        assert f"{name}: is a link to something that is no plain file" in refused(folder)
    for target in (tmp_path / "absent", folder / name):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        assert f"{name}: is a link that leads nowhere" in refused(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: is no plain file" in refused(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"{name}: is no plain file" in refused(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_somebody_elses_file_is_refused_without_a_word_of_it(tmp_path: Path, name: str) -> None:
    """A bundle that somebody sent: its link leads to a file of the machine that it was sent to."""
    folder = tiny_onnx.write(tmp_path / "b").folder
    (tmp_path / "secret").write_text("root:hunter2\n")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret")
    message = refused(folder)
    assert message.startswith(f"{folder}/")
    assert "hunter2" not in message
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/environ")  # a plain file of no size, and of any length
    assert f"{name}: has another size than stated" in refused(folder)


def external(tensor: onnx.TensorProto) -> onnx.TensorProto:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    tensor.ClearField("raw_data")
    return tensor


def weight() -> onnx.TensorProto:
    return external(numpy_helper.from_array(np.zeros((3, 4), np.float32), "weight"))


def in_initializer(model: onnx.ModelProto) -> None:
    external(model.graph.initializer[0])


def in_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=weight()))


def in_subgraph(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=weight())], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))


def in_sparse(model: onnx.ModelProto) -> None:
    sparse = onnx.SparseTensorProto()
    sparse.values.CopyFrom(weight())
    model.graph.sparse_initializer.append(sparse)


def in_lists(model: onnx.ModelProto) -> None:
    """Attributes that hold several tensors, sparse tensors or graphs, one kind at a time."""
    inner = helper.make_graph([], "inner", [], [], [weight()])
    sparse = onnx.SparseTensorProto()
    sparse.indices.CopyFrom(weight())
    for field, value in (("tensors", weight()), ("graphs", inner), ("sparse_tensors", sparse)):
        single = onnx.ModelProto()
        single.CopyFrom(model)
        getattr(single.graph.node.add(op_type="X").attribute.add(name="a"), field).append(value)
        assert external_references(single.SerializeToString()), field
    one = model.graph.node.add(op_type="X").attribute.add(name="a")
    one.sparse_tensor.CopyFrom(sparse)


def in_training(model: onnx.ModelProto) -> None:
    model.training_info.add().algorithm.CopyFrom(helper.make_graph([], "inner", [], [], [weight()]))


def in_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=weight())
    model.functions.append(helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 18)]))


def in_location_only(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].external_data.add(key="location", value="../secret")


def in_flag_only(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def in_context_node(model: onnx.ModelProto) -> None:
    node = helper.make_node("EPContext", [], ["c"], domain="com.microsoft", ep_cache_context="../secret", embed_mode=0)
    model.graph.node.append(node)


@pytest.mark.parametrize(
    "hide",
    [
        in_initializer, in_attribute, in_subgraph, in_sparse, in_lists, in_training, in_function, in_location_only,
        in_flag_only, in_context_node,
    ],
)  # fmt: skip
def test_data_outside_the_file(tmp_path: Path, hide: Callable[[onnx.ModelProto], None]) -> None:
    """A bundle whose checksums are all right and whose model reads a file beside or above it."""
    folder = tiny_onnx.write(tmp_path / "b").folder
    model = onnx.load_model_from_string((folder / "model.onnx").read_bytes())
    hide(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    seal(folder)
    assert "model.onnx: refers to other files" in refused(folder)


def test_honest_models_have_no_references() -> None:
    assert external_references(tiny_onnx.model()) == []


def test_an_id_that_is_not_the_models(tmp_path: Path) -> None:
    folder = tiny_onnx.write(tmp_path / "b").folder
    text = (folder / "bundle.json").read_text()
    (folder / "bundle.json").write_text(text.replace(json.loads(text)["id"], "0" * 16))
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in FILES if n != "SHA256SUMS"]
    (folder / "SHA256SUMS").write_text("".join(lines))
    assert "bundle.json: id 0000000000000000 is not that of this model" in refused(folder)


def test_truncated_and_random_models_end_in_a_refusal() -> None:
    """The protobuf walk meets bytes of any kind: references found, none, or ValueError; nothing else."""
    whole = tiny_onnx.model()
    rng = np.random.default_rng(0)
    for cut in range(0, len(whole), 5):
        damaged = bytearray(whole[:cut])
        for _ in range(min(3, cut)):
            damaged[rng.integers(cut)] = rng.integers(256)
        try:
            assert isinstance(external_references(bytes(damaged)), list)
        except ValueError as error:
            assert str(error)  # noqa: PT017
