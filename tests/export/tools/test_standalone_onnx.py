"""The standalone graph for other programs: its resize alone, its ends against `resize`, all of it against `Runtime`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from export.bundle import bundle
from export.bundle.manifest import InputPolicy
from export.runtime import runtime
from export.tools import resize_graph, standalone_onnx
from export.tools.sizes import Size
from pipeline.imaging import resize
from tests.support import tiny_onnx, tiny_project

POLICY = InputPolicy(long_side=64, stride=16)
BILINEAR = Image.Resampling.BILINEAR
# Around the working size, far above it, strips, dots; height and width.
SIZES = [
    (1, 1), (1, 64), (64, 64), (16, 48), (37, 50), (63, 17), (64, 65), (65, 64), (66, 130), (90, 131), (131, 90),
    (300, 400), (401, 299), (700, 699), (3, 200), (200, 3), (1, 900), (900, 1), (2, 129), (129, 2), (1000, 77),
]  # fmt: skip


def opened(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def answer(session: onnxruntime.InferenceSession, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    label_NHW, confidence_NHW = session.run(["label", "confidence"], {"image": images_NHWC})
    return label_NHW, confidence_NHW


@pytest.fixture(scope="module")
def before() -> onnxruntime.InferenceSession:
    return opened(resize_graph.resize_graphs(POLICY)[0])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bundle.Bundle:
    return tiny_onnx.write(tmp_path_factory.mktemp("whole") / "bundle")


@pytest.fixture(scope="module")
def trained() -> bundle.Bundle:
    return bundle.open_bundle(tiny_project.exported() / "models/exported")


def plan(height: int, width: int) -> resize.Fit:
    return resize.plan(height, width, long_side=POLICY.long_side, stride=POLICY.stride)


def test_resize_alone(before: onnxruntime.InferenceSession) -> None:
    """Of noise, the hardest there is: within one grey level of Pillow and of torch (which rounds once, at the end).

    Other than Pillow in at most 3 % of the values, taken horizontally first as the graph does (0.3 % of all). Pillow 13
    scales tall images vertically first, and what is rounded in between then makes up to 30 % differ by that one level.
    """
    random = np.random.default_rng(0)
    odd = [tuple(int(side) for side in np.exp(random.uniform(0, np.log(500), 2))) for _ in range(60)]
    shares = []
    for height, width in SIZES + odd:
        sizes = plan(height, width)
        images_NHWC = noise(height, 2, height, width, 3)
        (got,) = before.run(["fitted"], {"image": images_NHWC})
        got = got[:, : sizes.scaled_height, : sizes.scaled_width]
        if max(height, width) <= POLICY.long_side:
            assert (got == images_NHWC).all()
            continue
        for image_HWC, scaled_HWC in zip(images_NHWC, got, strict=True):
            picture, side = Image.fromarray(image_HWC), (sizes.scaled_width, sizes.scaled_height)
            apart = np.abs(np.asarray(picture.resize(side, BILINEAR)).astype(int) - scaled_HWC)
            assert apart.max() <= 1
            assert (apart > 0).mean() <= (0.03 if height <= 2 * width else 0.3)
            in_turn = picture.resize((side[0], height), BILINEAR).resize(side, BILINEAR)
            shares.append((np.asarray(in_turn) != scaled_HWC).mean())
            assert shares[-1] <= 0.03
        if sizes.scaled_width > 1:  # torch 2.13 answers nonsense at a width of 1
            image_BCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).double()
            exact = F.interpolate(
                image_BCHW,
                (sizes.scaled_height, sizes.scaled_width),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )
            assert np.abs(exact.permute(0, 2, 3, 1).numpy() - got).max() < 1.001
    assert np.mean(shares) < 0.003


def test_sizes_and_padding_are_those_of_the_policy(before: onnxruntime.InferenceSession) -> None:
    random = np.random.default_rng(1)
    for height, width in [*SIZES, *random.integers(1, 300, (100, 2)).tolist(), (5000, 3), (64, 6400), (127, 128)]:
        sizes = plan(height, width)
        fitted, size, scaled = before.run(None, {"image": noise(width, 1, height, width, 3)})
        assert size.tolist() == [height, width]
        assert scaled.tolist() == [sizes.scaled_height, sizes.scaled_width]
        assert fitted.shape == (1, sizes.padded_height, sizes.padded_width, 3)
        inner = fitted[0, : sizes.scaled_height, : sizes.scaled_width]
        missing = (sizes.padded_height - sizes.scaled_height, sizes.padded_width - sizes.scaled_width)
        assert (fitted[0] == np.pad(inner, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")).all()


def test_way_back_is_restore_itself() -> None:
    session = opened(resize_graph.resize_graphs(POLICY)[1])
    for height, width in SIZES:
        sizes = plan(height, width)
        label, confidence = noise(0, 2, 2, sizes.padded_height, sizes.padded_width)
        feed = {"padded_label": label, "padded_confidence": confidence}
        feed |= {"size": np.array([height, width]), "scaled": np.array([sizes.scaled_height, sizes.scaled_width])}
        for got, padded in zip(session.run(["label", "confidence"], feed), (label, confidence), strict=True):
            assert (got == np.stack([resize.restore(one, sizes) for one in padded])).all()


def test_whole_graph_answers_as_the_runtime_does(tiny: bundle.Bundle, trained: bundle.Bundle) -> None:
    """Equal where nothing is scaled; else the one grey level of the resize may move near-ties."""
    for used, scene in ((tiny, False), (trained, True)):
        reference = runtime.Runtime(used, provider="cpu", precision="fp32", threads=1)
        session = opened(standalone_onnx.standalone_graph(used.read_model(), used.manifest))
        random = np.random.default_rng(2)
        same, classes = [], set()
        for height, width in SIZES:
            drawn = scene and min(height, width) > 40
            image_HWC = tiny_project.scene(random, height, width)[0] if drawn else noise(height, height, width, 3)
            want = reference.segment(image_HWC)
            label_NHW, confidence_NHW = answer(session, image_HWC[None])
            assert label_NHW.shape == confidence_NHW.shape == (1, height, width)
            assert label_NHW.dtype == confidence_NHW.dtype == np.uint8
            if max(height, width) <= used.manifest.input.long_side:
                assert (label_NHW[0] == want.label_HW).all()
                assert (confidence_NHW[0] == want.confidence_HW).all()
            elif not scene:
                assert np.abs(confidence_NHW[0].astype(int) - want.confidence_HW).max() <= 1
            same.append((label_NHW[0] == want.label_HW).mean())
            classes |= set(np.unique(want.label_HW).tolist())
        assert min(same) >= 0.97
        assert np.mean(same) >= 0.995
        assert len(classes) == 4


def test_several_images_of_one_size_at_once(tiny: bundle.Bundle) -> None:
    session = opened(standalone_onnx.standalone_graph(tiny.read_model(), tiny.manifest))
    images_NHWC = noise(5, 3, 90, 131, 3)
    label_NHW, confidence_NHW = answer(session, images_NHWC)
    for i in range(3):
        label_HW, confidence_HW = answer(session, images_NHWC[i : i + 1])
        assert (label_NHW[i] == label_HW[0]).all()
        assert (confidence_NHW[i] == confidence_HW[0]).all()


def integer_results(proto: onnx.ModelProto) -> list[str]:
    """Kinds of the nodes that compute int64 numbers, which is what shapes are made of."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    assert all(name in kinds for node in inferred.node for name in node.output)
    return [n.op_type for n in inferred.node if any(kinds[name] == onnx.TensorProto.INT64 for name in n.output)]


SHAPES = {"Shape", "Size", "Range", "ConstantOfShape", "NonZero", "Constant", "CastLike", "Identity"}


def test_fixed_size_leaves_no_arithmetic_about_shapes(trained: bundle.Bundle) -> None:
    """96 is the long side and 32 the stride: as it comes; padded only; scaled only; a strip, both."""
    model, free = trained.read_model(), standalone_onnx.standalone_graph(trained.read_model(), trained.manifest)
    assert {"Shape", "Range"} <= {node.op_type for node in free.graph.node}
    assert set(integer_results(free)) > {"Shape", "Range", "Div", "Concat"}
    session, random = opened(free), np.random.default_rng(3)
    ends = {(64, 96): 0, (64, 90): 3, (128, 192): 5, (7, 500): 6}
    core = len(standalone_onnx.core_graph(model, trained.manifest, Size(96, 64)).graph.node)
    for size, more in ends.items():
        proto = standalone_onnx.standalone_graph(model, trained.manifest, Size(size[1], size[0]))
        kinds = [node.op_type for node in proto.graph.node]
        assert not SHAPES & set(kinds)
        assert integer_results(proto) == ["ArgMax"]
        scales = [node for node in proto.graph.node if any(a.name == "antialias" and a.i for a in node.attribute)]
        assert len(scales) == (max(size) > 96)
        assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [1, *size, 3]
        assert [d.dim_value for d in proto.graph.output[1].type.tensor_type.shape.dim] == [1, *size]
        image_NHWC = tiny_project.scene(random, *size)[0][None] if size[0] > 40 else noise(6, 1, *size, 3)
        for got, want in zip(answer(opened(proto), image_NHWC), answer(session, image_NHWC), strict=True):
            assert (got == want).all()
        assert len(kinds) == core + more, size


def test_core_is_the_bundles_own_graph(trained: bundle.Bundle) -> None:
    model = trained.read_model()
    given, free = onnx.load_from_string(model), standalone_onnx.core_graph(model, trained.manifest)
    assert free.graph == given.graph
    fixed = standalone_onnx.core_graph(model, trained.manifest, Size(96, 64))
    assert integer_results(fixed) == ["ArgMax"]
    image_NHWC = noise(7, 1, 64, 96, 3)
    for got, want in zip(answer(opened(fixed), image_NHWC), answer(opened(given), image_NHWC), strict=True):
        assert (got == want).all()
    with pytest.raises(standalone_onnx.StandaloneError, match=r"--size 90x64: .* multiples of 32"):
        standalone_onnx.core_graph(model, trained.manifest, Size(90, 64))


def test_graph_carries_what_the_bundle_says_of_it(trained: bundle.Bundle) -> None:
    model, manifest = trained.read_model(), trained.manifest
    known = {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}
    for make, size, told in (
        (standalone_onnx.standalone_graph, None, "any"),
        (standalone_onnx.standalone_graph, Size(90, 70), "90x70"),
        (standalone_onnx.core_graph, None, "multiples of 32"),
    ):
        proto = make(model, manifest, size)
        said = {entry.key: entry.value for entry in proto.metadata_props}
        assert said["bundle"] == manifest.id
        assert json.loads(said["classes"]) == [item.name for item in manifest.classes]
        assert json.loads(said["input"])["size"] == told
        assert json.loads(said["input"])["long_side"] == 96
        assert {key: said[key] for key in known if key != "input"} == {k: v for k, v in known.items() if k != "input"}
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]


def test_only_nodes_that_change_nothing_are_dropped() -> None:
    """Equal sizes are not enough: an index may swap, a pad may shift."""
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[4] x) => (float[4] a, float[4] b, float[4] c, float[4] d)
    <int64[4] same = {0, 1, 2, 3}, int64[4] swap = {0, 2, 1, 3}, int64[2] shift = {1, -1}, int64[2] none = {0, 0}>
    { a = Gather(x, same)  b = Gather(x, swap)  c = Pad(x, shift)  d = Pad(x, none) }"""
    proto = standalone_onnx.fix_shape(onnx.parser.parse_model(text), (4,))
    assert sorted(node.op_type for node in proto.graph.node if node.op_type != "Identity") == ["Gather", "Pad"]
    a, b, c, d = opened(proto).run(list("abcd"), {"x": np.arange(4, dtype=np.float32)})
    assert (a.tolist(), b.tolist(), c.tolist(), d.tolist()) == ([0, 1, 2, 3], [0, 2, 1, 3], [0, 0, 1, 2], [0, 1, 2, 3])


def test_refusals(tiny: bundle.Bundle, tmp_path: Path) -> None:
    with pytest.raises(standalone_onnx.StandaloneError, match="lies in the bundle"):
        standalone_onnx.write(tiny.folder, tiny.folder / "whole.onnx")
    bundle.verify(tiny.folder)
    old = onnx.load_from_string(tiny.read_model())
    old.opset_import[0].version = 17
    with pytest.raises(standalone_onnx.StandaloneError, match="opset 17"):
        standalone_onnx.standalone_graph(old.SerializeToString(), tiny.manifest)
    with pytest.raises(bundle.BundleError, match="no bundle folder"):
        standalone_onnx.write(tmp_path / "none", tmp_path / "whole.onnx")


def test_command_runs_without_torch(tiny: bundle.Bundle, tmp_path: Path) -> None:
    """And writes the same bytes as the call from Python."""
    code = "import sys; sys.modules['torch'] = None; from marginalia import cli; cli.app()"
    out = tmp_path / "whole.onnx"
    command = [sys.executable, "-c", code, "onnx", str(tiny.folder), "-o", str(out), "--size", "131x90"]
    said = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "image 1 x 90 x 131 x 3" in said.stdout
    made = standalone_onnx.standalone_graph(tiny.read_model(), tiny.manifest, Size(131, 90))
    assert out.read_bytes() == made.SerializeToString(deterministic=True)
